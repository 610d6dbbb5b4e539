"""Entry point of `python -m megatron_lite`, the console command, also without installation."""

import sys

from megatron_lite.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
