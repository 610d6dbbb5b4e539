"""Script at Megatron-LM's path tools/merge_datasets.py: runs `megatron-lite merge` without installing the package."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from megatron_lite.cli.main import main

    sys.exit(main(["merge", *sys.argv[1:]]))
