#!/usr/bin/env bash
# A Cloud TPU from a shell: create it, set it up, run one command on all its workers, follow it, delete it.
#   export NAME=mine ZONE=us-east5-a TYPE=v5p-128
#   tpu/pod.sh create            a TPU VM slice now (SPOT=1: a preemptible one)
#   tpu/pod.sh queue             the same as a queued resource, granted when there is room
#   tpu/pod.sh status
#   tpu/pod.sh setup             this checkout onto every worker, installed, and BUCKET (if set) mounted at /mnt/runs
#   tpu/pod.sh launch llmjax train --config=configs/llama3_8b.py --workdir=/mnt/runs/llama
#   tpu/pod.sh logs [WORKER]
#   tpu/pod.sh stop              SIGTERM: the run saves and leaves
#   tpu/pod.sh delete
# DRY_RUN=1 prints the commands. PROJECT and RUNTIME (v2-alpha-tpuv5) may be set as well.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() { sed -n '2,13s/^# \{0,1\}//p' tpu/pod.sh >&2; exit 2; }
run() { if [[ -n ${DRY_RUN:-} ]]; then printf '%q ' "$@"; echo; else "$@"; fi; }

[[ $# -gt 0 ]] || usage
: "${NAME:?set NAME, for example NAME=mine}" "${ZONE:?set ZONE, for example ZONE=us-east5-a}"
where=(--zone="$ZONE")
[[ -z ${PROJECT:-} ]] || where+=(--project="$PROJECT")
runtime=${RUNTIME:-v2-alpha-tpuv5}

vm() { run gcloud compute tpus tpu-vm "$@" "${where[@]}"; }
everywhere() { vm ssh "$NAME" --worker=all --command="$1"; }
type() { echo "${TYPE:?set TYPE, for example TYPE=v5p-128}"; }

create() { vm create "$NAME" --accelerator-type="$(type)" --version="$runtime" ${SPOT:+--spot}; }

queue() {
  run gcloud compute tpus queued-resources create "$NAME" --node-id="$NAME" --accelerator-type="$(type)" \
    --runtime-version="$runtime" ${SPOT:+--spot} "${where[@]}"
}

status() {
  run gcloud compute tpus queued-resources list "${where[@]}"
  vm describe "$NAME"
}

setup() {
  local archive
  archive=$(mktemp --suffix=.tar.gz)
  run git archive --format=tar.gz --output="$archive" HEAD
  vm scp "$archive" "$NAME:llmjax.tar.gz" --worker=all
  everywhere "mkdir -p llmjax && tar -xzf llmjax.tar.gz -C llmjax && python3 -m venv venv && \
venv/bin/pip install --quiet -e llmjax 'jax[tpu]'"
  [[ -z ${BUCKET:-} ]] || everywhere "sudo mkdir -p /mnt/runs && sudo chown \$USER /mnt/runs && gcsfuse $BUCKET /mnt/runs"
  rm -f "$archive"
}

launch() {
  [[ $# -gt 0 ]] || usage
  local words
  printf -v words '%q ' "$@"
  everywhere "cd llmjax && PATH=\$HOME/venv/bin:\$PATH LLMJAX_COORDINATOR=auto MAX_RESTARTS=${MAX_RESTARTS:-100} \
nohup setsid tpu/restart.sh ${words% } >> \$HOME/llmjax.log 2>&1 & echo \$! > \$HOME/llmjax.pid"
}

logs() { vm ssh "$NAME" --worker="${1:-0}" --command="tail -n 100 -F llmjax.log"; }

stop() { everywhere "kill -TERM \$(cat llmjax.pid)"; }

delete() {
  run gcloud compute tpus queued-resources delete "$NAME" --force --quiet "${where[@]}" ||
    vm delete "$NAME" --quiet
}

case $1 in
  create | queue | status | setup | launch | logs | stop | delete) "$@" ;;
  *) usage ;;
esac
