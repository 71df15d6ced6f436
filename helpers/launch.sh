# shellcheck shell=bash
# shellcheck disable=SC2154,SC1090 # the wrapper assigns the variables below, and which env file there is shows only when it runs
# What the wrappers share: set up if needed, source the env file, become the launcher. A wrapper sets, before it sources this:
#   simpletuner_family      which network: sdxl, sd2x or sd3
#   simpletuner_env_files   names of its env file, today's first, then those it had once
#
# Nothing here looks at a setting or builds an argument list: the env file's variables are exported as they are and the wrapper's own
# arguments are passed on untouched, so a prompt arrives byte for byte. Python judges them, because Python can explain.
#
# Not `set -e` and not `set -u`: they would hold in the user's env file too, where an unset variable is no mistake. The long names keep
# this file's variables apart from the user's.

simpletuner_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)

simpletuner_refuse() {
    printf '%s: %s\n' "$(basename "$0")" "$*" >&2
    exit 2
}

# The caller's folder comes first, so that a project can keep its settings beside its data.
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
                printf 'settings   from %s, whose name today is %s\n' "$simpletuner_env_file" "${simpletuner_env_files[0]}" >&2
            return
        done
    done
    return 1
}

simpletuner_missing_env_file() {
    if [[ -n ${ENV_FILE:-} ]]; then
        simpletuner_refuse "ENV_FILE names $ENV_FILE, which is not a file that can be read"
    fi
    local name=${simpletuner_env_files[0]}
    simpletuner_refuse "there is no $name here or in $simpletuner_root; make one and fill it in:" \
        "cp '$simpletuner_root/$name.example' '$simpletuner_root/$name' (or see a run first: ./train_sdxl.sh --demo)"
}

# The demo brings its own settings, and help needs none.
simpletuner_env_file=''
simpletuner_wants_env_file=yes
for simpletuner_argument in "$@"; do
    case $simpletuner_argument in
    --demo | --demo=* | --help | -h) simpletuner_wants_env_file=no ;;
    esac
done
if [[ $simpletuner_wants_env_file == yes ]]; then
    simpletuner_find_env_file || simpletuner_missing_env_file
    simpletuner_env_file=$(cd "$(dirname "$simpletuner_env_file")" && pwd -P)/$(basename "$simpletuner_env_file")
fi

# Before the set-up, so that a slip in the env file does not cost its minutes.
if [[ -n $simpletuner_env_file ]]; then
    # Windows' line endings and byte-order mark would become part of the values.
    simpletuner_settings=$(LC_ALL=C sed -e $'1s/^\xEF\xBB\xBF//' -e $'s/\r$//' "$simpletuner_env_file")
    printf '%s\n' "$simpletuner_settings" | bash -n /dev/stdin || simpletuner_refuse "$simpletuner_env_file is not valid shell; the line is named above"
fi

if [[ -z ${SIMPLETUNER_PYTHON:-} ]]; then
    bash "$simpletuner_root/ubuntu.sh" || exit
    SIMPLETUNER_PYTHON=$simpletuner_root/.venv/bin/python
fi

unset SIMPLETUNER_ENV_FILE
if [[ -n $simpletuner_env_file ]]; then
    # 127: bash took part of a line for a command's name, and has said which.
    trap '[[ $? != 127 ]] || simpletuner_refuse "$simpletuner_env_file: a variable is set as NAME='"'value'"', with quotes if the value holds blanks and without blanks around ="' ERR
    set -a
    if [[ $simpletuner_settings == "$(<"$simpletuner_env_file")" ]]; then
        source "$simpletuner_env_file" # as it is, so that BASH_SOURCE in it means what it says
    else
        eval "$simpletuner_settings"
    fi
    set +a
    trap - ERR
    export SIMPLETUNER_ENV_FILE=$simpletuner_env_file
fi
export SIMPLETUNER_FAMILY=$simpletuner_family

# exec: from here the wrapper's process is the launcher, and with one process the trainer; signals and the exit code are its own.
exec "$SIMPLETUNER_PYTHON" "$simpletuner_root/helpers/launch.py" "$@"
