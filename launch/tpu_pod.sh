#!/usr/bin/env bash
# One run on all hosts of a TPU slice: makes the slice if it is not there, installs, runs, and
# prints how to delete it. The processes find one another. docs/pods.md explains every step.
#   launch/tpu_pod.sh --name t5 --type v5litepod-256 --zone us-west4-a --source /mnt/runs/mtl_jax \
#     --setup "sudo mount /mnt/runs" train --gin_file=/mnt/runs/run.gin
set -euo pipefail

name="" type="" zone="" source="" version=v2-alpha-tpuv5-lite setup="" run="" spot=()
while [[ ${1:-} == --* ]]; do
  case $1 in
    --name | --type | --zone | --source | --version) printf -v "${1#--}" %s "$2"; shift 2 ;;
    --setup) setup="$2 && "; shift 2 ;;  # on each host first: mount the shared folder, say
    --spot) spot=(--spot); shift ;;
    --dry_run) run="echo"; shift ;;
    *) echo "$0: unknown flag $1" >&2; exit 2 ;;
  esac
done
[[ -n $name && -n $type && -n $zone && -n $source && $# -gt 0 ]] || {
  echo "$0: needs --name, --type, --zone and --source (a clone or wheel of mtl_jax that every" \
    "host sees), then the words of mtl-jax" >&2; exit 2; }

queued=(gcloud compute tpus queued-resources)
state() { [[ -z $run ]] && "${queued[@]}" describe "$name" --zone "$zone" \
  --format='value(state.state)' 2>/dev/null || true; }
case $(state) in  # what was taken away does not come back by itself
  SUSPENDED | FAILED) "${queued[@]}" delete "$name" --zone "$zone" --force --quiet ;;&
  "" | SUSPENDED | FAILED) $run "${queued[@]}" create "$name" --node-id "$name" --zone "$zone" \
    --accelerator-type "$type" --runtime-version "$version" "${spot[@]}" ;;
esac
while [[ -z $run && $(state) != ACTIVE ]]; do
  case $(state) in FAILED | SUSPENDED) echo "$0: $name did not start" >&2; exit 1 ;; esac
  sleep 30
done
$run gcloud compute tpus tpu-vm ssh "$name" --zone "$zone" --worker=all --command="${setup}pip \
install -q '${source}[tpu]' && exec mtl-jax $(printf '%q ' "$@")"
echo "Delete it with: ${queued[*]} delete $name --force --zone $zone"
