"""DeepSpeed, imported before ranks are forked from this process. Run by `make test-deepspeed` in an own environment."""

import os

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed  # noqa: F401
