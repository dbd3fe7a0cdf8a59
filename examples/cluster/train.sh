#!/usr/bin/env bash
# Starts the processes of one node, on each node of a run. slurm.sbatch, skypilot.yaml and
# kubernetes.yaml call it; by hand, on two nodes that share a disk:
#
#     NODES=2 NODE_RANK=0 HEAD=first-node examples/cluster/train.sh CONFIG [--set KEY=VALUE ...]
#     NODES=2 NODE_RANK=1 HEAD=first-node examples/cluster/train.sh CONFIG [--set KEY=VALUE ...]
#
# Run again with the same RUN, it resumes from the newest checkpoint there.
#
# Variables:
#   RUN             the run's folder, on a disk that all nodes mount (runs/cluster). Rank 0 writes
#                   it; the start fails, with the ranks' names, where a node does not see it.
#   NODES           how many (1)
#   NODE_RANK       which this one is, from 0 (0)
#   HEAD            name or address of node 0, as the others reach it (localhost)
#   PORT            free on node 0; two runs on one node need two (29500)
#   PROCESSES       on this node (gpu: one for each GPU that is visible)
#   JOIN_SECONDS    in which every node must have come, or all that came end (900)
#   STOP_SECONDS    from SIGTERM to SIGKILL (600)
#   PYTHON          python
set -euo pipefail

if [[ $# -eq 0 ]]; then
    echo "usage: examples/cluster/train.sh CONFIG [--set KEY=VALUE ...]; its head lists variables" >&2
    exit 2
fi

RUN="${RUN:-runs/cluster}"

# Trap: torchrun kills what has not ended 30 seconds after SIGTERM. The step in flight has to end and
# the checkpoint to be written, which is 12 bytes a parameter: 91 GB for 7B. Whatever sends the
# SIGTERM (scheduler, Kubernetes) has a grace of its own, which must be longer still.
STOP_SECONDS="${STOP_SECONDS:-600}"

# Trap: this decides how NCCL shares device memory. Where it differs between trainer and engine, or
# between nodes, the first collective hangs. 0 works with every allocator.
export NCCL_CUMEM_ENABLE="${NCCL_CUMEM_ENABLE:-0}"

# Trap: on nodes with several networks NCCL and gloo may choose one that does not reach the others,
# and then wait. `ip -br addr` names them. Each library has its own variable:
# export NCCL_SOCKET_IFNAME=eth0 GLOO_SOCKET_IFNAME=eth0

# Trap: distributed.timeout (600 s) bounds how long a process waits for the others. Shorter than the
# slowest node's rollouts, or than the first download of a model, it ends healthy runs:
# --set distributed.timeout=1800. Longer, a lost node is noticed later.

# torchrun gives each process one thread otherwise; rewards and packing use some.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-4}" PYTHONUNBUFFERED=1

port="${PORT:-29500}"
if [[ "${NODE_RANK:-0}" == 0 ]] && (exec 3<>"/dev/tcp/localhost/$port") 2>/dev/null; then
    echo "error: port $port is in use on this node, the first: give every node PORT=another" >&2
    exit 2
fi

# Every node decides alike: a checkpoint appears only once all of them take part.
how=()
saved="$(find "$RUN/checkpoints" -maxdepth 1 -name 'step-*' -print -quit 2>/dev/null || true)"
if [[ -n "$saved" ]]; then
    how=(--resume)
elif [[ -e "$RUN/config.yaml" ]]; then
    how=(--overwrite) # ended before its first checkpoint: nothing is lost
fi

# exec: signals reach torchrun itself. No restarts by torchrun: it would start a node's processes
# again while the others still wait for the old ones; the scheduler starts all of them again.
exec "${PYTHON:-python}" -m torch.distributed.run \
    --nnodes="${NODES:-1}" \
    --node-rank="${NODE_RANK:-0}" \
    --nproc-per-node="${PROCESSES:-gpu}" \
    --master-addr="${HEAD:-localhost}" \
    --master-port="$port" \
    --rdzv-conf="timeout=${JOIN_SECONDS:-900}" \
    --shutdown-timeout="$STOP_SECONDS" \
    --max-restarts=0 \
    -m recap_fast train "$@" --set run="$RUN" "${how[@]}"
