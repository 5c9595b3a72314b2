#!/usr/bin/env bash
# Runs a command, and again each time it asks for it: exit status 75 (preempted, hung) or a death by signal.
#   tpu/restart.sh llmjax train --config=configs/llama3_8b.py --workdir=/mnt/runs/llama
# MAX_RESTARTS (100) ends it in any case; any other status is handed on at once.
set -uo pipefail

[[ $# -gt 0 ]] || { echo "usage: tpu/restart.sh COMMAND [ARGUMENT...]" >&2; exit 2; }
max_restarts=${MAX_RESTARTS:-100}
child=
trap 'stopping=1; kill -TERM "$child" 2>/dev/null' TERM INT

for ((restart = 0; ; restart++)); do
  "$@" &
  child=$!
  wait "$child"
  status=$?
  if [[ -n ${stopping:-} ]]; then
    wait "$child"  # the first wait was cut short by the signal
    exit $?
  fi
  [[ $status -eq 75 || $status -gt 128 ]] || exit "$status"
  if ((restart >= max_restarts)); then
    echo "tpu/restart.sh: status $status after $max_restarts restarts; giving up" >&2
    exit "$status"
  fi
  echo "tpu/restart.sh: status $status, restart $((restart + 1)) of at most $max_restarts" >&2
  sleep "${PAUSE:-5}"
done
