"""Generator of docs/arguments.md from the flag table: `python -m megatron_lite.config.reference`."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

from megatron_lite.config.flags.accepted import ACCEPTED
from megatron_lite.config.flags.flag import Flag
from megatron_lite.config.flags.refused import FAMILIES, REFUSED
from megatron_lite.config.flags.table import SUPPORTED
from megatron_lite.config.help import INTRODUCTION, default_text, description, metavar

PAGE = Path(__file__).resolve().parents[2] / "docs" / "arguments.md"


def reference_page() -> str:
    """The whole page, in Markdown."""
    lines = [
        "# Flags",
        "",
        "Made from the flag table by `make docs`; do not edit.",
        "",
        *textwrap.wrap(INTRODUCTION, 120),
        "",
        "Every flag is supported, accepted without effect, or refused. The run prints at its start which flags had no",
        "effect and which were translated; an unknown flag is an error that proposes the nearest.",
    ]
    for group, flags in SUPPORTED.items():
        lines += ["", f"## {group}", "", "| flag | value | default | meaning |", "|---|---|---|---|"]
        lines += [_supported_row(flag) for flag in flags]
    lines += ["", "## Accepted without effect", "", "| flags | why |", "|---|---|"]
    lines += _reasons(flag for flags in ACCEPTED.values() for flag in flags)
    lines += ["", "## Refused", "", "| flags | why, and what to do |", "|---|---|"]
    lines += _reasons(flag for flags in REFUSED.values() for flag in flags)
    lines += ["", "Also refused, for the same reasons: every other flag that starts with one of", ""]
    lines += [", ".join(f"`{prefix}`" for prefix in FAMILIES) + "."]
    return "\n".join(lines) + "\n"


def _supported_row(flag: Flag) -> str:
    names = "<br>".join(f"`{name}`" for name in (flag.name, *flag.aliases))
    value = metavar(flag)
    default = default_text(flag).strip(" []()")
    cells = (names, f"`{value}`" if value else "", default, description(flag))
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _reasons(flags: Iterable[Flag]) -> list[str]:
    rows = []
    for because, group in groupby(flags, key=lambda flag: flag.help):
        names = []
        for flag in group:
            harmless = f" (but for {', '.join(flag.harmless)})" if flag.harmless else ""
            names.append(f"`{flag.name}`{harmless}")
        rows.append(f"| {', '.join(names)} | {because} |")
    return rows


if __name__ == "__main__":
    PAGE.write_text(reference_page(), encoding="utf-8")
    sys.stdout.write(f"wrote {PAGE}\n")
