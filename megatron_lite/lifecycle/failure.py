"""Failure reporting: names the failed rank, host and phase, and ends the other ranks.

Where a rank is, is read from the stack of its main thread, so nothing on the way of a training step keeps note of it.
"""

from __future__ import annotations

import atexit
import sys
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import Any

from megatron_lite.backend.base import Backend
from megatron_lite.backend.environment import host_name
from megatron_lite.backend.interruptible import end_at_once
from megatron_lite.backend.watchdog import Failure, Watchdog, WatchdogTimeouts
from megatron_lite.config.layout import coordinates
from megatron_lite.config.parallel import ParallelConfig
from megatron_lite.errors import FailedRank, MegatronLiteError, TrainingError, failed_rank

START_UP = "start-up"

OnAbort = Callable[[str, int, str], None]
_Locals = Mapping[str, Any]

PHASES: dict[tuple[str, str], Callable[[_Locals], str]] = {
    ("backend.comparison", "compare_over_store"): lambda its: f"comparing {its['comparison'].topic}",
    ("train.assemble", "_open_data"): lambda its: "opening the data",
    ("train.assemble", "build_engine"): lambda its: "building the model",
    ("train.start", "load_start"): lambda its: "loading",
    ("train.loop", "_iterate"): lambda its: f"iteration {its['plan'].iteration}" if "plan" in its else "an iteration",
    ("train.loop", "evaluate"): lambda its: f"evaluation ({its.get('split', '')})",
    ("train.replica_check", "check_weights_if_due"): lambda its: "comparing the weights of the replicas",
    ("train.state", "save"): lambda its: f"saving iteration {its['progress'].iteration}",
    ("lifecycle.stopping", "agree"): lambda its: "agreeing whether to stop",
    ("data.serving.loader", "microbatch"): lambda its: "reading data",
    ("pipeline.executor", "_forward"): lambda its: f"forward of {_action(its)}",
    ("pipeline.executor", "_backward"): lambda its: f"backward of {_action(its)}",
    ("pipeline.executor", "_message"): lambda its: f"message of {_action(its)}",
    ("parallel.buffers", "reduce"): lambda its: "gradient reduction",
    ("optim.optimizer", "step"): lambda its: "optimizer",
    ("backend.group", "all_reduce_"): lambda its: f"all-reduce along {its['self'].axis}",
    ("backend.group", "all_gather_"): lambda its: f"all-gather along {its['self'].axis}",
    ("backend.group", "reduce_scatter_"): lambda its: f"reduce-scatter along {its['self'].axis}",
    ("backend.group", "broadcast_"): lambda its: f"broadcast along {its['self'].axis}",
    ("backend.group", "barrier"): lambda its: f"barrier along {its['self'].axis}",
    ("backend.group", "all_gather_object"): lambda its: f"exchange of objects along {its['self'].axis}",
}
"""What a function on the stack means, by its module (within megatron_lite) and name; from its local variables."""

_TRANSPORT = ("gloo", "nccl", "connection", "socket", "process group", "timed out", "tcpstore", "watchdog")
"""Words in the errors with which a transport says that another rank is gone."""


def rank_name(backend: Backend, parallel: ParallelConfig) -> str:
    """This rank in words: host, rank and coordinates."""
    at = coordinates(backend.rank, parallel)
    return f"{backend.launch.host or host_name()} rank {backend.rank} (dp {at['dp']}, pp {at['pp']}, tp {at['tp']})"


def phase_of(frames: Iterable[FrameType]) -> str:
    """What a stack is doing, from its outermost frame in: `iteration 7, backward of micro-batch 2, …`."""
    words = []
    for frame in frames:
        module = frame.f_globals.get("__name__", "").removeprefix("megatron_lite.")
        say = PHASES.get((module, frame.f_code.co_name))
        # A running frame may have left its variables already.
        with suppress(KeyError, AttributeError):
            if say is not None:
                words.append(say(frame.f_locals))
    return ", ".join(words) or START_UP


@contextmanager
def watched(backend: Backend, parallel: ParallelConfig, on_abort: OnAbort | None = None) -> Iterator[None]:
    """Whatever fails inside is said with host, rank, coordinates and phase, and ends the other ranks too.

    Args:
        backend: this rank's.
        parallel: sizes and time-outs.
        on_abort: called with host, rank and text of the first failure before the watchdog's thread ends this process.

    Raises:
        TrainingError: instead of what the transport says when another rank has failed: that rank's own words.
    """
    name = rank_name(backend, parallel)
    store = backend.watch_store()
    watchdog = None
    if store is not None:
        watchdog = Watchdog(
            store,
            backend.launch,
            name=name,
            where=_main_thread,
            timeouts=WatchdogTimeouts.from_collective_timeout(60 * parallel.distributed_timeout_minutes),
            on_abort=on_abort,
        )
    try:
        yield
    except BaseException as error:
        phase = phase_of(_frames(error.__traceback__))
        if watchdog is None:
            if not isinstance(error, (MegatronLiteError, KeyboardInterrupt)):
                _print_failure(name, phase, error)
            raise
        atexit.register(end_at_once, 130 if isinstance(error, KeyboardInterrupt) else 1)
        first = _told_by_another(watchdog, error)
        if first is not None:
            raise _ended_by(first, name, phase, backend, error) from FailedRank(first.host, first.rank)
        if isinstance(error, MegatronLiteError) and not error.shared and (place := failed_rank(error)) is not None:
            error.shared, error.silent = True, place.rank != backend.rank
        first = watchdog.fail(f"{name} failed in {phase}: {_words(error)}", _common_words(error))
        alike = first.rank != backend.rank and first.error == _common_words(error)
        if isinstance(error, MegatronLiteError):
            error.shared, error.silent = True, error.silent if error.shared else alike
        elif not alike:
            _print_failure(name, phase, error)
        watchdog.end()
        if alike and not isinstance(error, (MegatronLiteError, KeyboardInterrupt)):
            # Not this rank's stack, too: the first one's is printed.
            raise _ended_by(first, name, phase, backend, error) from FailedRank(first.host, first.rank)
        raise
    if watchdog is not None:
        watchdog.leave()


def _told_by_another(watchdog: Watchdog | None, error: BaseException) -> Failure | None:
    """The failure of another rank that this error follows from; None: it is this rank's own."""
    if watchdog is None or not isinstance(error, (RuntimeError, OSError)):
        return None
    text = f"{type(error).__name__} {error}".lower()
    return watchdog.first_failure() if any(word in text for word in _TRANSPORT) else None


def _ended_by(first: Failure, name: str, phase: str, backend: Backend, error: BaseException) -> TrainingError:
    """Return the error of a rank that another's failure ends."""
    ended = TrainingError(
        "A job goes on with all its ranks or ends with the first that fails",
        found=f"{first.text}; {name} was in {phase}",
        fix="See that rank's output. With --save and --load, the same command goes on from the last checkpoint",
    )
    ended.shared, ended.silent = True, not first.is_printed_by(backend.rank, backend.local_rank)
    ended.__context__ = error
    return ended


def _print_failure(name: str, phase: str, error: BaseException) -> None:
    sys.stderr.write(f"[{name}] failed in {phase}: {_words(error)}\n")
    sys.stderr.flush()


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _common_words(error: BaseException) -> str:
    """Return what ranks that fail alike have in common: `fix` may list what is on a rank's disk."""
    return error.description if isinstance(error, MegatronLiteError) else _words(error)


def _action(its: _Locals) -> str:
    action = its["action"]
    return f"micro-batch {action.microbatch} on stage {action.stage}"


def _frames(trace: TracebackType | None) -> Iterator[FrameType]:
    while trace is not None:
        yield trace.tb_frame
        trace = trace.tb_next


def _main_thread() -> tuple[str, Hashable]:
    """What the main thread is doing, and a value that changes when it gets on."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    stack: list[FrameType] = []
    while frame is not None:
        stack.append(frame)
        frame = frame.f_back
    stack.reverse()
    phase = phase_of(stack)
    return phase, (phase, *((id(entry), entry.f_lasti) for entry in stack))
