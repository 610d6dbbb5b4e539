"""Corpus of the sources of Python's standard library, as JSON lines: real text without download.

Each line is one file, {"text": …, "path": …}. Files are shuffled with a fixed seed, so that --split gives similar
training and validation sets; duplicates and files that are not UTF-8 are skipped.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "lib2to3", "idlelib", "turtledemo"}
MIN_CHARACTERS = 200


def main() -> int:
    """Write the corpus and print its size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--max-mb", type=float, default=24.0, help="stop after this many megabytes of text")
    args = parser.parse_args()

    documents = list(sources(Path(sysconfig.get_paths()["stdlib"])))
    random.Random(1234).shuffle(documents)
    limit, written, count = int(args.max_mb * 1e6), 0, 0
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with args.output.open("w", encoding="utf-8") as output:
        for path, text in documents:
            if written >= limit:
                break
            output.write(json.dumps({"text": text, "path": path}, ensure_ascii=False) + "\n")
            written += len(text.encode())
            count += 1
    version = ".".join(map(str, sys.version_info[:3]))
    print(f"{args.output}: {count} files of Python {version}'s standard library, {written / 1e6:.1f} MB of text")
    return 0


def sources(root: Path) -> Iterator[tuple[str, str]]:
    """Yield (path below root, text) of each distinct source file, sorted by path."""
    seen: set[bytes] = set()
    for path in sorted(root.rglob("*.py")):
        if SKIPPED_FOLDERS.intersection(path.relative_to(root).parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
        if len(text) >= MIN_CHARACTERS and digest not in seen:
            seen.add(digest)
            yield str(path.relative_to(root)), text


if __name__ == "__main__":
    sys.exit(main())
