#!/usr/bin/env bash
# Makes .venv in the repository root, on a machine with Python 3.11 or newer and nothing else. The wrappers call it; so can you.
#
#   bash ubuntu.sh             what training needs
#   bash ubuntu.sh --test      and what the tests need
#   bash ubuntu.sh --detect    only say which build of torch this machine wants: cpu, cuda, rocm or default
#
# Starting it again is cheap (one checksum) and safe: a set-up that was killed is begun anew, changed pins are installed.
# The project itself is not pip-installed: it runs from this folder, so moving or updating the folder leaves nothing stale.
# Variables (INSTALL.md explains them): SIMPLETUNER_TORCH_BACKEND, PYTHON.

set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
venv=$root/.venv
python=$venv/bin/python
pins=$root/constraints/pins.txt
unfinished=$venv/.setup-unfinished # there while packages are being installed

say() { printf 'set-up     %s\n' "$*" >&2; }

refuse() {
    printf 'ubuntu.sh: %s\n' "$*" >&2
    exit 2
}

# Which torch: a CUDA build weighs gigabytes and is of no use without an NVIDIA driver, so the drivers' own tools are asked.
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

# The stamp of a finished set-up names what it was made from; the backend counts only where the user chose one.
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
    refuse "Python 3.11 or newer is needed and ${PYTHON:-python3} is $("${PYTHON:-python3}" --version 2>/dev/null || echo missing);" \
        "install one and name it: PYTHON=/path/to/python3.12 bash ubuntu.sh"
}

make_venv() {
    local base discarded=$root/.venv-discarded
    rm -rf "$discarded"
    if [[ -e $unfinished ]]; then
        say 'the last set-up was stopped half-way; starting afresh'
    elif "$python" -c 'import pip' 2>/dev/null; then
        : >"$unfinished"
        return
    fi
    base=$(find_python)
    "$base" -c 'import venv, ensurepip' 2>/dev/null ||
        refuse "$base lacks the venv module; on Debian and Ubuntu install it with: sudo apt-get install python3-venv"
    # Renamed before it is deleted: half of the old one must never pass for a whole one.
    [[ ! -e $venv ]] || mv "$venv" "$discarded"
    rm -rf "$discarded"
    mkdir "$venv"
    : >"$unfinished"
    say "making $venv with $("$base" --version)"
    "$base" -m venv "$venv"
}

pip() { PIP_DISABLE_PIP_VERSION_CHECK=1 "$python" -m pip "$@"; }

pip_setting() { # the value of one of pip's settings, from its variables or its files; empty when unset
    pip config list 2>/dev/null | sed -nE "s/^(:env:\.|install\.|global\.)$1='(.*)'\$/\2/p" | head -n 1
}

# uv reads none of pip's settings, so those that say where packages come from are handed over.
uv_install() {
    local arguments=(--python "$python" --constraint "$pins") places place index certificates
    places=$(pip_setting find-links)
    for place in ${places//\\n/ }; do arguments+=(--find-links "$place"); done # pip parts several by \n or blanks
    index=$(pip_setting index-url)
    [[ -z $index ]] || arguments+=(--default-index "$index")
    certificates=$(pip_setting cert)
    [[ -z $certificates ]] || export SSL_CERT_FILE=$certificates
    "$python" -m uv pip install "${arguments[@]}" "$@"
}

requirements() { # requirements base|test: those of pyproject.toml, one a line
    "$python" - "$root/pyproject.toml" "$1" <<'PYTHON'
import sys, tomllib

project = tomllib.load(open(sys.argv[1], "rb"))["project"]
extra = project["optional-dependencies"].get(sys.argv[2], [])
print(*project["dependencies"], *extra, sep="\n")
PYTHON
}

# "2.13.0+cpu cpu", "2.13.0+cu130 cuda", "2.13.0+rocm7.2 rocm"; empty when there is no torch that can be imported.
installed_torch() {
    "$python" -c '
import torch
print(torch.__version__, "cuda" if torch.version.cuda else "rocm" if torch.version.hip else "cpu")' 2>/dev/null || true
}

# A place of the user's own, which pip is told of, may hold a CPU build; what pip would take is judged by NVIDIA's packages beside it.
# PyPI itself is not asked: its torch for Linux is the CUDA build, and asking may cost the download.
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

wanted_kind() { # the kind of build that a backend's name stands for
    case $1 in
    cu*) printf 'cuda\n' ;;
    rocm*) printf 'rocm\n' ;;
    *) printf 'cpu\n' ;;
    esac
}

fits() { # fits INSTALLED VERSION BACKEND: whether that torch is the one wanted
    [[ ${1%%[+ ]*} == "$2" && ${1##* } == "$(wanted_kind "$3")" ]] || return
    case $3 in
    cpu | cuda | rocm | default) ;;
    *) [[ $1 == *"+$3 "* ]] ;; # a build asked for by name
    esac
}

check_torch() {
    local backend=$1 version kind
    read -r version kind <<<"$(installed_torch)" || true
    if [[ -z ${version:-} ]]; then
        "$python" -c 'import torch' || true # shows why
        refuse "torch was installed but cannot be imported; the reason stands above"
    fi
    [[ $kind == "$(wanted_kind "$backend")" ]] ||
        refuse "this machine wants a torch build for $backend, but $version ($kind) was installed;" \
            "see INSTALL.md on SIMPLETUNER_TORCH_BACKEND, or bring your own environment by SIMPLETUNER_PYTHON"
    say "torch $version"
}

install_everything() { # install_everything base|test
    local backend pinned before after needed=$venv/.setup-requirements
    backend=$(detect_backend)
    make_venv
    trap '[[ ! -e $unfinished ]] || say "stopped before it was finished; start it again to begin anew"' EXIT
    say 'installing the installer (uv)'
    pip install --quiet --constraint "$pins" uv

    before=$(installed_torch)
    pinned=$(sed -n 's/^torch==//p' "$pins")
    if ! fits "$before" "$pinned" "$backend"; then
        [[ -z $before ]] || pip uninstall --yes --quiet torch # another build of one version counts as installed
        install_torch "$backend"
    fi
    check_torch "$backend"

    # uv is several times faster than pip. torch is named as it is, so that nothing replaces it.
    before=$(installed_torch)
    requirements "$1" >"$needed"
    printf 'torch==%s\n' "${before% *}" >>"$needed"
    say "installing the rest ($(wc -l <"$needed" | tr -d ' ') packages and what they need)"
    if ! uv_install --requirement "$needed"; then
        say 'uv could not; trying pip'
        pip install --constraint "$pins" --requirement "$needed"
    fi
    after=$(installed_torch)
    [[ $before == "$after" ]] || refuse "installing the rest replaced torch $before by ${after:-nothing}; start again, and report this"

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
    *) refuse "unknown argument $1; it knows --test and --detect" ;;
    esac
    if is_ready "$what"; then return; fi
    # Two wrappers started at once must not install into one folder; the lock is on the folder itself and leaves no file.
    exec 9<"$root"
    if command -v flock >/dev/null && ! flock --nonblock 9; then
        say 'another set-up is at work here; waiting for it'
        flock 9
    fi
    if is_ready "$what"; then return; fi
    install_everything "$what"
}

main "$@"
