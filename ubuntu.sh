#!/usr/bin/env bash
# Creates .venv in the repository root. Only Python 3.11 or newer is needed. The wrappers call this script, and you can too.
#
#   bash ubuntu.sh             install what training needs
#   bash ubuntu.sh --test      also install what the tests need
#   bash ubuntu.sh --detect    only print the torch build for this machine: cpu, cuda, rocm or default
#
# Running it again is fast (one checksum) and safe: an interrupted installation starts over, and changed pins are installed.
# The project itself is not installed with pip. It runs from this folder, so you can move or update the folder.
# Variables, explained in INSTALL.md: SIMPLETUNER_TORCH_BACKEND, PYTHON.

set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
venv=$root/.venv
python=$venv/bin/python
pins=$root/constraints/pins.txt
unfinished=$venv/.setup-unfinished # exists while packages are being installed

say() { printf 'install    %s\n' "$*" >&2; }

refuse() {
    printf 'ubuntu.sh: %s\n' "$*" >&2
    exit 2
}

# A CUDA build of torch takes gigabytes and needs an NVIDIA driver, so the drivers' own tools are asked.
detect_backend() {
    if [[ -n ${SIMPLETUNER_TORCH_BACKEND:-} ]]; then
        printf '%s\n' "$SIMPLETUNER_TORCH_BACKEND"
    elif [[ $(uname -s) == Darwin ]]; then
        printf 'default\n'
    elif [[ $(nvidia-smi -L 2>/dev/null) == GPU* ]]; then
        printf 'cuda\n'
    elif [[ $(PATH=$PATH:/opt/rocm/bin rocminfo 2>/dev/null) == *gfx* ]]; then
        printf 'rocm\n'
    else
        printf 'cpu\n'
    fi
}

# The stamp of a finished installation is a checksum of its inputs, and the torch backend if the user chose one.
wanted_stamp() {
    printf '%s %s\n' "$(cat "$root/pyproject.toml" "$pins" "$root/ubuntu.sh" | cksum)" "${SIMPLETUNER_TORCH_BACKEND:-}"
}

is_ready() { # is_ready base|test
    local stamp=$venv/.setup-$1
    [[ -x $python && -f $stamp && ! -e $unfinished && $(<"$stamp") == "$(wanted_stamp)" ]]
}

find_python() {
    local candidate candidates=(python3 python3.12 python3.13 python3.11 python3.14)
    [[ -z ${PYTHON:-} ]] || candidates=("$PYTHON")
    for candidate in "${candidates[@]}"; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    refuse "Python 3.11 or newer is needed, but ${PYTHON:-python3} is $("${PYTHON:-python3}" --version 2>/dev/null || echo missing);" \
        "install one, then run: PYTHON=/path/to/python3.12 bash ubuntu.sh"
}

make_venv() {
    local base discarded=$root/.venv-discarded
    rm -rf "$discarded"
    if [[ -e $unfinished ]]; then
        say 'the last installation was interrupted; starting over'
    elif "$python" -c 'import pip' 2>/dev/null; then
        : >"$unfinished"
        return
    fi
    base=$(find_python)
    "$base" -c 'import venv, ensurepip' 2>/dev/null ||
        refuse "$base lacks the venv module; on Debian and Ubuntu install it with: sudo apt-get install python3-venv"
    # Renamed before it is deleted, so that a half-deleted .venv is never mistaken for a complete one.
    [[ ! -e $venv ]] || mv "$venv" "$discarded"
    rm -rf "$discarded"
    mkdir "$venv"
    : >"$unfinished"
    say "creating $venv with $("$base" --version)"
    "$base" -m venv "$venv"
}

pip() { PIP_DISABLE_PIP_VERSION_CHECK=1 "$python" -m pip "$@"; }

pip_setting() { # the value of a pip setting, from variables or config files; empty if unset
    pip config list 2>/dev/null | sed -nE "s/^(:env:\.|install\.|global\.)$1='(.*)'\$/\2/p" | head -n 1
}

# uv does not read pip's settings, so the ones about package sources are passed to it.
uv_install() {
    local arguments=(--python "$python" --constraint "$pins") places place index certificates
    places=$(pip_setting find-links)
    for place in ${places//\\n/ }; do arguments+=(--find-links "$place"); done # pip separates several with \n or spaces
    index=$(pip_setting index-url)
    [[ -z $index ]] || arguments+=(--default-index "$index")
    certificates=$(pip_setting cert)
    [[ -z $certificates ]] || export SSL_CERT_FILE=$certificates
    "$python" -m uv pip install "${arguments[@]}" "$@"
}

requirements() { # requirements base|test: the requirements in pyproject.toml, one per line
    "$python" - "$root/pyproject.toml" "$1" <<'PYTHON'
import sys, tomllib

project = tomllib.load(open(sys.argv[1], "rb"))["project"]
extra = project["optional-dependencies"].get(sys.argv[2], [])
print(*project["dependencies"], *extra, sep="\n")
PYTHON
}

# "2.13.0+cpu cpu", "2.13.0+cu130 cuda", "2.13.0+rocm7.2 rocm"; empty if torch cannot be imported.
installed_torch() {
    "$python" -c '
import torch
print(torch.__version__, "cuda" if torch.version.cuda else "rocm" if torch.version.hip else "cpu")' 2>/dev/null || true
}

# The user's own package source may contain a CPU build. If pip would also install NVIDIA packages, it is a CUDA build.
# PyPI is not asked: its torch for Linux is the CUDA build, and asking may download it.
pip_would_take_cpu_torch() {
    [[ -n $(pip_setting find-links)$(pip_setting index-url)$(pip_setting extra-index-url) ]] || return
    pip install --dry-run --quiet --ignore-installed --report - --constraint "$pins" torch 2>/dev/null |
        "$python" -c '
import json, sys
names = [package["metadata"]["name"].lower() for package in json.load(sys.stdin)["install"]]
sys.exit(any(name.startswith(("nvidia-", "cuda-", "triton")) for name in names))' 2>/dev/null
}

install_torch() {
    local backend=$1
    say "installing torch ($backend)"
    case $backend in
    default) pip install --constraint "$pins" torch ;;
    cpu)
        if pip_would_take_cpu_torch; then
            pip install --constraint "$pins" torch
        else
            uv_install --torch-backend cpu torch
        fi
        ;;
    cuda | rocm) uv_install --torch-backend auto torch || pip install --constraint "$pins" torch ;;
    *) uv_install --torch-backend "$backend" torch ;;
    esac
}

wanted_kind() { # the kind of build for a backend name
    case $1 in
    cu*) printf 'cuda\n' ;;
    rocm*) printf 'rocm\n' ;;
    *) printf 'cpu\n' ;;
    esac
}

fits() { # fits INSTALLED VERSION BACKEND: whether the installed torch is the required one
    [[ ${1%%[+ ]*} == "$2" && ${1##* } == "$(wanted_kind "$3")" ]] || return
    case $3 in
    cpu | cuda | rocm | default) ;;
    *) [[ $1 == *"+$3 "* ]] ;; # an exact build
    esac
}

check_torch() {
    local backend=$1 version kind
    read -r version kind <<<"$(installed_torch)" || true
    if [[ -z ${version:-} ]]; then
        "$python" -c 'import torch' || true # prints the reason
        refuse "torch was installed but cannot be imported; the reason is printed above"
    fi
    [[ $kind == "$(wanted_kind "$backend")" ]] ||
        refuse "this machine needs a torch build for $backend, but $version ($kind) was installed;" \
            "see SIMPLETUNER_TORCH_BACKEND in INSTALL.md, or use your own environment with SIMPLETUNER_PYTHON"
    say "torch $version"
}

install_everything() { # install_everything base|test
    local backend pinned before after needed=$venv/.setup-requirements
    backend=$(detect_backend)
    make_venv
    trap '[[ ! -e $unfinished ]] || say "interrupted; run it again to start over"' EXIT
    say 'installing the installer (uv)'
    pip install --quiet --constraint "$pins" uv

    before=$(installed_torch)
    pinned=$(sed -n 's/^torch==//p' "$pins")
    if ! fits "$before" "$pinned" "$backend"; then
        [[ -z $before ]] || pip uninstall --yes --quiet torch # otherwise another build of the same version counts as installed
        install_torch "$backend"
    fi
    check_torch "$backend"

    # uv is several times faster than pip. The installed torch version is a requirement, so nothing replaces it.
    before=$(installed_torch)
    requirements "$1" >"$needed"
    printf 'torch==%s\n' "${before% *}" >>"$needed"
    say "installing the other packages ($(wc -l <"$needed" | tr -d ' ') and their dependencies)"
    if ! uv_install --requirement "$needed"; then
        say 'uv failed; trying pip'
        pip install --constraint "$pins" --requirement "$needed"
    fi
    after=$(installed_torch)
    [[ $before == "$after" ]] || refuse "installing the other packages replaced torch $before with ${after:-nothing}; run it again, and report this"

    wanted_stamp >"$venv/.setup-base"
    [[ $1 == base ]] || wanted_stamp >"$venv/.setup-$1"
    rm -f "$needed" "$unfinished"
    say "ready: $venv"
}

main() {
    local what=base
    case ${1:-} in
    '') ;;
    --test) what='test' ;;
    --detect) detect_backend && return ;;
    *) refuse "unknown argument $1; the arguments are --test and --detect" ;;
    esac
    if is_ready "$what"; then return; fi
    # Two wrappers started at once must not install into the same folder. The lock is on the folder itself and leaves no file.
    exec 9<"$root"
    if command -v flock >/dev/null && ! flock --nonblock 9; then
        say 'another installation is running here; waiting for it'
        flock 9
    fi
    if is_ready "$what"; then return; fi
    install_everything "$what"
}

main "$@"
