"""Entry point of GPT pretraining with Megatron's command line: `megatron-lite train`."""

import sys

from megatron_lite.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
