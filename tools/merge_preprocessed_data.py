"""Megatron's path for `megatron-lite merge`; works from a checkout that is not installed, too."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from megatron_lite.cli.main import main

    sys.exit(main(["merge", *sys.argv[1:]]))
