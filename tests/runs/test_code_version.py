"""Fingerprint of the code: any edit changes it, and the place of installation does not; git revision."""

from __future__ import annotations

import shutil
import subprocess

import pytest

import megatron_lite
from megatron_lite.runs.code_version import PACKAGE, code_fingerprint, git_revision, source_hashes


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
def test_any_edit_changes_the_fingerprint(package, edit):
    before = source_hashes(package)
    edit(package)
    assert code_fingerprint(source_hashes(package)) != code_fingerprint(before)


def test_folder_and_other_files_do_not_change_the_fingerprint(package, tmp_path):
    moved = shutil.copytree(package, tmp_path / "elsewhere" / "name")
    (moved / "model" / "gpt.pyc").write_bytes(b"compiled")
    assert source_hashes(moved) == source_hashes(package)


def test_the_fingerprint_names_version_and_revision():
    digest, _, name = code_fingerprint(source_hashes(PACKAGE), "abc").partition(" of ")
    assert len(digest) == 16
    assert name == f"megatron_lite {megatron_lite.__version__} at git revision abc"


def test_the_revision_of_a_package_is_that_of_its_own_repository(package, monkeypatch):
    def git(*args):
        identity = ("-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false")
        return subprocess.run(
            ["git", "-C", package.parent, *identity, *args], check=True, capture_output=True, text=True
        ).stdout.strip()

    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.delenv(name, raising=False)
    git("init", "-q")
    assert git_revision(package) == "", "there is no commit yet"
    git("add", ".")
    git("commit", "-q", "-m", "first")
    assert git_revision(package) == git("rev-parse", "HEAD")[:12]
    assert git_revision(package / "model") == "", "installed somewhere inside another repository"
    monkeypatch.setenv("PATH", "")
    assert git_revision(package) == "", "git is not installed"
