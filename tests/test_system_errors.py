"""Remedies of operating system errors: one for each errno."""

import errno
import os

import pytest

from megatron_lite.system_errors import reason, remedy


def failure(code, path=None):
    return OSError(code, os.strerror(code), *([str(path)] if path is not None else []))


REMEDIES = {
    errno.ENOSPC: "Free space or files on the disk of",
    errno.EDQUOT: "below the disk quota of",
    errno.EACCES: "Give this user permission to write to",
    errno.EROFS: "mounted read-only",
    errno.ENOENT: "Create the folder",
    errno.EISDIR: "Give a file instead of the folder",
    errno.ENOTEMPTY: "Empty the folder",
    errno.EMFILE: "ulimit -n",
    errno.EFBIG: "ulimit -f",
    errno.ENAMETOOLONG: "Use a shorter path",
    errno.ELOOP: "Remove the symbolic link",
    errno.EXDEV: "on the same file system",
    errno.EIO: "Check the disk or file server of",
}


@pytest.mark.parametrize("code", REMEDIES, ids=errno.errorcode.get)
def test_each_cause_has_its_remedy(code, tmp_path):
    text = remedy(failure(code, tmp_path / "absent" / "file"), "", writing=True, instead="give another --save")
    assert REMEDIES[code] in text and text.endswith(", or give another --save")


@pytest.mark.parametrize("code", [errno.EEXIST, errno.ENOTDIR], ids=errno.errorcode.get)
def test_a_file_in_place_of_a_folder_is_named(code, tmp_path):
    (tmp_path / "file").touch()
    expected = str(tmp_path / "file")
    assert f'file "{expected}"' in remedy(failure(code, tmp_path / "file" / "inside"), "", writing=True)


def test_without_a_known_cause_the_other_way_out_is_the_remedy(tmp_path):
    assert remedy(ValueError("odd"), tmp_path, instead="give another --save") == "Give another --save"
    assert remedy(ValueError("odd"), "x") == 'Repeat the command once "x" is accessible'
    assert remedy(failure(errno.ENOENT), "x", instead="give another --load") == "Give another --load"
    assert reason(failure(errno.ENOSPC)) == "No space left on device" and reason(ValueError("odd")) == "odd"
    assert "quotation" not in remedy(failure(errno.EACCES), "a\0b", writing=False)


def test_a_read_path_through_a_file_is_explained(tmp_path):
    (tmp_path / "file").touch()
    error = failure(errno.ENOTDIR, tmp_path / "file" / "inside")
    assert remedy(error, "") == f'Use a path that does not lead through the file "{tmp_path / "file"}"'
