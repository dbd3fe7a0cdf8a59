#!/usr/bin/env bash
# Everything that needs a GPU, in one command, on a machine without network:
#
#     bash benchmarks/on_gpu.sh [--rehearse]
#
# Parts, in this order, each within LIMIT seconds; a part that fails does not stop the next:
#   machine     what is here and what is missing
#   gpu_tests   the tests marked gpu
#   checks      no host sync in a step; loss and reweighter in a CUDA graph equal to eager
#   kernels     the kernel suites beside the peers that are installed
#   train_step  a training step on Qwen2.5-VL-3B's shapes: tokens/s, MFU, memory, profile
#   vision_step a hybrid step with images on the same model's shapes, vision tower included
#   optimizer   AdamW's step alone, by optimizer.state
#   memory      20 steps of varying length: memory that is reserved and not used
#   trl_step    the text step through TRL
#   integrations  TRL's step, Liger's loss and verl's head beside ours in their place
#   scaling     an update beside what benchmarks/scaling_model.py predicts for one GPU, and two rates
#   rollout     weight sync into vLLM and rollouts from it
#   transfer    weights to a vLLM server of its own, by each transfer: seconds and bytes
#   digits      the forgetting experiment at its larger size; a later call goes on with it
#
# --rehearse runs the same parts on any device with tiny shapes.
#
# Variables: PARTS: those to run (all). WHEELS: a folder of wheels, installed for this run only.
# OUT: where results go (benchmarks/results/<device>). LIMIT: seconds for a part (600). PYTHON.
#
# Writes summary.json, summary.md, kernels.json, integrations.json and logs.txt, after every part. Exit
# status: 1 if a part failed; a part that cannot run here is reported with its reason and is no failure.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

rehearse=()
case "${1:-}" in
  --rehearse) rehearse=(--rehearse) ;;
  "") ;;
  *) echo "usage: bash benchmarks/on_gpu.sh [--rehearse]; got: $1" >&2; exit 2 ;;
esac

PYTHON="${PYTHON:-$([[ -x .venv/bin/python ]] && echo .venv/bin/python || echo python3)}"
PARTS="${PARTS:-machine gpu_tests checks kernels train_step vision_step optimizer memory trl_step integrations scaling rollout transfer digits}"
export LIMIT="${LIMIT:-600}"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT

export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 VLLM_NO_USAGE_STATS=1 MPLBACKEND=Agg
export TRL_EXPERIMENTAL_SILENCE=1
# The tests choose Triton's interpreter where they see no NVIDIA driver; some sandboxes hide it.
((${#rehearse[@]})) || export TRITON_INTERPRET=0
if [[ -n "${WHEELS:-}" ]]; then
  if "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --upgrade \
    --target "$work/site" "$WHEELS"/*.whl >"$work/wheels.log" 2>&1; then
    export PYTHONPATH="$work/site:$PYTHONPATH"
  else
    printf 'wheels\t%s\n' $? >>"$work/status.tsv" # the summary quotes the log
  fi
fi

# As torch names it: a machine may have no nvidia-smi.
device_name() {
  "$PYTHON" -c 'import torch
print(torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu")' |
    tail -n 1 | tr 'A-Z ' 'a-z-' | tr -cd 'a-z0-9-'
}
results="${OUT:-benchmarks/results/$(device_name)}"
mkdir -p "$results"

status=0
for part in $PARTS; do
  echo "== $part"
  timeout --kill-after=15 "$LIMIT" "$PYTHON" -m benchmarks.on_gpu.run "$part" \
    --work "$work" "${rehearse[@]}" >"$work/$part.log" 2>&1
  printf '%s\t%s\n' "$part" $? >>"$work/status.tsv"
  tail -n 40 "$work/$part.log"
  for suite in kernels integrations; do
    [[ -f "$work/$suite/results.json" ]] && cp "$work/$suite/results.json" "$results/$suite.json"
  done
  for log in "$work"/*.log; do printf '== %s\n' "$(basename "$log")"; cat "$log"; done \
    >"$results/logs.txt"
  "$PYTHON" -m benchmarks.on_gpu.summary --work "$work" --results "$results" >"$work/summary"
  status=$?
done
cat "$work/summary"
echo "results: $results"
exit "$status"
