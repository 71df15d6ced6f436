#!/usr/bin/env bash
# Trains FLUX.1 dev and schnell with the settings in flux-env.sh. ENV_FILE=other.sh uses another file.
# Flags override the file; ./train_flux.sh --help lists them.
simpletuner_family=flux
simpletuner_env_files=(flux-env.sh)
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/helpers/launch.sh"
