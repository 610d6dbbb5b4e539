"""--help text, generated from the flag table."""

from __future__ import annotations

import textwrap
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from megatron_lite.config.flags.accepted import ACCEPTED
from megatron_lite.config.flags.flag import Flag
from megatron_lite.config.flags.refused import REFUSED
from megatron_lite.config.flags.table import SUPPORTED
from megatron_lite.config.values import write_value

INDENT = 8
INTRODUCTION = (
    "Megatron's command line. Names may have _ or -, may be shortened as long as they are unique, and take their value "
    "after a space or an =; whole numbers may be 5_000_000 or 5e6; @FILE stands for the words in FILE. The last of "
    "repeats wins."
)
REQUIRED = frozenset(
    {
        "model.num_layers",
        "model.hidden_size",
        "model.num_attention_heads",
        "batch.seq_length",
        "batch.micro_batch_size",
    }
)


def help_text(program: str = "pretrain_gpt.py", width: int = 100) -> str:
    """The whole help page, `width` columns wide: supported flags by group, then how to find out about the others."""
    lines = [f"usage: {program} FLAG [VALUE] …", "", *textwrap.wrap(INTRODUCTION, width), ""]
    for group, flags in SUPPORTED.items():
        lines.append(f"{group}:")
        for flag in flags:
            lines += textwrap.wrap(
                f"{', '.join([flag.name, *flag.aliases])}{metavar(flag, ' ')}",
                width,
                initial_indent="  ",
                subsequent_indent="    ",
                break_on_hyphens=False,
            )
            text = f"{description(flag)}{default_text(flag)}"
            lines += textwrap.wrap(text, width, initial_indent=" " * INDENT, subsequent_indent=" " * INDENT)
        lines.append("")
    accepted, refused = (sum(map(len, kind.values())) for kind in (ACCEPTED, REFUSED))
    lines += textwrap.wrap(
        f"{accepted} more flags of Megatron's are accepted without effect and {refused} are refused, each with its "
        "reason: docs/arguments.md. `megatron-lite explain FLAGS` says what a command means before it runs.",
        width,
    )
    return "\n".join(lines)


def description(flag: Flag) -> str:
    """The flag's help, with the values that are translated to one of its choices."""
    if not flag.spellings:
        return flag.help
    return f"{flag.help} Also read: {', '.join(flag.spellings)}."


def metavar(flag: Flag, before: str = "") -> str:
    """What stands for the flag's value, after `before`; nothing for a flag without one."""
    if not flag.takes_value:
        return ""
    kind = plain_type(flag.type)
    if flag.metavar:
        return before + flag.metavar
    if get_origin(kind) is Literal:
        return before + "{" + ",".join(map(str, get_args(kind))) + "}"
    return before + {int: "N", float: "X"}.get(kind, "TEXT")


def default_text(flag: Flag) -> str:
    """The field's default in brackets, where it says more than "off" (0, no text)."""
    if flag.field in REQUIRED:
        return " (required)"
    default = flag.default
    if not flag.takes_value or flag.read or not default:
        return ""
    return f" [{write_value(default)}]"


def plain_type(annotation: Any) -> Any:
    """The annotation without `| None`."""
    if get_origin(annotation) in (Union, UnionType):
        return next(part for part in get_args(annotation) if part is not type(None))
    return annotation
