#!/usr/bin/env bash
#SBATCH --job-name=llmjax
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# A run on a GPU cluster, one process a node; the workdir is on a file system that all nodes share.
#   sbatch tpu/slurm.sh llmjax train --config=configs/llama3_8b.py --workdir=/shared/runs/llama
# Five minutes before its time is over the run saves, leaves with 75 and is queued again. DRY_RUN=1 prints the command.
set -uo pipefail

[[ $# -gt 0 ]] || { echo "usage: sbatch tpu/slurm.sh COMMAND [ARGUMENT...]" >&2; exit 2; }
export LLMJAX_COORDINATOR=auto
if [[ -n ${DRY_RUN:-} ]]; then
  echo "srun --kill-on-bad-exit=1 $*"
  exit 0
fi

srun --kill-on-bad-exit=1 "$@"
status=$?
if [[ $status -eq 75 || $status -gt 128 ]] && ((${SLURM_RESTART_COUNT:-0} < ${MAX_RESTARTS:-100})); then
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
fi
exit "$status"
