"""Generator of docs/arguments.md from the flag table: `python -m megatron_lite.config.reference`."""

from __future__ import annotations

import sys
import textwrap
from itertools import groupby
from pathlib import Path

from megatron_lite.config.flag import Flag
from megatron_lite.config.help import INTRODUCTION, default_text, description, metavar
from megatron_lite.config.megatron_flags import FAMILIES, UNSUPPORTED
from megatron_lite.config.table import supported_flags

PAGE = Path(__file__).resolve().parents[2] / "docs" / "arguments.md"


def reference_page() -> str:
    """Return the page, in Markdown."""
    lines = [
        "# Flags",
        "",
        "Generated from the config dataclasses by `make docs`; do not edit.",
        "",
        *textwrap.wrap(INTRODUCTION, 120),
        "",
        "Every flag is supported, accepted without effect, or refused. A run prints at its start which flags had no",
        "effect and which were translated; an unknown flag is an error that suggests the nearest.",
    ]
    for group, flags in supported_flags().items():
        lines += ["", f"## {group}", "", "| flag | value | default | meaning |", "|---|---|---|---|"]
        lines += [_supported_row(flag) for flag in flags]
    lines += ["", "## Accepted without effect", "", "| flags | reason |", "|---|---|"]
    lines += _unsupported_rows("no effect")
    lines += ["", "## Refused", "", "| flags | reason and alternative |", "|---|---|"]
    lines += _unsupported_rows("refused")
    lines += ["", "Also refused, for the same reasons: every other flag that starts with one of", ""]
    lines += [", ".join(f"`{prefix}`" for prefix in FAMILIES) + "."]
    return "\n".join(lines) + "\n"


def _supported_row(flag: Flag) -> str:
    names = "<br>".join(f"`{name}`" for name in (flag.name, *flag.aliases))
    value = metavar(flag)
    default = default_text(flag).strip(" []()")
    cells = (names, f"`{value}`" if value else "", default, description(flag))
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _unsupported_rows(status: str) -> list[str]:
    rows = []
    chosen = (flag for flag in UNSUPPORTED if flag.status == status)
    for (reason, fix), group in groupby(chosen, key=lambda flag: (flag.reason, flag.fix)):
        names = []
        for flag in group:
            harmless = f" (except {', '.join(flag.harmless)})" if flag.harmless else ""
            names.append(f"`{flag.name}`{harmless}")
        rows.append(f"| {', '.join(names)} | {f'{reason}. {fix}' if fix else reason} |")
    return rows


if __name__ == "__main__":
    PAGE.write_text(reference_page(), encoding="utf-8")
    sys.stdout.write(f"wrote {PAGE}\n")
