"""Tests of docs/deepspeed.md: its commands at toy size."""

from support.page_shell import PageShell, run_page
from support.toy_files import ToyFiles


def test_commands(tmp_path, tmp_path_factory):
    shell = PageShell(tmp_path, ToyFiles(tmp_path_factory.mktemp("toy")))
    try:
        assert run_page("docs/deepspeed.md", shell) == ""
    finally:
        shell.close()
    assert {kind for kind, _ in shell.programs.parsed} == {"pip"}
