#!/usr/bin/env bash
# N cooperating CPU processes on this machine, through the code that a pod runs.
#   tpu/local.sh 2 llmjax train --config=configs/quickstart.py
# When one of them dies by a signal or asks for a restart (75), all start again, at most MAX_RESTARTS (100) times.
# DRY_RUN=1 prints what would be started.
set -uo pipefail

[[ ${1:-} =~ ^[1-9][0-9]*$ && $# -gt 1 ]] || { echo "usage: tpu/local.sh N COMMAND [ARGUMENT...]" >&2; exit 2; }
num_processes=$1
shift
max_restarts=${MAX_RESTARTS:-100}
grace_seconds=${GRACE_SECONDS:-30}  # for the others, after the first one has left
children=()

start() {  # all processes of one attempt
  local port=$((20000 + RANDOM % 20000)) i
  children=()
  for ((i = 0; i < num_processes; i++)); do
    local settings=(JAX_PLATFORMS=cpu "LLMJAX_COORDINATOR=127.0.0.1:$port"
      "LLMJAX_NUM_PROCESSES=$num_processes" "LLMJAX_PROCESS_ID=$i")
    if [[ -n ${DRY_RUN:-} ]]; then
      echo "${settings[*]} $*"
      continue
    fi
    env "${settings[@]}" "$@" &
    children+=($!)
  done
}

finish() {  # wait for the others; kill those that stay, as a process that waits for a dead one does
  local deadline=$((SECONDS + $1)) child
  for child in "${children[@]}"; do
    while kill -0 "$child" 2>/dev/null && ((SECONDS < deadline)); do sleep 0.1; done
    kill -KILL "$child" 2>/dev/null
    wait "$child" 2>/dev/null
  done
}

trap 'stopping=1; kill -TERM "${children[@]}" 2>/dev/null' TERM INT

for ((restart = 0; ; restart++)); do
  start "$@"
  [[ -z ${DRY_RUN:-} ]] || exit 0
  status=0
  for ((i = 0; i < num_processes && status == 0; i++)); do
    wait -n "${children[@]}"
    status=$?
  done
  if [[ -n ${stopping:-} ]]; then
    finish "$grace_seconds"
    exit 75
  fi
  if ((status > 128)); then finish 0; else finish "$grace_seconds"; fi
  [[ $status -eq 75 || $status -gt 128 ]] || exit "$status"
  if ((restart >= max_restarts)); then
    echo "tpu/local.sh: status $status after $max_restarts restarts; giving up" >&2
    exit "$status"
  fi
  echo "tpu/local.sh: status $status, restart $((restart + 1)) of at most $max_restarts" >&2
done
