#!/usr/bin/env bash
# One run on all hosts of a TPU slice: makes the slice if it is not there, installs, runs, and
# prints how to delete it. The processes find one another. docs/pods.md explains every step.
#   launch/tpu_pod.sh --name my-pod --type v5litepod-256 --zone us-west4-a \
#     --setup "sudo mount /mnt/runs" train --gin_file=runs/xl_v5e_64.gin
set -euo pipefail

name="" type="" zone="" version=v2-alpha-tpuv5-lite spot=() run="" setup="" project=()
while [[ ${1:-} == --* ]]; do
  case $1 in
    --name) name=$2; shift 2 ;;
    --type) type=$2; shift 2 ;;
    --zone) zone=$2; shift 2 ;;
    --version) version=$2; shift 2 ;;
    --project) project=(--project "$2"); shift 2 ;;
    --setup) setup="$2 && "; shift 2 ;;  # on each host first: mount the shared folder, say
    --spot) spot=(--spot); shift ;;
    --dry_run) run="echo"; shift ;;
    *) echo "$0: unknown flag $1" >&2; exit 2 ;;
  esac
done
[[ -n $name && -n $type && -n $zone && $# -gt 0 ]] || {
  echo "$0: needs --name, --type and --zone, then the words of mtl-jax" >&2; exit 2; }

tpu=(gcloud compute tpus)
place=(--zone "$zone" "${project[@]}")
if [[ -n $run ]] || ! "${tpu[@]}" tpu-vm describe "$name" "${place[@]}" >/dev/null 2>&1; then
  # A queued resource waits until there is room for it.
  $run "${tpu[@]}" queued-resources create "$name" --node-id "$name" "${place[@]}" \
    --accelerator-type "$type" --runtime-version "$version" "${spot[@]}"
  until [[ -n $run ]] || "${tpu[@]}" queued-resources describe "$name" "${place[@]}" \
    --format='value(state.state)' | grep -q ACTIVE; do sleep 30; done
fi
# The same command on every host; `exec` so that a lost connection ends it there too.
$run "${tpu[@]}" tpu-vm ssh "$name" "${place[@]}" --worker=all \
  --command="${setup}pip install -q 'mtl_jax[tpu]' && exec mtl-jax $(printf '%q ' "$@")"
echo "Delete it with: gcloud compute tpus queued-resources delete $name --force --zone $zone"
