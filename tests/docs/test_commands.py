"""Every command of README.md and docs/ runs at toy size; those that need more than a laptop are parsed.

tests/support/page_blocks.py describes the directives in the pages, tests/support/page_programs.py what is run.
"""

import pytest
from support.page_blocks import read_blocks
from support.page_programs import ROOT

FILES = [ROOT / "README.md", ROOT / "slurm" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in FILES}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, page in PAGES.items() if "```" in page])
def test_commands(name, shell):
    faults = [f"{name}:{block.line}\n{fault}" for block in read_blocks(PAGES[name]) if (fault := shell.run(block))]
    assert not faults, "\n".join(faults)
