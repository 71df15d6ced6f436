#!/usr/bin/env bash
# Trains Stable Diffusion 1 and 2 with the settings in sd21-env.sh. ENV_FILE=other.sh uses another file.
# Flags override the file; ./train_sd2x.sh --help lists them.
simpletuner_family=sd2x
simpletuner_env_files=(sd21-env.sh sd2x-env.sh env.sh)
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/helpers/launch.sh"
