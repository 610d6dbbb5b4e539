"""Pipeline executor: runs one rank's list of schedule actions (forward, backward, weight gradient, send, receive).

There is one path for any number of stages: the program for pp = 1 is `0F0 0B0 0F1 0B1 ...`, without messages.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from megatron_lite.backend.group import Group, Work
from megatron_lite.parallel.gemm import Accumulate, DeferredWeightGradients
from megatron_lite.parallel.random import RngStreams
from megatron_lite.schedules.in_flight import MAX_SENDS
from megatron_lite.schedules.pipeline import COMPUTE, Action

Scale = Tensor | float
"""A factor, or a scalar on the device."""


class Batch(Protocol):
    """Micro-batch of b samples, as far as the executor reads it."""

    shape: tuple[int, int]
    """(b, s)."""
    number: int
    """Number of the micro-batch in the global batch."""
    sources: tuple[int, ...] | None
    """Data source of each sample; None: there is only one."""


class Stage(Protocol):
    """Consecutive layers of the model. Letters: s sequence, b micro-batch, h hidden."""

    def __call__(self, x: Tensor | None, batch: Any, /) -> Tensor:
        """Hidden states [s, b, h] (first stage: None) -> hidden states [s, b, h]."""

    def sample_losses(
        self, x: Tensor, batch: Any, gradient_scale: Scale, accumulate: Accumulate | None, /
    ) -> tuple[Tensor, Tensor | None]:
        """Return the loss of each sample times its weight, [b] fp32, from the last stage's hidden states.

        With `accumulate`, the gradient of the sum of losses times `gradient_scale` is computed too: that of the head's
        weight is accumulated, that of the hidden states is returned.
        """

    def sample_weights(self, batch: Any, /) -> Tensor | None:
        """Return the weight of each sample in the mean loss, [b] fp32; None: 1 each."""

    def hidden_shape(self, length: int, batch_size: int) -> tuple[int, int, int]:
        """Return the shape of hidden states between stages, for samples of `length` tokens."""

    @property
    def hidden_dtype(self) -> torch.dtype:
        """Return the dtype of hidden states between stages."""


BatchReader = Callable[[int], Batch]
"""Reads micro-batch `i` of this replica (0, 1, ... in its own order)."""

Timed = Callable[[str], AbstractContextManager[None]]
_UNTIMED: AbstractContextManager[None] = nullcontext()
_TIMERS = {"F": "forward-compute", "B": "backward-compute", "W": "weight-gradients"}
"""Megatron's names of timers, by kind of action; starting and awaiting messages is timed as pipeline-messages."""
_PHASES = {"F": "forward", "B": "backward", "W": "weight gradients"}
"""Names of actions in failure messages."""


@dataclass
class StepLosses:
    """Losses of this replica's micro-batches, in execution order; empty except on the last stage.

    Attributes:
        samples: for each micro-batch the loss of each sample times its weight, [b] fp32.
        weights: for each micro-batch the weight of each sample, [b] fp32; None: 1 each.
        sources: for each micro-batch the data source of each sample; None: there is only one.
    """

    samples: list[Tensor] = field(default_factory=list)
    weights: list[Tensor | None] = field(default_factory=list)
    sources: list[tuple[int, ...] | None] = field(default_factory=list)


@dataclass
class _Received:
    """Tensor that is being received: valid after wait()."""

    tensor: Tensor
    work: Work

    def wait(self) -> Tensor:
        """Return the tensor once the current stream may read it."""
        self.work.wait()
        return self.tensor


@dataclass
class _Tensors:
    """Tensors that one action leaves for another, by (stage, micro-batch)."""

    inputs: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    outputs: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    """Outputs to be sent."""
    graphs: dict[tuple[int, int], GradientEdge] = field(default_factory=dict)
    """Starting points of backward: the graph of an output without the output."""
    gradients: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    """Gradients of outputs, from the next stage; of the last stage's, from the loss."""
    received: dict[tuple[str, int, int], _Received] = field(default_factory=dict)
    """Received tensors that no action has used yet, by (kind of the receive, stage, micro-batch)."""
    batches: dict[int, Batch] = field(default_factory=dict)


class Messages:
    """P2P send/recv of hidden states and their gradients between pipeline ranks, asynchronous.

    The program's order cannot deadlock even if a send blocks until it is received (schedules/lowering.py), so any send
    may be waited for before the next one.

    Args:
        group: the pipeline-parallel group.
        device: of received tensors.
    """

    def __init__(self, group: Group, device: torch.device) -> None:
        self._group = group
        self._device = device
        self._sending: deque[tuple[Work, Tensor]] = deque()

    def exchange(
        self, sends: Sequence[tuple[Tensor, int]], receives: Sequence[tuple[tuple[int, ...], torch.dtype, int]]
    ) -> list[_Received]:
        """Start sends and receives as one batch.

        Args:
            sends: tensors with the peer's coordinate in the group; they must not change until the batch has ended.
            receives: shape, dtype and the peer's coordinate of the next tensor that the peer sends to this rank.

        Returns:
            The tensors to be received, in the order of `receives`.
        """
        while len(self._sending) > MAX_SENDS - len(sends) and self._sending:
            self._sending.popleft()[0].wait()
        sending = [(tensor.contiguous(), peer) for tensor, peer in sends]
        receiving = [(torch.empty(shape, dtype=dtype, device=self._device), peer) for shape, dtype, peer in receives]
        works = self._group.exchange(sending, receiving)
        self._sending += [(work, tensor) for work, (tensor, _) in zip(works, sending, strict=False)]
        return [_Received(tensor, work) for work, (tensor, _) in zip(works[len(sending) :], receiving, strict=True)]

    def finish(self) -> None:
        """Wait for all sends."""
        while self._sending:
            self._sending.popleft()[0].wait()


class Executor:
    """Runs programs (schedules/lowering.py) on this rank's stages; str() is the current action, for failure messages.

    Args:
        stages: this rank's model chunks by global stage number.
        num_stages: stages of the whole pipeline; the last one computes the loss.
        rng: dropout streams.
        messages: to and from the ranks of neighbouring stages.
        accumulate: adds the gradient of the head's weight, and those that W actions compute, to their buffers.
        deferred: weight gradients that B actions defer to W actions; None: the schedule does not split backward.
        trace: list that receives each action once it is done; None: no trace.
        timed: returns a context manager that measures a named part of the work; None: no timing.
    """

    def __init__(
        self,
        stages: Mapping[int, Stage],
        *,
        num_stages: int,
        rng: RngStreams,
        messages: Messages,
        accumulate: Accumulate,
        deferred: DeferredWeightGradients | None = None,
        trace: list[Action] | None = None,
        timed: Timed | None = None,
    ) -> None:
        self._stages = stages
        self._last_stage = num_stages - 1
        self._rng = rng
        self._messages = messages
        self._accumulate = accumulate
        self._deferred = deferred
        self._trace = trace
        self._timed: Timed = timed or (lambda name: _UNTIMED)
        self._current = ""

    def __str__(self) -> str:
        return self._current

    def run(
        self, program: Sequence[Action], read: BatchReader, *, iteration: int, seq_length: int, gradient_scale: Scale
    ) -> StepLosses:
        """Run the program; gradients are accumulated into the parameters' buffers.

        Args:
            program: this rank's actions, with messages. A program of forwards only is an evaluation: run it under
                no_grad, with the stages in eval mode.
            read: reads this replica's micro-batches.
            iteration: number of the iteration, part of the seed of dropout masks.
            seq_length: tokens per sample, which gives the shape of messages.
            gradient_scale: factor on the gradient of the sum of sample losses: loss scale /
                (global batch, or its tokens if the loss is averaged over tokens).
        """
        losses, tensors = StepLosses(), _Tensors()
        last_uses = {action.microbatch: action for action in program}
        for actions in _steps(program):
            for action in actions:
                if action.microbatch not in tensors.batches:
                    self._current = "reading data"
                    with self._timed("batch-generator"):
                        tensors.batches[action.microbatch] = read(action.microbatch)
            first = actions[0]
            if first.kind in COMPUTE:
                batch = tensors.batches[first.microbatch]
                self._rng.set_microbatch(iteration, batch.number)
                self._wait_for_input(first, tensors)
                self._current = f"{_PHASES[first.kind]} of micro-batch {first.microbatch} on stage {first.stage}"
                with self._timed(_TIMERS[first.kind]):
                    if first.kind == "F":
                        self._forward(first, batch, tensors, losses, gradient_scale)
                    elif first.kind == "B":
                        self._backward(first, tensors)
                    else:
                        assert self._deferred is not None, "a W action needs deferred weight gradients"
                        self._deferred.compute((first.stage, first.microbatch), self._accumulate)
            else:
                self._current = f"messages {', '.join(map(str, actions))}"
                with self._timed("pipeline-messages"):
                    self._exchange(actions, tensors, seq_length)
            for action in actions:
                if last_uses[action.microbatch] == action:
                    del tensors.batches[action.microbatch]
            if self._trace is not None:
                self._trace += actions
        self._messages.finish()
        self._current = ""
        return losses

    def _wait_for_input(self, action: Action, tensors: _Tensors) -> None:
        """Wait for the received tensor that a forward or backward uses first."""
        message = tensors.received.pop((f"RECV_{action.kind}", action.stage, action.microbatch), None)
        if message is None:
            return
        self._current = f"receiving for micro-batch {action.microbatch} on stage {action.stage}"
        with self._timed("pipeline-messages"):
            tensor = message.wait()
        if action.kind == "F":
            tensors.inputs[action.stage, action.microbatch] = tensor.requires_grad_(torch.is_grad_enabled())
        else:
            tensors.gradients[action.stage, action.microbatch] = tensor

    def _forward(
        self, action: Action, batch: Batch, tensors: _Tensors, losses: StepLosses, gradient_scale: Scale
    ) -> None:
        stage, key = action.stage, (action.stage, action.microbatch)
        training = torch.is_grad_enabled()
        output = self._stages[stage](tensors.inputs.get(key), batch)
        if stage == self._last_stage:
            samples, gradient = self._stages[stage].sample_losses(
                output.detach(), batch, gradient_scale, self._accumulate if training else None
            )
            losses.samples.append(samples)
            losses.weights.append(self._stages[stage].sample_weights(batch))
            losses.sources.append(batch.sources)
            if gradient is not None:
                tensors.gradients[key] = gradient
        elif stage + 1 in self._stages:
            tensors.inputs[stage + 1, action.microbatch] = output.detach().requires_grad_(training)
        else:
            tensors.outputs[key] = output.detach()
        if output.requires_grad:
            # The graph is kept without the output, whose memory is free once it has been sent or the loss is computed.
            tensors.graphs[key] = get_gradient_edge(output)
        if not training:
            tensors.inputs.pop(key, None)

    def _backward(self, action: Action, tensors: _Tensors) -> None:
        stage, key = action.stage, (action.stage, action.microbatch)
        graph, gradient = tensors.graphs.pop(key, None), tensors.gradients.pop(key)
        with nullcontext() if self._deferred is None else self._deferred.collect(key):
            if graph is not None:  # else every parameter up to this stage is frozen
                torch.autograd.backward(graph, gradient)
        if stage == 0:
            return
        received = tensors.inputs[key]
        assert received.grad is not None
        if stage - 1 in self._stages:
            tensors.gradients[stage - 1, action.microbatch] = received.grad
            del tensors.inputs[key]

    def _exchange(self, actions: Sequence[Action], tensors: _Tensors, seq_length: int) -> None:
        """Start adjacent sends and receives as one batch."""
        sends, receives = [], []
        for action in actions:
            assert action.peer is not None
            key, stage = (action.stage, action.microbatch), self._stages[action.stage]
            if action.kind == "SEND_F":
                sends.append((tensors.outputs.pop(key), action.peer))
            elif action.kind == "SEND_B":
                gradient = tensors.inputs.pop(key).grad
                assert gradient is not None
                sends.append((gradient, action.peer))
            else:
                batch_size = tensors.batches[action.microbatch].shape[0]
                receives.append((stage.hidden_shape(seq_length, batch_size), stage.hidden_dtype, action.peer))
        received = self._messages.exchange(sends, receives)
        receiving = [action for action in actions if action.kind.startswith("RECV")]
        for action, message in zip(receiving, received, strict=True):
            tensors.received[action.kind, action.stage, action.microbatch] = message


def _steps(program: Sequence[Action]) -> Iterator[list[Action]]:
    """Yield compute actions alone and adjacent messages together, in order."""
    for is_compute, actions in groupby(program, key=lambda action: action.kind in COMPUTE):
        if is_compute:
            yield from ([action] for action in actions)
        else:
            yield list(actions)
