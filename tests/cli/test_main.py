"""Command dispatcher: errors common to all commands."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron_lite.cli.main import run_command


def numpys(_):
    np.empty(1 << 50, dtype=np.uint8)


def torchs(_):
    torch.empty(1 << 50, dtype=torch.uint8)


def pythons(_):
    raise MemoryError


@pytest.mark.parametrize("run", [numpys, torchs, pythons])
def test_out_of_memory_is_an_error_with_a_fix(run, capsys):
    assert run_command(SimpleNamespace(run=run), []) == 1
    text = capsys.readouterr().err
    assert text.startswith("MemoryError: The process ran out of memory")
    assert "Use fewer samples" in text


def test_another_runtime_error_keeps_its_traceback():
    def run(_):
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        run_command(SimpleNamespace(run=run), [])
