"""Helpers for end-to-end tests: a tiny corpus, commands in this process and in child processes, run comparison."""

import contextlib
import gc
import io
import json
import multiprocessing
import os
import random
import signal
import sys
import time
from dataclasses import dataclass
from types import SimpleNamespace
from unittest import mock

from megatron_lite.checkpoint.reading import compare_checkpoints
from megatron_lite.cli import main as program
from megatron_lite.train import loop

# Fork starts a job in 0.1 s, an interpreter with torch in 3 s.
_FORK = multiprocessing.get_context("fork")
# Fields of metrics.jsonl that depend on time or folder.
_OF_THE_CLOCK = {
    "time",
    "seconds",
    "tokens_per_second",
    "tflops_per_device",
    "mfu",
    "eta_seconds",
    "memory",
    "timers",
} | {"rank_seconds", "parts", "startup_seconds", "blocking_seconds"}


_NO_COLLECTION = SimpleNamespace(
    collect=lambda: None,
    freeze=lambda: None,
    unfreeze=lambda: None,
    isenabled=gc.isenabled,
    disable=gc.disable,
    enable=gc.enable,
)


def main(words):
    """Run the program without the full garbage collections of training: over pytest's objects one takes 0.2 s."""
    with mock.patch.object(loop, "gc", _NO_COLLECTION):
        return program.main(words)


@dataclass(frozen=True)
class Result:
    """Result of a command: exit code, stdout, stderr."""

    code: int
    out: str
    err: str


def command(*args):
    """Run `megatron-lite …` in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main([str(word) for word in args])
        except SystemExit as left:  # argparse's way
            code = left.code
    return Result(code, out.getvalue(), err.getvalue())


class Job:
    """`megatron-lite …` as a child process.

    Args:
        folder: where its output goes.
        args: the command line.
        prepare: called in the process before the command.
    """

    def __init__(self, folder, args, prepare=None):
        self.paths = folder / "job.out", folder / "job.err"
        self.process = _FORK.Process(target=_job, args=([str(word) for word in args], self.paths, prepare))
        self.process.start()

    def send(self, number):
        os.kill(self.process.pid, number)

    def wait(self, timeout=240.0):
        """Wait for the end and return the Result; the code of a killed process is minus the signal."""
        self.process.join(timeout)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
            raise AssertionError(f"the job hangs; it said\n{self.text()}")
        return Result(self.process.exitcode, *(path.read_text(encoding="utf-8") for path in self.paths))

    def text(self):
        return "\n".join(path.read_text(encoding="utf-8") for path in self.paths if path.exists())

    def until(self, condition, timeout=240.0):
        """Wait until condition() holds or the job has ended; return whether it is still running."""
        deadline = time.monotonic() + timeout
        while not condition():
            if not self.process.is_alive():
                return False
            assert time.monotonic() < deadline, f"waited in vain; the job said\n{self.text()}"
            time.sleep(0.001)
        return self.process.is_alive()


def _job(args, paths, prepare):
    for number, path in enumerate(paths, 1):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        os.dup2(descriptor, number)
    # pytest replaced the streams.
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if prepare is not None:
        prepare()
    sys.exit(main(args))


class DyingOpen:
    """Audit hook that kills the process with SIGKILL at the n-th file opened, renamed or removed in a save."""

    def __init__(self, folder, count):
        self.folder, self.left = str(folder), count

    def __call__(self, event, args):
        if event in ("open", "os.rename", "os.remove", "os.mkdir") and self.folder in str(args[0]):
            if "partial" in str(args[0]) or "latest_" in str(args[0]):
                self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)


def die_in_save(folder, count):
    """Kill this process at the n-th file of its saves to a folder; a function that prepares a Job."""
    sys.addaudithook(DyingOpen(folder, count))


def records(folder):
    """Return the records of metrics.jsonl without times; an incomplete last line is ignored."""
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8").rpartition("\n")[0]
    lines = [json.loads(line) for line in text.splitlines()]
    return [{name: value for name, value in line.items() if name not in _OF_THE_CLOCK} for line in lines]


def measured(folder):
    """Return the records of iterations and evaluations, in order."""
    return [record for record in records(folder) if record["kind"] in ("iteration", "validation")]


def iterations(folder):
    """Return the iteration numbers in metrics.jsonl, in order."""
    return [record["iteration"] for record in records(folder) if record["kind"] == "iteration"]


def checkpoints(folder):
    """Return the names of checkpoint folders, complete or not."""
    return sorted(path.name for path in folder.glob("iter_*"))


def status(folder):
    """Return the content of exit_status.json."""
    return json.loads((folder / "exit_status.json").read_text(encoding="utf-8"))


def assert_same_run(one, other):
    """Check that two --save folders have equal metrics and bit-identical last checkpoints."""
    assert measured(one) == measured(other)
    last = checkpoints(one)[-1]
    assert checkpoints(other)[-1] == last
    differences = list(compare_checkpoints(one / last, other / last))
    assert len(differences) > 20
    assert [difference.name for difference in differences if not difference.equal] == []


@dataclass(frozen=True)
class Corpus:
    """A tokenizer and two datasets.

    Attributes:
        text: their jsonl.
        tokenizer: folder of the tokenizer.
        data: prefixes of the datasets.
    """

    text: object
    tokenizer: object
    data: tuple

    def job(self, *args, data=None):
        """Return the command line of a two-layer model; `args` come last and take precedence."""
        return (
            *("train", "--data-path", data or self.data[0], "--split", "80,10,10"),
            *("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", self.tokenizer),
            *("--num-layers", 2, "--hidden-size", 16, "--num-attention-heads", 2, "--seq-length", 16),
            *("--max-position-embeddings", 16, "--micro-batch-size", 2, "--global-batch-size", 4, "--lr", 1e-3),
            *("--log-interval", 1, "--eval-iters", 1, "--num-threads", 1, "--device", "cpu", *args),
        )


def make_corpus(folder):
    """Write text, train a tokenizer and preprocess the text with the commands."""
    draw = random.Random(1234)
    args = ["".join(draw.choices("abcdefghij", k=draw.randint(2, 6))) for _ in range(60)]
    text = folder / "corpus.jsonl"
    documents = [" ".join(draw.choices(args, k=draw.randint(10, 60))) for _ in range(120)]
    text.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents), encoding="utf-8")
    tokenizer = folder / "tokenizer"
    made = [command("train-tokenizer", "--input", text, "--output", tokenizer, "--vocab-size", 300)]
    for name, seed in (("one", 1), ("two", 2)):
        made.append(preprocess(text, folder / name, tokenizer, "--shuffle", "--seed", seed))
    assert [result.code for result in made] == [0, 0, 0], made
    return Corpus(text, tokenizer, (folder / "one_text_document", folder / "two_text_document"))


def preprocess(text, prefix, tokenizer, *args):
    """Run the preprocess command."""
    return command(
        *("preprocess", "--input", text, "--output-prefix", prefix, "--tokenizer-type", "HuggingFaceTokenizer"),
        *("--tokenizer-model", tokenizer, "--append-eod", *args),
    )
