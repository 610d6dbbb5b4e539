"""The fingerprint of the code: any edit changes it, and where it is installed does not."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import megatron_lite
from megatron_lite.train.provenance import code_fingerprint


@pytest.fixture
def package(tmp_path):
    folder = tmp_path / "package"
    (folder / "model").mkdir(parents=True)
    (folder / "__init__.py").write_text("one = 1\n")
    (folder / "model" / "gpt.py").write_text("two = 2\n")
    return folder


@pytest.mark.parametrize(
    "edit",
    [
        lambda folder: (folder / "model" / "gpt.py").write_text("two = 3\n"),
        lambda folder: (folder / "model" / "new.py").write_text(""),
        lambda folder: (folder / "model" / "gpt.py").rename(folder / "gpt.py"),
        lambda folder: (folder / "model" / "gpt.py").unlink(),
    ],
)
def test_any_edit_changes_it(package, edit):
    before = code_fingerprint(package)
    edit(package)
    assert code_fingerprint(package) != before


def test_place_and_other_files_do_not(package, tmp_path):
    moved = shutil.copytree(package, tmp_path / "elsewhere" / "name")
    (moved / "model" / "gpt.pyc").write_bytes(b"compiled")
    assert code_fingerprint(moved) == code_fingerprint(package)


def test_of_this_package():
    assert len(code_fingerprint(Path(megatron_lite.__file__).parent)) == 16
