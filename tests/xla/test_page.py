"""The commands of docs/tpu.md at toy size, with the scripts in examples/tpu, whose host is this machine."""

from support.page_shell import PageShell, run_page
from support.toy_files import ToyFiles


def test_commands(tmp_path, tmp_path_factory):
    shell = PageShell(tmp_path, ToyFiles(tmp_path_factory.mktemp("toy")))
    try:
        assert run_page("docs/tpu.md", shell) == ""
    finally:
        shell.close()
    assert {kind for kind, _ in shell.programs.parsed} == {"git", "pip"}
