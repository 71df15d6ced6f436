#!/usr/bin/env bash
# Trains Stable Diffusion 3 with the settings in sd3-env.sh (ENV_FILE=other.sh chooses another); flags win over it.
simpletuner_family=sd3
simpletuner_env_files=(sd3-env.sh sdxl-env.sh)
simpletuner_not_yet='Stable Diffusion 3 cannot be trained yet'
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/helpers/launch.sh"
