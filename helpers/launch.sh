# shellcheck shell=bash
# shellcheck disable=SC2154,SC1090 # the wrapper assigns the variables below, and which env file there is shows only when it runs
# Shared by the wrappers: installs if needed, sources the env file, then becomes the launcher. Before it sources this file, a wrapper sets:
#   simpletuner_family      the model family: sdxl, sd2x or sd3
#   simpletuner_env_files   names of its env file: the current one first, then older ones
#
# This script does not read settings and builds no argument list. It exports the env file's variables unchanged and passes the wrapper's
# arguments on unchanged, so a prompt arrives byte for byte. Python checks the settings, because Python can explain mistakes.
#
# No `set -e` and no `set -u`: they would also apply to the user's env file, where an unset variable is no mistake. The long names keep
# this file's variables separate from the user's.

simpletuner_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)

simpletuner_refuse() {
    trap - EXIT
    printf '%s: %s\n' "$(basename "$0")" "$*" >&2
    exit 2
}

# The current folder comes first, so that a project can keep its settings next to its data.
simpletuner_find_env_file() {
    local name folder
    if [[ -n ${ENV_FILE:-} ]]; then
        [[ -r $ENV_FILE && ! -d $ENV_FILE ]] || return 1
        simpletuner_env_file=$ENV_FILE
        return
    fi
    for name in "${simpletuner_env_files[@]}"; do
        for folder in "$PWD" "$simpletuner_root"; do
            [[ -r $folder/$name && ! -d $folder/$name ]] || continue
            simpletuner_env_file=$folder/$name
            [[ $name == "${simpletuner_env_files[0]}" ]] ||
                printf 'settings   from %s, an old name; the current name is %s\n' "$simpletuner_env_file" "${simpletuner_env_files[0]}" >&2
            return
        done
    done
    return 1
}

simpletuner_missing_env_file() {
    if [[ -n ${ENV_FILE:-} ]]; then
        simpletuner_refuse "ENV_FILE is $ENV_FILE, which is not a readable file"
    fi
    local name=${simpletuner_env_files[0]}
    simpletuner_refuse "there is no $name here or in $simpletuner_root; create and edit it:" \
        "cp '$simpletuner_root/$name.example' '$simpletuner_root/$name' (or try a demo run first: ./train_sdxl.sh --demo)"
}

# The demo has its own settings, and --help needs none.
simpletuner_env_file=''
simpletuner_wants_env_file=yes
simpletuner_wants_help=no
for simpletuner_argument in "$@"; do
    case $simpletuner_argument in
    --demo | --demo=*) simpletuner_wants_env_file=no ;;
    --help | -h) simpletuner_wants_env_file=no simpletuner_wants_help=yes ;;
    esac
done
if [[ $simpletuner_wants_env_file == yes ]]; then
    simpletuner_find_env_file || simpletuner_missing_env_file
    simpletuner_env_file=$(cd "$(dirname "$simpletuner_env_file")" && pwd -P)/$(basename "$simpletuner_env_file")
fi

# Before the installation, so that a typo in the env file is reported without waiting minutes for it.
if [[ -n $simpletuner_env_file ]]; then
    case $(head -c 2 "$simpletuner_env_file" | od -An -tx1) in
    *'ff fe'* | *'fe ff'*) simpletuner_refuse "$simpletuner_env_file is UTF-16; save it as UTF-8" ;;
    esac
    # Windows line endings and a byte-order mark would become part of the values.
    simpletuner_settings=$(LC_ALL=C sed -e $'1s/^\xEF\xBB\xBF//' -e $'s/\r$//' "$simpletuner_env_file")
    printf '%s\n' "$simpletuner_settings" | bash -n /dev/stdin || simpletuner_refuse "$simpletuner_env_file is not valid shell; the line is given above"
fi

unset SIMPLETUNER_ENV_FILE
if [[ -n $simpletuner_env_file ]]; then
    # 127: bash read part of a line as a command name, and has printed which.
    trap '[[ $? != 127 ]] || simpletuner_refuse "$simpletuner_env_file: write variables as NAME='"'value'"', with quotes if the value contains spaces, and without spaces around ="' ERR
    trap 'simpletuner_refuse "$simpletuner_env_file ended early, by exit or by an error, so that nothing would be trained; remove that line"' EXIT
    set -a
    if [[ $simpletuner_settings == "$(<"$simpletuner_env_file")" ]]; then
        source "$simpletuner_env_file" # unchanged, so that BASH_SOURCE works in it
    else
        eval "$simpletuner_settings"
    fi
    set +a
    trap - ERR EXIT
    export SIMPLETUNER_ENV_FILE=$simpletuner_env_file
fi
export SIMPLETUNER_FAMILY=$simpletuner_family

# An installation takes minutes. Help and mistakes in the settings do not wait for it: the checks need no installed package.
if [[ -z ${SIMPLETUNER_PYTHON:-} && ! -e $simpletuner_root/.venv/.setup-base ]]; then
    for simpletuner_python in "${PYTHON:-python3}" python3.12 python3.13 python3.11 python3.14; do
        "$simpletuner_python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue
        SIMPLETUNER_CHECK_ONLY=yes "$simpletuner_python" -B "$simpletuner_root/helpers/launch.py" "$@" || exit
        [[ $simpletuner_wants_help == no ]] || exit 0
        break
    done
fi

if [[ -z ${SIMPLETUNER_PYTHON:-} ]]; then
    bash "$simpletuner_root/ubuntu.sh" || exit
    SIMPLETUNER_PYTHON=$simpletuner_root/.venv/bin/python
fi

# exec: the wrapper's process becomes the launcher, and with one process the trainer, so signals and the exit code are the trainer's.
exec "$SIMPLETUNER_PYTHON" "$simpletuner_root/helpers/launch.py" "$@"
