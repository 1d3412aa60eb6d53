#!/usr/bin/env bash
# A sweep by several independent processes on this machine, which share its cells; start it on
# other machines with the same folder too.
#   launch/sweep.sh --processes 4 --gpus --gin_file=gin/runs/zero_shot.gin
# Ctrl-C lets them stop as SIGTERM does; a second one kills them.
set -euo pipefail

processes=2 gpus=no run=yes words=()
while [[ $# -gt 0 ]]; do
  case $1 in
    --processes) processes=$2; shift 2 ;;
    --gpus) gpus=yes; shift ;;  # one each
    --dry_run) run=""; shift ;;
    *) words+=("$1"); shift ;;
  esac
done
[[ ${#words[@]} -gt 0 ]] || { echo "$0: which sweep? For example: --gin_file=FILE" >&2; exit 2; }

children=() how=TERM  # bash makes children in the background deaf to Ctrl-C
trap 'kill -TERM "${children[@]}" 2>/dev/null || true' TERM
trap 'kill -"$how" "${children[@]}" 2>/dev/null || true; how=KILL' INT
for ((i = 0; i < processes; i++)); do
  command=(mtl-jax sweep "${words[@]}")
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
