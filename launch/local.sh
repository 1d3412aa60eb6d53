#!/usr/bin/env bash
# Several processes of one run on this machine: mtl-jax's words follow the flags.
#   launch/local.sh --processes 2 train --gin_file=gin/runs/quickstart.gin
# On a CPU each process has JAX_NUM_CPU_DEVICES devices; on GPUs one each, in their order.
# Ctrl-C lets them stop as SIGTERM does; a second one kills them.
set -euo pipefail

processes=2 port=$((20000 + RANDOM % 20000)) gpus=no run=yes
while [[ ${1:-} == --* ]]; do
  case $1 in
    --processes) processes=$2; shift 2 ;;
    --port) port=$2; shift 2 ;;
    --gpus) gpus=yes; shift ;;
    --dry_run) run=""; shift ;;
    *) echo "$0: unknown flag $1; --processes N, --port P, --gpus, --dry_run" >&2; exit 2 ;;
  esac
done
[[ $# -gt 0 ]] || { echo "$0: what shall run? For example: train --gin_file=FILE" >&2; exit 2; }

children=() how=TERM  # bash makes children in the background deaf to Ctrl-C
trap 'kill -TERM "${children[@]}" 2>/dev/null || true' TERM
trap 'kill -"$how" "${children[@]}" 2>/dev/null || true; how=KILL' INT
for ((i = 0; i < processes; i++)); do
  job=(--coordinator_address="127.0.0.1:$port" --num_processes="$processes" --process_id="$i")
  command=(mtl-jax "$@" "${job[@]}")
  [[ $gpus == no ]] || command=(env CUDA_VISIBLE_DEVICES="$i" "${command[@]}")
  [[ -n $run ]] || { printf '%q ' "${command[@]}"; echo '&'; continue; }
  "${command[@]}" &
  children+=($!)
done

status=0
for child in "${children[@]}"; do
  # A signal interrupts `wait`; the child may still have to save.
  while kill -0 "$child" 2>/dev/null; do wait "$child" || true; done
  wait "$child" || status=$?
done
exit "$status"
