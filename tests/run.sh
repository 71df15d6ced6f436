#!/usr/bin/env bash
# Everything that must hold: lint, types, shell scripts, the architecture and the tests. Sets up first, with the test tools.
#
#   bash tests/run.sh                     all of it
#   bash tests/run.sh -k launch -x        arguments go to pytest
#   SIMPLETUNER_TEST_LONG=1 bash ...      with the long forms of tests that are scaled down otherwise, such as a save that takes 40 s

set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
bash ubuntu.sh --test || exit
python=.venv/bin/python

# One worker more than there are cores: tests of signals, timeouts and storage mostly wait. Asked before OMP_NUM_THREADS, which nproc heeds.
workers=${SIMPLETUNER_TEST_WORKERS:-$(($(nproc) + 1))}
# One thread each: on a few shared cores, the threads of several test processes would mostly wait for one another.
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
# The processes that tests start need not compile the project anew.
unset PYTHONDONTWRITEBYTECODE

failed=()
check() { # check NAME COMMAND...: go on after a failure, so that one run tells everything
    local name=$1
    shift
    printf -- '--- %s\n' "$name"
    "$@" || failed+=("$name")
}

check 'lint' "$python" -m ruff check .
check 'types' "$python" -m mypy
check 'shell scripts' .venv/bin/shellcheck -x ./*.sh simpletuner tests/run.sh .ci/run helpers/launch.sh
check 'tests' "$python" -m pytest -n "$workers" --dist worksteal "$@"

if ((${#failed[@]})); then
    printf 'failed: %s\n' "${failed[*]}"
    exit 1
fi
printf 'all well: lint, types, shell scripts, tests (the architecture among them)\n'
