#!/usr/bin/env bash
# Trains Stable Diffusion 1 and 2 with the settings in sd21-env.sh (ENV_FILE=other.sh chooses another); flags win over it.
simpletuner_family=sd2x
simpletuner_env_files=(sd21-env.sh sd2x-env.sh env.sh)
simpletuner_not_yet='Stable Diffusion 1 and 2 cannot be trained yet'
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/helpers/launch.sh"
