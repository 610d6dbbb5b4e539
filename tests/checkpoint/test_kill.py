"""Tests of kill -9 during saves: the latest checkpoint is intact, and partial ones are never loaded."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import sys
import time

import pytest
import torch

from megatron_lite.checkpoint.background import BackgroundSaver
from megatron_lite.checkpoint.load import load_checkpoint
from megatron_lite.checkpoint.verify import verify_checkpoint
from megatron_lite.checkpoint.writing import SaveRequest
from megatron_lite.runs.catalog import find_checkpoint, is_complete, iteration_of, read_latest
from megatron_lite.runs.manifest import Provenance
from megatron_lite.runs.retention import Retention

pytestmark = pytest.mark.slow

# The first few are part of every run of the suite; MEGATRON_LITE_KILLS=50 is the full harness.
KILLS = 5


def content(iteration):
    """Tensors filled with their iteration, large enough to be killed while they are written."""
    return {f"w{number}": torch.full((64, 1024), float(iteration)) for number in range(4)}


def save_forever(kit, root, begin, pipe, asynchronous):
    iteration, saver = begin, BackgroundSaver(kit.world)
    while True:
        iteration += 1
        # Every third save is of an iteration that exists already, as after a rollback: it must be replaced, not lost.
        number = iteration - (iteration % 3 == 0)
        if asynchronous:
            saver.save(
                SaveRequest(root, number, {}, Provenance(), retention=Retention(last=2)), kit.held(content(iteration))
            )
            saver.wait()
        else:
            kit.save(root, number, content(iteration), keep_last=2)
        os.write(pipe, iteration.to_bytes(8, "little"))


def last_number(pipe):
    data = b""
    while block := os.read(pipe, 1 << 16):
        data += block
    return int.from_bytes(data[-8:], "little") if len(data) >= 8 else None


def saved_value(kit, path):
    loaded = {name: torch.zeros_like(tensor) for name, tensor in content(0).items()}
    load_checkpoint(path, kit.held(loaded), kit.world)
    values = {float(value) for tensor in loaded.values() for value in tensor.unique()}
    assert len(values) == 1, f"{path} mixes the bytes of several saves: {values}"
    return values.pop()


@pytest.mark.parametrize("asynchronous", [False, True], ids=["foreground", "background"])
def test_killed_at_random_moments_of_saving(kit, tmp_path, asynchronous):
    random_moment = random.Random(1234)
    context = multiprocessing.get_context("fork")
    begin = 0
    for _ in range(int(os.environ.get("MEGATRON_LITE_KILLS", KILLS))):
        reader, writer = os.pipe()
        child = context.Process(target=save_forever, args=(kit, tmp_path, begin, writer, asynchronous))
        child.start()
        os.close(writer)
        time.sleep(random_moment.uniform(0.05, 0.4))
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        returned = last_number(reader)
        os.close(reader)

        found = find_checkpoint(str(tmp_path), notify=lambda _: None)
        if found is None:
            assert read_latest(tmp_path) is None
            assert returned is None
            continue
        assert iteration_of(found) == int(read_latest(tmp_path))
        verify_checkpoint(found)
        value = saved_value(kit, found)
        if returned is not None:
            # The save that returned last, or the one after it, which the kill met after its announcement.
            assert value in (returned, returned + 1)
        begin = int(value)
    assert begin > 0
    kit.save(tmp_path, begin + 1, content(begin + 1), keep_last=2)
    assert all(is_complete(entry) for entry in tmp_path.iterdir() if entry.is_dir())


CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir")


def die_before(step, root):
    """Kill this process just before its n-th change to the folder: a rename, a removal or an opened file."""
    count = 0

    def hook(event, arguments):
        nonlocal count
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        # Inside of an rmtree, Python names entries relative to their folder: those count as well.
        if event in CHANGES or (writes and str(arguments[0]).startswith(str(root))):
            if count == step:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1

    sys.addaudithook(hook)


def finishes(save, step, root):
    child = os.fork()
    if child == 0:
        try:
            die_before(step, root)
            save()
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL)
    return status == 0


@pytest.mark.parametrize("iteration", [2, 3])
def test_killed_at_every_step_of_a_save(kit, tmp_path, iteration):
    """Save iteration 2 again, or a new one, killed before each change to the folder in turn."""
    start, steps = tmp_path / "start", 0
    kit.save(start, 1, content(1))
    kit.save(start, 2, content(2))
    while True:
        root = tmp_path / f"step{steps}"
        shutil.copytree(start, root)
        if finishes(lambda root=root: kit.save(root, iteration, content(9), keep_last=1), steps, root):
            break
        found = find_checkpoint(str(root), notify=pytest.fail)
        # The last save's bytes, 9, or what was announced before it.
        expected = {2: (2,), 3: (9,)} if iteration == 3 else {2: (2, 9)}
        assert iteration_of(found) == int(read_latest(root))
        assert saved_value(kit, found) in expected[iteration_of(found)], f"step {steps}"
        # The next save tidies up whatever was left.
        kit.save(root, 4, content(4), keep_last=1)
        assert sorted(entry.name for entry in root.iterdir()) == ["iter_0000004", "latest_checkpointed_iteration.txt"]
        steps += 1
    assert steps > 10
    assert saved_value(kit, find_checkpoint(str(root))) == 9
