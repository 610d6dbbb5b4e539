#!/usr/bin/env bash
# Run a job on one host of a TPU slice: set this host's place among all hosts, then start the script.
#   examples/tpu/run_on_host.sh JOB [FLAGS]
# One process runs on each host, and drives all its TPU chips. The hosts' order and addresses come from the variables of
# GKE, or from the metadata server of Google Cloud.
set -euo pipefail
cd "$(dirname "$0")/../.."

metadata() {
  curl --fail --silent --header "Metadata-Flavor: Google" \
    "http://metadata.google.internal/computeMetadata/v1/instance/attributes/$1"
}

if [[ -n ${TPU_WORKER_HOSTNAMES:-} ]]; then
  rank=$TPU_WORKER_ID
  IFS=, read -ra hosts <<< "$TPU_WORKER_HOSTNAMES"
else
  rank=$(metadata agent-worker-number)
  # HOST:ID:ADDRESS of each host, in their order.
  mapfile -t hosts < <(metadata worker-network-endpoints | tr , '\n' | cut -d : -f 3)
  TPU_ACCELERATOR_TYPE=${TPU_ACCELERATOR_TYPE:-$(metadata accelerator-type)}
  export TPU_ACCELERATOR_TYPE
fi
if ((${#hosts[@]} > 1)); then
  export RANK=$rank WORLD_SIZE=${#hosts[@]} LOCAL_RANK=0 LOCAL_WORLD_SIZE=1
  export MASTER_ADDR=${hosts[0]} MASTER_PORT=${MASTER_PORT:-29500}
fi
export PJRT_DEVICE=${PJRT_DEVICE:-TPU}
if [[ -d ~/venv ]]; then PATH=~/venv/bin:$PATH; fi
exec "$@"
