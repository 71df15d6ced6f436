#!/usr/bin/env bash
# Trains SDXL with the settings in sdxl-env.sh. ENV_FILE=other.sh uses another file.
# Flags override the file; ./train_sdxl.sh --help lists them.
simpletuner_family=sdxl
simpletuner_env_files=(sdxl-env.sh)
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/helpers/launch.sh"
