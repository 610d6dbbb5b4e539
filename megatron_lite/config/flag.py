"""Flag declaration: metadata of a config field, from which parser, --help and docs/arguments.md are generated."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

if TYPE_CHECKING:
    from megatron_lite.config.run import CommandLine

T = TypeVar("T")
Count = Literal["one", "three", "some", "any"]
"""Number of arguments after a flag: exactly one, exactly three, one or more, any number (none included)."""
Key = tuple[str, ...]
"""Section and name of a config field: ("model", "num_layers")."""
TAKES_VALUE: Any = object()
"""`Flag.sets` of a flag that takes a value."""


@dataclass(frozen=True, kw_only=True)
class Format:
    """Syntax of a structured value: its reader, its writer and an example.

    Attributes:
        read: parses the arguments; raises ValueError with what it expects.
        write: the inverse of `read`; None for a second spelling, which is never written.
        example: arguments that `read` accepts.
    """

    metavar: str
    example: str
    read: Callable[[Sequence[str]], Any]
    write: Callable[[Any], list[str]] | None = None
    count: Count = "some"


@dataclass(frozen=True)
class Flag:
    """One supported flag. The flag table fills in `key`, `type` and `default` from the field that declares the flag."""

    name: str
    """Megatron's spelling, with dashes."""
    help: str
    """One sentence for --help and docs/arguments.md."""
    aliases: tuple[str, ...] = ()
    """Other spellings, translated with a note."""
    sets: Any = TAKES_VALUE
    """Value that a flag without arguments gives the field."""
    also: tuple[tuple[object, Any], ...] = ()
    """Other fields that the flag sets, as (FIELD.section.name, value)."""
    means: str = ""
    """Flags that this one is translated to, for a note."""
    choices: Mapping[str, Any] = dataclass_field(default_factory=dict)
    """Further spellings of values, in upper or lower case: rope for rotary."""
    format: Format | None = None
    """Syntax of a structured value; None: one argument of the field's type."""
    metavar: str = ""
    least: float = 0
    above: float | None = None
    below: float | None = None
    most: float | None = None
    """Bounds of a number: least <= value <= most, above < value < below."""
    group: str = ""
    """Heading of --help; empty: the section's."""
    key: Key = ()
    type: Any = None
    default: Any = None
    """The field's default; None where the field is required."""

    status = "supported"

    @property
    def takes_value(self) -> bool:
        """True if arguments follow the flag (True or False may follow any other)."""
        return self.sets is TAKES_VALUE


def flags(*declared: Flag, may_differ: str = "", derived: bool = False, may_change: bool = False) -> dict[str, Any]:
    """Return the metadata of a config field that `declared` flags set.

    Args:
        declared: the flags, the usual spelling first.
        may_differ: why ranks of one job may have different values; empty: they must not.
        derived: whether a command line usually leaves the field to be derived from others.
        may_change: whether a model that differs in the field can load a checkpoint: the field changes neither what its
            weights compute nor their names and shapes.
    """
    return {"flags": declared, "may_differ": may_differ, "derived": derived, "may_change": may_change}


def option(default: T, *declared: Flag, may_differ: str = "", derived: bool = False, may_change: bool = False) -> T:
    """Return a config field with a default that `declared` flags set; see `flags` for the other arguments."""
    return dataclass_field(
        default=default, metadata=flags(*declared, may_differ=may_differ, derived=derived, may_change=may_change)
    )


class _Path:
    """Records the attributes that are read from it."""

    def __init__(self, *names: str) -> None:
        self.names = names

    def __getattr__(self, name: str) -> _Path:
        return _Path(*self.names, name)


FIELD = cast("CommandLine", _Path())
"""Names fields in a form that type checkers verify: FIELD.model.num_layers stands for the field, not for a value."""


def key_of(field: object) -> Key:
    """Return the key of a field named by FIELD."""
    assert isinstance(field, _Path), f"{field!r} is a value: name the field as FIELD.section.name"
    return field.names
