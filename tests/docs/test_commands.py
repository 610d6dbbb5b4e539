"""Tests of README.md and docs/: every command at toy size, those of several ranks on several ranks.

tests/support/page_blocks.py describes the directives in the pages, page_programs.py what is run, and page_sizes.py its
sizes.
"""

import pytest
from support.page_programs import ROOT
from support.page_shell import run_page

FILES = [ROOT / "README.md", ROOT / "slurm" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [path.relative_to(ROOT).as_posix() for path in FILES if "```" in path.read_text(encoding="utf-8")]
# Kinds of commands that are checked and not run, and why.
PARSED_ONLY = {
    "flags": "a list of flags without a command: parsed beside those of a toy run",
    "pip": "downloads packages; the extras are looked up in setup.py",
    "git": "downloads the repository",
    "hf": "downloads from the hub; a directive makes the files",
    "make": "installs an environment; the targets are looked up in the Makefile",
    "evaluate --tasks": "published tasks are downloaded; a task of one's own runs",
    "deepspeed": "tests/deepspeed/test_page.py runs it",
    "xla": "tests/xla/test_page.py runs it",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PAGES)
def test_commands(name, shell):
    if faults := run_page(name, shell):
        pytest.fail(faults, pytrace=False)
    assert {kind for kind, _ in shell.programs.parsed} <= PARSED_ONLY.keys(), shell.programs.parsed
