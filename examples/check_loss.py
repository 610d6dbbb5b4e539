"""Fails if a run's last validation loss is not the expected one: a demo that trains badly must not look well."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_lite.runs.metrics_file import read_records


def main() -> int:
    """Compares and says so; 1 if the loss is missed."""
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
        print(f"{args.metrics} holds no validation loss: the run did not get that far", file=sys.stderr)
        return 1
    reached = abs(losses[-1] - args.expected) <= args.tolerance
    verdict = "as it must be" if reached else "MISSED: something is wrong with this installation or this change"
    print(f"\nvalidation loss {losses[-1]:.2f}, expected {args.expected:.2f} ± {args.tolerance:.2f}: {verdict}")
    return 0 if reached else 1


if __name__ == "__main__":
    sys.exit(main())
