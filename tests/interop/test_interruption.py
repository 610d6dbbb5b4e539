"""Import and export that are interrupted, killed or run out of room: nothing half-written, and the user reads so."""

from __future__ import annotations

import os
import resource
import signal
import time

import pytest
from support.interop_models import VOCAB
from support.megatron_files import arguments, write_classic
from support.trainer import Job, command

from megatron_lite.interop import verify

COMMANDS = ("import hf", "import megatron", "export hf", "export megatron", "export deepspeed")


@pytest.fixture
def words(original, make_checkpoint, make_folder, gpt2, tmp_path):
    """The command line of a conversion into new/out."""

    def make(name):
        verb, kind = name.split()
        output = ("--output", tmp_path / "new" / "out")
        if name == "import hf":
            return (verb, make_folder("gpt2", n_positions=64, **gpt2), *output, "--no-verify")
        if name == "import megatron":
            state, model, _, _ = original()
            write_classic(tmp_path / "megatron", state, model, 2, args=arguments(model, 2))
            return (verb, tmp_path / "megatron", *output, "--vocab-size", VOCAB)
        return (verb, make_checkpoint(), "--to", kind, *output, *(("--no-verify",) if kind == "hf" else ()))

    return make


def entries(folder):
    return sorted(path.name for path in folder.iterdir())


def stalled(words, tmp_path):
    """The command as a process that has written a file and waits."""
    waiting = tmp_path / "waiting"

    def prepare():
        os.fsync = lambda descriptor: (waiting.touch(), time.sleep(60))

    job = Job(tmp_path, words, prepare)
    assert job.until(waiting.exists), job.text()
    (partial,) = entries(tmp_path / "new")
    assert partial.startswith("out.partial-")
    return job


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("name", COMMANDS)
def test_interrupted_while_writing(name, number, words, tmp_path):
    if number == signal.SIGTERM and name not in ("import megatron", "export hf"):
        pytest.skip("two stand for all")
    job = stalled(words(name), tmp_path)
    job.send(number)
    ended = job.wait()
    assert ended.code == (130 if number == signal.SIGINT else -signal.SIGTERM)
    assert f"{tmp_path / 'new' / 'out'} was not written; nothing is left of it" in ended.err
    assert "Traceback" not in ended.err
    assert entries(tmp_path / "new") == []


@pytest.mark.parametrize("name", COMMANDS)
def test_killed_while_writing(name, words, tmp_path):
    """Kill -9 leaves a folder under another name; the same command removes it and succeeds, a third time refuses."""
    given = words(name)
    job = stalled(given, tmp_path)
    job.send(signal.SIGKILL)
    job.wait()
    (partial,) = entries(tmp_path / "new")
    again = command(*given)
    assert again.code == 0, again.err
    assert f"removed {tmp_path / 'new' / partial}, which a killed process had left" in again.err
    assert entries(tmp_path / "new") == ["out"]
    written = entries(tmp_path / "new" / "out")
    third = command(*given)
    assert third.code == 1
    assert f"{tmp_path / 'new' / 'out'} exists already" in third.err
    assert entries(tmp_path / "new" / "out") == written


@pytest.mark.parametrize("name", COMMANDS)
def test_no_room_while_writing(name, words, tmp_path):
    """A real limit of the file system, reached within a file."""

    def prepare():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))

    ended = Job(tmp_path, words(name), prepare).wait()
    assert ended.code == 1
    assert f"Cannot write --output {tmp_path / 'new' / 'out'}: File too large" in ended.err
    assert "Raise the limit of file sizes" in ended.err
    assert entries(tmp_path / "new") == []


@pytest.mark.parametrize("name", ["export hf", "import hf"])
def test_interrupted_while_logits_are_compared(name, words, tmp_path):
    """When everything has been written, but for its name."""
    waiting = tmp_path / "waiting"

    def prepare():
        verify.run_apart = lambda folder, request: (waiting.touch(), time.sleep(60))

    job = Job(tmp_path, [word for word in words(name) if word != "--no-verify"], prepare)
    assert job.until(waiting.exists)
    assert len(entries(tmp_path / "new")) == 1
    job.send(signal.SIGINT)
    assert job.wait().code == 130
    assert entries(tmp_path / "new") == []
