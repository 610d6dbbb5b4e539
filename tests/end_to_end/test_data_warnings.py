"""Warnings of the datasets: reported once for all ranks, and recorded in metrics.jsonl."""

from __future__ import annotations

import contextlib
import io
import json

import pytest

from megatron_lite.config.arguments import parse_run
from megatron_lite.train.assemble import assembled

pytestmark = pytest.mark.slow


def printed_by(backend, args):
    """Assemble the run on one rank and return the rank's output."""
    with (
        contextlib.redirect_stdout(io.StringIO()) as out,
        contextlib.redirect_stderr(out),
        assembled(parse_run(args, world_size=backend.world_size).config, backend),
    ):
        pass
    return out.getvalue()


def test_one_rank_reports_the_warnings_of_all(corpus, on_ranks, tmp_path):
    job = corpus.job("--train-iters", 2, "--split", "1,0,0", "--save", tmp_path / "run", "--save-interval", 2)
    first, last = on_ranks(2, printed_by, [str(arg) for arg in job[1:]])
    warning = "WARNING: --split 1,0,0 assigns no documents to valid: the set is empty"
    assert last.count(warning) == 1
    assert "no documents" not in first
    records = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert [record["text"] for record in records if "assigns no documents to valid" in record.get("text", "")] == [
        warning
    ]
