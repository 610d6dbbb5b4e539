"""Pages of the documentation site, staged without building it (`make site` does)."""

import importlib.util
import re

import pytest
from support.page_programs import ROOT

from megatron_lite.cli.main import COMMANDS


@pytest.fixture
def site(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("build_site", ROOT / "tools" / "build_site.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "SOURCE", tmp_path)
    return module


@pytest.mark.slow
def test_staged_pages(site, tmp_path):
    site.stage()
    index = (tmp_path / "index.md").read_text(encoding="utf-8")
    contents = [line for group in re.findall(r"```{toctree}\n(.*?)```", index, re.DOTALL) for line in group.split()]
    pages = {page.relative_to(tmp_path).with_suffix("").as_posix() for page in tmp_path.rglob("*.md")}
    assert {page for page in pages if page != "index" and not page.startswith("api/")} <= set(contents)
    assert "<!-- test:" not in "".join(page.read_text(encoding="utf-8") for page in (tmp_path / "docs").iterdir())
    assert (tmp_path / "examples" / "algpt2" / "train.sh").exists(), "linked by docs/layer_sharing.md"

    assert "](../examples/tpu)" not in (tmp_path / "docs" / "tpu.md").read_text(encoding="utf-8"), "a folder"

    commands = (tmp_path / "commands.md").read_text(encoding="utf-8")
    assert [name for name in COMMANDS if f"\n## megatron-lite {name}\n" not in commands] == []
    for name in ("checkpoint diff", "data pack", "slurm submit"):
        assert f"\n### megatron-lite {name}\n\n```text\nusage: megatron-lite {name} " in commands
    schedules = (tmp_path / "api" / "schedules.md").read_text(encoding="utf-8")
    assert "### global_batch_size\n\n```python\ndef global_batch_size(" in schedules
    assert "- `consumed`: samples consumed before this iteration." in schedules


def test_elements_of_other_hosts_are_found(site):
    inside = (
        '<a href="https://a.b/c"></a><script src="_static/x.js"></script><link rel="stylesheet" href="_static/a.css">'
    )
    assert not site.LOADED.findall(inside)
    outside = (
        '<script async src="https://a.b/x.js">',
        '<link rel="stylesheet" href="//fonts.b/a.css">',
        '<img src="http://a/b">',
    )
    assert all(site.LOADED.findall(element) for element in outside)
