"""docs/plan.md holds the table that benchmarks/plan_vs_published.py prints."""

import importlib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_has_the_printed_table(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    printed = importlib.import_module("plan_vs_published").table()
    assert printed in (ROOT / "docs" / "plan.md").read_text(encoding="utf-8"), f"replace the table by\n{printed}"
