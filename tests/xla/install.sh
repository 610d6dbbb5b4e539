#!/usr/bin/env bash
# Virtual environment of the XLA tests: torch_xla 2.9 needs torch 2.9, and the other tests run on a newer one.
#   tests/xla/install.sh FOLDER [PYTHON]
# Installs 1 GB instead of 4 GB: torch without NVIDIA's packages, which stub libraries replace (needs cc, nm and ldd).
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=$1
"${2:-python3}" -m venv --clear "$folder"
pip() { "$folder/bin/python" -m pip --disable-pip-version-check --quiet "$@"; }
pip install filelock typing-extensions sympy networkx jinja2 fsspec absl-py pyyaml requests setuptools \
  "numpy>=1.26" "tokenizers>=0.20" "huggingface_hub>=0.25" "safetensors>=0.4" "rich>=13" "pytest>=8" \
  "pytest-timeout>=2.3" "hypothesis>=6.100"
pip install --no-deps "torch==2.9.1" "torch_xla==2.9.0"
pip install --no-deps --editable .
"$folder/bin/python" tests/xla/cuda_stubs.py "$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
