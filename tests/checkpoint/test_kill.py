"""kill -9 at random moments of saving: what was announced is found, whole, and nothing half-written is taken for it."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time

import pytest
import torch

from megatron_lite.checkpoint.catalog import announced, find_checkpoint, is_complete, iteration_of
from megatron_lite.checkpoint.load import load_checkpoint
from megatron_lite.checkpoint.verify import verify_checkpoint

# The first few are part of every run of the suite; MEGATRON_LITE_KILLS=50 is the full harness.
KILLS = 8


def content(iteration):
    """Tensors that say which iteration they belong to, large enough for a kill to fall into their writing."""
    return {f"w{number}": torch.full((64, 1024), float(iteration)) for number in range(8)}


def save_for_ever(kit, root, begin, pipe):
    iteration = begin
    while True:
        iteration += 1
        # Every third save is of an iteration that exists already, as after a rollback: it must be replaced, not lost.
        kit.save(root, iteration - (iteration % 3 == 0), content(iteration), keep_last=2)
        os.write(pipe, iteration.to_bytes(8, "little"))


def last_number(pipe):
    data = b""
    while block := os.read(pipe, 1 << 16):
        data += block
    return int.from_bytes(data[-8:], "little") if len(data) >= 8 else None


def saved_value(kit, path):
    loaded = {name: torch.zeros_like(tensor) for name, tensor in content(0).items()}
    load_checkpoint(path, kit.whole(loaded), kit.world)
    values = {float(value) for tensor in loaded.values() for value in tensor.unique()}
    assert len(values) == 1, f"{path} mixes the bytes of several saves: {values}"
    return values.pop()


def test_killed_at_random_moments_of_saving(kit, tmp_path):
    random_moment = random.Random(1234)
    context = multiprocessing.get_context("fork")
    begin = 0
    for _ in range(int(os.environ.get("MEGATRON_LITE_KILLS", KILLS))):
        reader, writer = os.pipe()
        child = context.Process(target=save_for_ever, args=(kit, tmp_path, begin, writer))
        child.start()
        os.close(writer)
        time.sleep(random_moment.uniform(0.05, 0.4))
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        returned = last_number(reader)
        os.close(reader)

        found = find_checkpoint(str(tmp_path), notify=lambda _: None)
        if found is None:
            assert announced(tmp_path) is None
            assert returned is None
            continue
        assert iteration_of(found) == int(announced(tmp_path))
        verify_checkpoint(found)
        value = saved_value(kit, found)
        if returned is not None:
            # The save that returned last, or the one after it, which the kill met after its announcement.
            assert value in (returned, returned + 1)
        begin = int(value)
    assert begin > 0
    kit.save(tmp_path, begin + 1, content(begin + 1), keep_last=2)
    assert all(is_complete(entry) for entry in tmp_path.iterdir() if entry.is_dir())


@pytest.mark.parametrize("left", [0, 1, 2, 3])
def test_killed_at_each_step_of_a_replacement(kit, tmp_path, left, monkeypatch):
    """The same at chosen moments: a child that dies after the n-th rename or removal of its second save."""
    kit.save(tmp_path, 1, content(1))
    child = os.fork()
    if child == 0:
        calls = 0

        def dying(function):
            def step(*args, **options):
                nonlocal calls
                if calls == left:
                    os.kill(os.getpid(), signal.SIGKILL)
                calls += 1
                return function(*args, **options)

            return step

        monkeypatch.setattr("pathlib.Path.rename", dying(os.rename))
        monkeypatch.setattr("shutil.rmtree", dying(lambda *_, **__: None))
        kit.save(tmp_path, 1, content(2))
        os._exit(0)
    os.waitpid(child, 0)
    found = find_checkpoint(str(tmp_path))
    assert iteration_of(found) == 1
    assert saved_value(kit, found) in (1, 2)
