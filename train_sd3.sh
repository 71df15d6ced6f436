#!/usr/bin/env bash
# Trains Stable Diffusion 3 and 3.5 with the settings in sd3-env.sh. ENV_FILE=other.sh uses another file.
# Flags override the file; ./train_sd3.sh --help lists them.
simpletuner_family=sd3
simpletuner_env_files=(sd3-env.sh sdxl-env.sh)
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/helpers/launch.sh"
