# shellcheck shell=bash disable=SC2034 # an env file: the wrapper exports what it sets
# The settings that trained demo/model's U-Net from random weights; demo/README.md has the commands around it.
#   ENV_FILE=demo/base-env.sh ./train_sdxl.sh      (from the repository's root)
MODEL_NAME='output/base/start'                # what demo/make_base.py wrote: VAE and text encoders trained, U-Net random
MODEL_TYPE='full'
DATALOADER_CONFIG='demo/base-dataloader.json' # 3,000 captioned pictures, drawn by demo/drawings.py
OUTPUT_DIR='output/base/run'

# Velocity prediction down to pure noise: with plain epsilon the background's colour, which is in the last of the noise, is not learnt.
# No min-SNR weighting, which would give that last timestep no weight at all.
PREDICTION_TYPE='v_prediction'
RESCALE_BETAS_ZERO_SNR='true'

TRAIN_BATCH_SIZE='32'
GRADIENT_ACCUMULATION_STEPS='1'
MAX_NUM_STEPS='14000'
NUM_EPOCHS='0'
CHECKPOINTING_STEPS='2000'
CHECKPOINTING_LIMIT='2'
MIXED_PRECISION='no'

OPTIMIZER='adamw'
LEARNING_RATE='2e-3'
LR_SCHEDULE='cosine'
LR_WARMUP_STEPS='100'
LEARNING_RATE_END='4e-5'
MAX_GRAD_NORM='1.0'
USE_EMA='true'
EMA_DECAY='0.999'
EMA_DEVICE='accelerator'

VALIDATION_PROMPT='a red circle on a blue background'
USER_PROMPT_LIBRARY='demo/prompts.json'
VALIDATION_STEPS='2000'
VALIDATION_NUM_INFERENCE_STEPS='20'
VALIDATION_GUIDANCE='4.0'
VALIDATION_DISABLE_UNCONDITIONAL='true'
VALIDATION_NEGATIVE_PROMPT=''
TRACKER_RUN_NAME='demo-base'
