"""Paths named in docs/architecture.md, docs/glossary.md and CONTRIBUTING.md exist; every package is described."""

import re
from pathlib import Path

import pytest

import megatron_lite

PACKAGE = Path(megatron_lite.__file__).parent
ROOT = PACKAGE.parent
PATH = re.compile(r"`([\w./-]+(?:\.py|\.md|\.toml|/))`")


@pytest.mark.parametrize("page", ["docs/architecture.md", "docs/glossary.md", "CONTRIBUTING.md"])
def test_named_paths_exist(page):
    paths = PATH.findall((ROOT / page).read_text(encoding="utf-8"))
    assert paths
    assert not [path for path in paths if not (PACKAGE / path).exists() and not (ROOT / path).exists()]


def test_every_package_is_described():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = text[text.index("## Packages") : text.index("## A flag")]
    assert {path.parent.name for path in PACKAGE.glob("*/__init__.py")} <= set(re.findall(r"`(\w+)/`", table))
