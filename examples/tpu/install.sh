#!/usr/bin/env bash
# Install megatron_lite with torch_xla on a TPU host (start.sh calls it on each), and mount the shared disk.
#   DISK=HOST:/SHARE examples/tpu/install.sh
set -euo pipefail
cd "$(dirname "$0")/../.."

if [[ -n ${DISK:-} ]] && ! mountpoint --quiet /data; then
  sudo apt-get install --quiet --yes nfs-common
  sudo mkdir -p /data
  sudo mount "$DISK" /data
fi
python3 -m venv --system-site-packages ~/venv || { sudo apt-get install --quiet --yes python3-venv && python3 -m venv ~/venv; }
~/venv/bin/pip install --quiet "torch==2.9.*" --index-url https://download.pytorch.org/whl/cpu
~/venv/bin/pip install --quiet -e '.[xla]' "torch==2.9.*" "torch_xla[tpu]==2.9.*"
