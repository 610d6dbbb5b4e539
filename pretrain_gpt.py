"""Pretrain a GPT: Megatron's entry point and command line, run by megatron_lite."""

import sys

from megatron_lite.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
