#!/usr/bin/env bash
# train.py on a cluster with SLURM: a torchrun a machine, which starts a process a GPU.
#
#     sbatch --nodes=4 deploy/slurm.sh config/small.py --out_dir=out/small
#
# Stand in the checkout, which all machines share with its data/ and out/. A process that dies is
# started anew by torchrun, a machine that dies is replaced by SLURM, and when the time is over the
# run saves and queues again: each time it goes on from its last checkpoint. docs/cluster.md
#SBATCH --job-name=barelm
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.txt

set -euo pipefail

# The first machine is where all meet. A port of this job's own: two may share a machine.
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 20000))

# 180 s before the end of its time: save, end, and queue again.
# (scancel sends the signal to the step, and not to this script.)
time_is_over=
trap 'time_is_over=yes; scancel --signal=TERM "$SLURM_JOB_ID"' USR1

srun --kill-on-bad-exit=1 "${TORCHRUN:-torchrun}" \
    --nnodes="$SLURM_JOB_NUM_NODES" \
    --nproc_per_node="${PROCESSES:-${SLURM_GPUS_ON_NODE:-1}}" \
    --max_restarts="${MAX_RESTARTS:-10}" \
    --rdzv_backend=c10d \
    --rdzv_endpoint="$first:$port" \
    --rdzv_id="$SLURM_JOB_ID" \
    train.py --init_from=auto "$@" &
step=$!

status=0
wait "$step" || status=$?
if [[ $time_is_over ]]; then
    wait "$step" || true # the first wait ended with the signal
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
