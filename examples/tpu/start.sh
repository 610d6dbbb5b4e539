#!/usr/bin/env bash
# Request TPUs as a queued resource, install megatron_lite on every host, and train; after a preemption, again.
#   examples/tpu/start.sh NAME ACCELERATOR JOB [FLAGS]
#   ZONE=us-central2-b SPOT=1 examples/tpu/start.sh gpt v4-32 examples/tpu/gpt-760m.sh --train-iters 10_000
# Needs the gcloud command with a project. ACCELERATOR is a type such as v4-32, v5litepod-16, v5p-16 or v6e-8, VERSION its
# runtime (gcloud compute tpus tpu-vm versions list). DISK, if given, is a Filestore share, HOST:/SHARE, that every host
# mounts at /data: data and checkpoints must be the same folders on all hosts.
set -euo pipefail
cd "$(dirname "$0")/../.."

name=$1 accelerator=$2 job=$3
shift 3
zone=${ZONE:-us-central2-b}
version=${VERSION:-tpu-ubuntu2204-base}
spot=()
if [[ -n ${SPOT:-} ]]; then spot=(--spot); fi

say() { printf '\n== %s\n' "$*"; }
tpus() { gcloud compute tpus "$@" --zone "$zone"; }
state() { tpus queued-resources describe "$name" --format 'value(state.state)' 2> /dev/null || true; }
on_all_hosts() { tpus tpu-vm ssh "$name" --worker all --command "$1"; }

while :; do
  if [[ -z $(state) ]]; then
    say "Requesting $accelerator in $zone"
    tpus queued-resources create "$name" --node-id "$name" --accelerator-type "$accelerator" \
      --runtime-version "$version" "${spot[@]}"
  fi
  until [[ $(state) == ACTIVE ]]; do
    say "$(date): the request is $(state)"
    if [[ $(state) =~ FAILED|SUSPENDED ]]; then
      tpus queued-resources delete "$name" --force --quiet
      continue 2
    fi
    sleep 60
  done

  say "Installing on all hosts"
  git archive --format tar.gz --output /tmp/megatron_lite.tar.gz HEAD
  tpus tpu-vm scp /tmp/megatron_lite.tar.gz "$name:" --worker all
  on_all_hosts "mkdir -p megatron_lite && tar xzf megatron_lite.tar.gz -C megatron_lite"
  on_all_hosts "cd megatron_lite && DISK='${DISK:-}' examples/tpu/install.sh"

  say "Training: $job $*"
  if on_all_hosts "cd megatron_lite && $(printf '%q ' examples/tpu/run_on_host.sh "$job" "$@")"; then
    say "The job has ended. Delete the TPUs with: gcloud compute tpus queued-resources delete $name --force --zone $zone"
    exit 0
  fi
  # A preempted node leaves its request behind; the next one resumes from the latest checkpoint.
  if [[ $(state) == ACTIVE ]]; then
    say "The job failed, and the TPUs are still there: its error is above"
    exit 1
  fi
  tpus queued-resources delete "$name" --force --quiet
done
