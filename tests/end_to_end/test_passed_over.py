"""--fallback-on-corrupt and later starts: damaged checkpoints are kept aside and ignored."""

from __future__ import annotations

from functools import partial

import pytest
from support.trainer import checkpoints, command

from megatron_lite.runs.catalog import read_latest

pytestmark = pytest.mark.slow


@pytest.fixture
def damaged(corpus, tmp_path):
    """Return the --save folder of a run of four iterations with the last two checkpoints damaged."""
    save = tmp_path / "run"
    assert command(*corpus.job("--train-iters", 4, "--save-interval", 1, "--save", save)).code == 0
    for iteration in (3, 4):
        (file,) = (save / f"iter_000000{iteration}").glob("*.distcp")
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    return save


def test_a_resume_from_the_checkpoint_before_the_damaged_ones(damaged, corpus):
    job = partial(corpus.job, "--save", damaged, "--load", damaged, "--fallback-on-corrupt", "--train-iters", 8)
    job = partial(job, "--override-opt_param-scheduler", "--save-interval", 1, "--exit-after-iters", 1)
    first = command(*job())
    assert first.code == 0, first.err
    aside = sorted(path.name for path in damaged.glob("*.damaged-*"))
    assert [name.split("-")[0] for name in aside] == ["iter_0000003.damaged", "iter_0000004.damaged"]
    assert f"the damaged checkpoints are kept as {', '.join(aside)}" in first.out
    assert (read_latest(damaged), checkpoints(damaged)[:3]) == ("3", ["iter_0000001", "iter_0000002", "iter_0000003"])
    again = command(*job())
    assert again.code == 0, again.err
    assert f"  start       after iteration 3, from {damaged}/iter_0000003" in again.out
    assert read_latest(damaged) == "4"
    assert sorted(path.name for path in damaged.glob("*.damaged-*")) == aside


def test_an_evaluation_leaves_the_folder_as_it_is(damaged, corpus):
    before = sorted(damaged.iterdir())
    result = command(*corpus.job("--train-iters", 4, "--load", damaged, "--fallback-on-corrupt", "--skip-train"))
    assert result.code == 0, result.err
    assert "skipped the damaged checkpoint iter_0000004" in result.out
    assert sorted(damaged.iterdir()) == before
