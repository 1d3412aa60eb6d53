#!/usr/bin/env bash
# A sweep by several independent processes on this machine, which share its cells; start it on
# other machines with the same folder too.
#   launch/sweep.sh --processes 4 --gpus --gin_file=gin/runs/zero_shot.gin
set -euo pipefail

processes=2 gpus=no run="" words=()
while [[ $# -gt 0 ]]; do
  case $1 in
    --processes) processes=$2; shift 2 ;;
    --gpus) gpus=yes; shift ;;  # one each
    --dry_run) run="echo"; shift ;;
    *) words+=("$1"); shift ;;
  esac
done
[[ ${#words[@]} -gt 0 ]] || { echo "$0: which sweep? For example: --gin_file=FILE" >&2; exit 2; }

children=()
trap '[[ ${#children[@]} -eq 0 ]] || kill "${children[@]}" 2>/dev/null || true' INT TERM
for ((i = 0; i < processes; i++)); do
  visible=()
  [[ $gpus == no ]] || visible=(env CUDA_VISIBLE_DEVICES="$i")
  if [[ -n $run ]]; then
    echo "${visible[@]}" mtl-jax sweep "${words[@]}"
  else
    "${visible[@]}" mtl-jax sweep "${words[@]}" &
    children+=($!)
  fi
done

status=0
for child in "${children[@]}"; do
  # A signal interrupts `wait`; the child may still have to save.
  while code=0; wait "$child" || code=$?; kill -0 "$child" 2>/dev/null; do :; done
  [[ $code -eq 0 ]] || status=$code
done
exit "$status"
