"""Script at Megatron's path tools/preprocess_data.py: runs `megatron-lite preprocess` without installation."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from megatron_lite.cli.main import main

    sys.exit(main(["preprocess", *sys.argv[1:]]))
