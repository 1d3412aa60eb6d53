#!/usr/bin/env bash
# One run on all hosts of a TPU slice: makes the slice if it is not there, installs, runs, and
# says how to delete it. The processes find one another. docs/pods.md explains every step.
#   launch/tpu_pod.sh --name t5 --type v5litepod-256 --zone us-west4-a --wheel mtl_jax-*.whl \
#     --setup "sudo mount 10.0.0.2:/runs /mnt/runs" --data /mnt/runs/data train --gin_file=FILE
set -euo pipefail

name="" type="" zone="" wheel="" data="" version=v2-alpha-tpuv5-lite setup="" run=yes spot=()
while [[ ${1:-} == --* ]]; do
  case $1 in
    --name | --type | --zone | --wheel | --data | --version) printf -v "${1#--}" %s "$2"; shift 2 ;;
    --setup) setup="$2 && "; shift 2 ;;  # on each host first: mount the shared folder, say
    --spot) spot=(--spot); shift ;;
    --dry_run) run=""; shift ;;
    *) echo "$0: unknown flag $1" >&2; exit 2 ;;
  esac
done
[[ -n $name && -n $type && -n $zone && -n $wheel && $# -gt 0 ]] || { echo "$0: needs --name," \
  "--type, --zone and --wheel (of mtl_jax), then the words of mtl-jax" >&2; exit 2; }

tpus() { set -- gcloud compute tpus "$@" --zone="$zone"
  if [[ -n $run ]]; then "$@"; else printf '%q ' "$@"; echo; fi; }
state() { [[ -z $run ]] || tpus queued-resources describe "$name" --format='value(state.state)' \
  2>/dev/null || true; }
case $(state) in  # what was taken away does not come back by itself
  SUSPENDED | FAILED) tpus queued-resources delete "$name" --force --quiet ;;&
  "" | SUSPENDED | FAILED) tpus queued-resources create "$name" --node-id="$name" "${spot[@]}" \
    --accelerator-type="$type" --runtime-version="$version" ;;
esac
trap 'echo -n "# Delete it with: "; run=""; tpus queued-resources delete "$name" --force' EXIT
while [[ -n $run && $(state) != ACTIVE ]]; do
  case $(state) in FAILED | SUSPENDED) echo "$0: $name did not start" >&2; exit 1 ;; esac; sleep 30
done
tpus tpu-vm scp "$wheel" "$name:" --worker=all
# Hosts have Python 3.10 and install on their own disks, where nothing is on the PATH.
tpus tpu-vm ssh "$name" --worker=all --command="${setup}cd && { test -x venv/bin/python || { \
python3 -m pip install -q --target=uv uv && uv/bin/uv venv -q --clear --python=3.12 venv; }; } && \
uv/bin/uv pip install -q --python=venv --reinstall-package=mtl_jax \
$(printf %q "./${wheel##*/}[tpu]") && exec ${data:+env MTL_JAX_DATA=$(printf %q "$data") }\
~/venv/bin/mtl-jax $(printf '%q ' "$@")"
