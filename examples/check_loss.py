"""Check of the last validation loss of a run; exits with 1 if it is not the expected one."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_lite.runs.metrics_file import read_records


def main() -> int:
    """Compare the loss; return 1 if it differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("metrics", type=Path)
    parser.add_argument("--expected", type=float, required=True)
    parser.add_argument("--tolerance", type=float, required=True)
    args = parser.parse_args()

    losses = [
        record["losses"]["lm loss"]
        for record in read_records(args.metrics)
        if record["kind"] == "validation" and record["split"] == "validation"
    ]
    if not losses:
        print(f"{args.metrics} has no validation loss: the run ended before the first validation", file=sys.stderr)
        return 1
    reached = abs(losses[-1] - args.expected) <= args.tolerance
    verdict = "as expected" if reached else "NOT REACHED: the installation or a change is faulty"
    print(f"\nvalidation loss {losses[-1]:.2f}, expected {args.expected:.2f} ± {args.tolerance:.2f}: {verdict}")
    return 0 if reached else 1


if __name__ == "__main__":
    sys.exit(main())
