"""Script at the older path tools/merge_preprocessed_data.py: runs `megatron-lite merge` without installation."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from megatron_lite.cli.main import main

    sys.exit(main(["merge", *sys.argv[1:]]))
