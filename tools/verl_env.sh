#!/usr/bin/env bash
# Makes .venv/verl, where verl 0.9.1 lives with the releases it wants and recap-fast beside it, for
# tests/integrations/test_verl_*.py. Needs .venv (tools/setup_venv.sh). About a minute and 2 GB.
# Does nothing when it is up to date. Ends with 75, and says why, where it cannot be made here: no
# package index, or a Python that verl does not take. Anything else that fails is an error.
set -euo pipefail
cd -P "$(dirname "${BASH_SOURCE[0]}")/.."
unset VIRTUAL_ENV PYTHONPATH PYTHONHOME PIP_TARGET PIP_PREFIX PIP_REQUIRE_VIRTUALENV PIP_CONSTRAINT
export PIP_USER=0 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1

VENV=.venv/verl
STAMP=$VENV/setup-stamp
LOG=.venv/verl-setup.log
CANNOT_BE_MADE=75

say() { printf '[verl] %s\n' "$*"; }

cannot() {
    printf '[verl] %s cannot be made here: %s\n' "$VENV" "$1" >&2
    exit $CANNOT_BE_MADE
}

# Runs a command with its output in the log.
step() {
    say "$1"
    shift
    printf '\n== %s\n' "$*" >>"$LOG"
    if "$@" >>"$LOG" 2>&1; then return; fi
    tail -n 12 "$LOG" | sed 's/^/    /' >&2
    # What a pip without an index says; a release that an index does not have reads otherwise.
    if tail -n 40 "$LOG" |
        grep -qiE 'name resolution|NewConnection|Max retries|Network is unreach|timed out|versions: none'
    then
        cannot "pip reached no package index. The whole log: $LOG"
    fi
    say "error: it failed. The whole log: $LOG" >&2
    exit 1
}

# Python compiles what it imports; compiling every file of every package here takes minutes.
pip_install() {
    "$VENV/bin/python" -m pip install --no-compile --progress-bar off "$@"
}

main() {
    local key
    if [ ! -x .venv/bin/python ]; then
        say "error: there is no .venv: run tools/setup_venv.sh first" >&2
        exit 1
    fi
    key="$PWD
$(.venv/bin/python --version)
$(cat tools/verl_env.sh tools/verl_constraints.txt | cksum)"
    if [ "$(cat "$STAMP" 2>/dev/null)" = "$key" ]; then return; fi
    .venv/bin/python -c 'import sys; sys.exit(sys.version_info >= (3, 13))' ||
        cannot "verl 0.9.1 takes Python 3.10 to 3.12, and .venv has $(.venv/bin/python --version)"

    rm -rf "$VENV" "$LOG"
    step "1/3 a new environment in $VENV" .venv/bin/python -m venv "$VENV"
    # Its trainer imports what stands behind it here, which verl declares for its engines only.
    step "2/3 verl 0.9.1 with torch 2.13" pip_install --constraint tools/verl_constraints.txt \
        torch==2.13.0 verl==0.9.1 "transformers>=5.10.2,<5.11" \
        TransferQueue cachetools fastapi msgspec pytest pytest-timeout pyzmq uvicorn
    # verl's wheel carries its own tests as a package of that name, which would hide ours.
    rm -rf "$VENV"/lib/python3*/site-packages/tests
    # Without what it depends on: of that, the tests import what verl brings.
    step "3/3 recap-fast" pip_install --no-deps --editable .
    printf '%s' "$key" >"$STAMP"
    say "ready in $SECONDS s"
}

main "$@"
