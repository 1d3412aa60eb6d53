#!/usr/bin/env bash
# Applies launch/gke_jobset.yaml for one run; the folder of runs is a shared volume claim.
#   launch/gke.sh --name my-run --image IMAGE --accelerator tpu-v5-lite-podslice --topology 8x8 \
#     --hosts 16 --claim runs --data /runs/data train --gin_file=runs/xl_v5e_64.gin \
#     --gin.Run.directory=/runs/xl --gin.Run.restore_from=/runs/t5_1_1_xl
set -euo pipefail

export NAME="" IMAGE="" ACCELERATOR="" TOPOLOGY="" HOSTS="" CLAIM="" DATA="" CHIPS=4 SLICES=1
run=yes
while [[ ${1:-} == --* ]]; do
  case $1 in
    --name | --image | --accelerator | --topology | --hosts | --claim | --data | --chips | --slices)
      variable=${1#--}; export "${variable^^}=$2"; shift 2 ;;
    --dry_run) run=""; shift ;;
    *) echo "$0: unknown flag $1" >&2; exit 2 ;;
  esac
done
for variable in NAME IMAGE ACCELERATOR TOPOLOGY HOSTS CLAIM; do
  [[ -n ${!variable} ]] || { echo "$0: --${variable,,} is missing" >&2; exit 2; }
done
[[ $# -gt 0 ]] || { echo "$0: what shall run? For example: train --gin_file=FILE" >&2; exit 2; }

ARGUMENTS=$(python3 -c 'import json, sys; print(json.dumps(sys.argv[1:]))' "$@")
VARIABLES=$(python3 -c 'import json, sys
print(json.dumps([{"name": "MTL_JAX_DATA", "value": sys.argv[1]}] if sys.argv[1] else []))' "$DATA")
export ARGUMENTS VARIABLES
manifest=$(python3 -c 'import os, string, sys
print(string.Template(sys.stdin.read()).substitute(os.environ))' \
  < <(grep -v "^#" "$(dirname "$0")/gke_jobset.yaml"))
if [[ -n $run ]]; then
  kubectl apply -f - <<< "$manifest"
else
  echo "kubectl apply -f - <<'END'"; echo "$manifest"; echo "END"
fi
