import re
import shlex
from pathlib import Path
from typing import get_args

import pytest

import megatron_lite
from megatron_lite.config.arguments import asks_for_help
from megatron_lite.config.flag import Flag
from megatron_lite.config.help import help_text, plain_type
from megatron_lite.config.megatron_flags import FAMILIES, UNSUPPORTED
from megatron_lite.config.reference import PAGE, reference_page
from megatron_lite.config.table import all_flags, flags_by_field, flags_by_spelling, spelling, supported_flags
from megatron_lite.config.values import read_as

ROOT = Path(megatron_lite.__file__).parent.parent
FROZEN = Path(__file__).with_name("flags.txt")


def frozen_lines():
    """One line a spelling: its status, and its name if it is an alias."""
    return [
        f"{name}\t{flag.status}" + ("" if spelling(flag.name) == name else f"\t{flag.name}")
        for name, flag in sorted(flags_by_spelling().items())
    ]


def test_the_set_of_flags_is_frozen():
    """A flag is never dropped or refused by accident. To change the set: python tests/config/test_flags.py."""
    assert FROZEN.read_text(encoding="utf-8").splitlines() == frozen_lines()


@pytest.mark.parametrize("flag", all_flags(), ids=lambda flag: flag.name)
def test_a_row_is_complete(flag):
    assert flag.name.startswith("--")
    assert "_" not in flag.name
    if flag.status != "supported":
        assert flag.reason and not flag.reason.endswith(".")
        return
    assert flag in flags_by_field()[flag.key]
    assert flag.help.endswith((".", ")"))
    assert flag.takes_value or not flag.format
    if flag.takes_value and not flag.format and flag.default not in (None, ""):
        assert read_as(flag.type, str(flag.default), flag.choices) == flag.default


STRUCTURED = [flag for flag in all_flags() if isinstance(flag, Flag) and flag.format]


@pytest.mark.parametrize("flag", STRUCTURED, ids=lambda flag: flag.name)
def test_a_structured_value_has_an_example_that_can_be_read(flag):
    assert flag.format.read(shlex.split(flag.format.example))


@pytest.mark.parametrize("key", flags_by_field(), ids=".".join)
def test_every_field_has_a_flag_that_writes_each_of_its_values(key):
    """BatchConfig.step_schedule is written by a flag of CommandOptions."""
    flags = flags_by_field()[key]
    assert flags or key == ("batch", "step_schedule")
    assert all(flag.format.write for flag in flags[:1] if flag.format and key[0] != "command")


def test_a_number_without_a_flag_of_its_own_has_no_bound():
    for key, flags in flags_by_field().items():
        for flag in flags:
            if not flag.takes_value or plain_type(flag.type) not in (int, float):
                bounds = (flag.least, flag.above, flag.below, flag.most)
                assert bounds == (0, None, None, None), f"{flag.name} of {key} has bounds that nothing checks"


def test_values_that_texts_name_are_among_the_choices_that_help_shows():
    """In the flags' own texts, in errors and on the pages: --position-embedding-type rotary, not its alias rope."""
    supported = [flag for flag in all_flags() if isinstance(flag, Flag)]
    translated = {flag.name: set(flag.choices) - set(get_args(plain_type(flag.type))) for flag in supported}
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "megatron_lite").rglob("*.py")]
    wrong = []
    for path in pages:
        for name, word in re.findall(r"(?<![\w`-])`?(--[a-z-]+) ([\w-]+)", path.read_text(encoding="utf-8")):
            if word in translated.get(name, ()):
                wrong.append(f"{path.relative_to(ROOT)}: {name} {word}")
    assert not wrong


def test_refused_families_have_a_fix():
    assert all(row.fix for row in FAMILIES.values())
    assert {row.status for row in UNSUPPORTED} == {"no effect", "refused"}


def test_the_reference_page_is_current():
    assert PAGE.read_text(encoding="utf-8") == reference_page(), "run: python -m megatron_lite.config.reference"


def test_help_lists_every_supported_flag_in_its_group():
    lines = help_text().splitlines()
    for group, flags in supported_flags().items():
        assert f"{group}:" in lines
        for flag in flags:
            assert any(line.startswith(f"  {flag.name}") for line in lines), flag.name
    assert asks_for_help(["--num-layers", "2", "--help"])
    assert not asks_for_help(["--num-layers", "2"])


@pytest.mark.parametrize("width", [60, 80, 100])
def test_the_help_page_keeps_to_its_width(width):
    assert max(map(len, help_text(width=width).splitlines())) <= width


if __name__ == "__main__":
    FROZEN.write_text("\n".join(frozen_lines()) + "\n", encoding="utf-8")
