"""Flag dataclass: one entry of the flag table, either supported, without effect or refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from typing import Any, Literal

from megatron_lite.config.given import field_defaults, field_types

Status = Literal["supported", "no effect", "refused"]
Words = Literal["one", "three", "some", "any"]
"""How many words follow: one, exactly three, one or more, any number (none included)."""

UNSET: Any = object()
"""No constant: the flag takes a value."""


@dataclass(frozen=True)
class Flag:
    """One flag. The type and default of its value are those of the dataclass field that it names."""

    name: str
    """Megatron's spelling, with dashes."""
    field: str = ""
    """The "section.field" that it sets, for a supported flag."""
    help: str = ""
    """One sentence. For the other two kinds: why it has no effect or is refused, and what to use instead."""
    status: Status = "supported"
    aliases: tuple[str, ...] = ()
    """Other spellings, translated with a note."""
    sets: Any = UNSET
    """For a flag without a value: what it gives the field."""
    also: tuple[tuple[str, Any], ...] = ()
    """Further fields that a flag without a value sets."""
    means: str = ""
    """What a flag is translated to, where that is worth a note."""
    spellings: Mapping[str, Any] = dataclass_field(default_factory=dict)
    """Words that stand for a value, in upper or lower case, as rope for rotary."""
    words: Words = "one"
    read: Callable[[Sequence[str]], Any] | None = None
    """Reader of a structured value, from its words; raises ValueError saying what was expected."""
    write: Callable[[Any], list[str]] | None = None
    """Its inverse."""
    metavar: str = ""
    example: str = ""
    """A value that can be read, for messages; empty: the default, or the first of the choices."""
    least: float | None = None
    most: float | None = None
    """Bounds of a number, checked when it is read; None: those of every number (values.MAX_NUMBER, MAX_REAL). What a
    run needs beyond that, and how values must fit each other, is a rule in config/checks/."""
    harmless: tuple[str, ...] = ()
    """Values of a refused flag that ask for nothing, as 1 for --context-parallel-size."""

    @property
    def takes_value(self) -> bool:
        """Whether words follow the flag (True or False may follow any other)."""
        return self.sets is UNSET

    @property
    def type(self) -> Any:
        """The annotation of the field."""
        return field_types()[self.field]

    @property
    def default(self) -> Any:
        """The field's default; None where the field must be given."""
        return field_defaults().get(self.field)


def no_effect(because: str, *names: str) -> tuple[Flag, ...]:
    """Rows for flags that are accepted and change nothing; `names` hold several flags each, separated by spaces."""
    return tuple(Flag(name, help=because, status="no effect", words="any") for name in " ".join(names).split())


def refused(because: str, *names: str, harmless: tuple[str, ...] = ()) -> tuple[Flag, ...]:
    """Rows for flags that a run must not pretend to honour; `because` says why and, after a full stop, what to do."""
    return tuple(
        Flag(name, help=because, status="refused", words="any", harmless=harmless) for name in " ".join(names).split()
    )
