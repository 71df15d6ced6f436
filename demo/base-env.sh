# shellcheck shell=bash disable=SC2034 # an env file: the wrapper exports what it sets
# The settings that trained the U-Net of demo/model from random weights. The commands are in demo/README.md.
#   ENV_FILE=demo/base-env.sh ./train_sdxl.sh      (from the repository's root)
MODEL_NAME='output/base/start'                # written by demo/make_base.py: trained VAE and text encoders, random U-Net
MODEL_TYPE='full'
DATALOADER_CONFIG='demo/base-dataloader.json' # 3,000 captioned images, drawn by demo/drawings.py
OUTPUT_DIR='output/base/run'

# Velocity prediction with zero terminal SNR: with epsilon prediction, the background color is not learned, because it is decided at the
# noisiest timesteps. No min-SNR weighting: it would give the last timestep zero weight.
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
