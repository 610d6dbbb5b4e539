"""Pipeline executor: runs one rank's list of schedule actions (forward, backward, weight gradient, send, receive).

There is one path for any number of stages: the program for pp = 1 is `0F0 0B0 0F1 0B1 ...`, without messages.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_lite.backend.group import Group, Work
from megatron_lite.parallel.gemm import Accumulate, DeferredWeightGradients
from megatron_lite.parallel.random import RngStreams
from megatron_lite.schedules.pipeline import Action


class Batch(Protocol):
    """Micro-batch of b samples, as far as the executor reads it."""

    tokens: Tensor
    """[b, s]."""
    number: int
    """Number of the micro-batch in the global batch."""
    sources: tuple[int, ...] | None
    """Data source of each sample; None: there is only one."""


class Stage(Protocol):
    """Consecutive layers of the model. Letters: s sequence, b micro-batch, h hidden, V vocabulary."""

    def __call__(self, x: Tensor | None, batch: Any, /) -> Tensor:
        """Hidden states [s, b, h] (first stage: None) -> hidden states [s, b, h]; last stage: logits [s, b, V]."""

    def sample_losses(self, logits: Tensor, batch: Any, /) -> Tensor:
        """Return the mean token loss of each sample, [b] fp32, from the last stage's logits."""

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
"""Megatron's names of timers, by kind of action; messages are timed together as pipeline-messages."""
_PHASES = {"F": "forward", "B": "backward", "W": "weight gradients"}
"""Names of actions in failure messages."""


@dataclass
class StepLosses:
    """Losses of this replica's micro-batches, in execution order; empty except on the last stage.

    Attributes:
        samples: for each micro-batch the loss of each sample, [b] fp32.
        sources: for each micro-batch the data source of each sample; None: there is only one.
    """

    samples: list[Tensor] = field(default_factory=list)
    sources: list[tuple[int, ...] | None] = field(default_factory=list)


@dataclass
class _Tensors:
    """Tensors that one action leaves for another, by (stage, micro-batch)."""

    inputs: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    outputs: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    gradients: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    """Gradients of outputs, from the next stage."""
    batches: dict[int, Batch] = field(default_factory=dict)


class Messages:
    """P2P send/recv of hidden states and their gradients between pipeline ranks: asynchronous send, blocking receive.

    The program's order cannot deadlock even if a send blocks until it is received (schedules/lowering.py), so a send is
    waited for only before the next one. At most one sent tensor is kept alive.

    Args:
        group: the pipeline-parallel group.
        device: of received tensors.
    """

    def __init__(self, group: Group, device: torch.device) -> None:
        self._group = group
        self._device = device
        self._sending: list[tuple[Work, Tensor]] = []

    def send(self, tensor: Tensor, peer: int) -> None:
        """Start sending to a coordinate of the group; `tensor` must not change until the next send or finish."""
        self.finish()
        tensor = tensor.contiguous()
        self._sending.append((self._group.send(tensor, peer), tensor))

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype, peer: int) -> Tensor:
        """Return the next tensor that `peer` sends to this rank."""
        tensor = torch.empty(shape, dtype=dtype, device=self._device)
        self._group.recv_(tensor, peer).wait()
        return tensor

    def finish(self) -> None:
        """Wait for the last send."""
        for work, _ in self._sending:
            work.wait()
        self._sending.clear()


class Executor:
    """Runs programs (schedules/lowering.py) on this rank's stages; str() is the current action, for failure messages.

    Args:
        stages: this rank's model chunks by global stage number.
        num_stages: stages of the whole pipeline; the last one computes the loss.
        rng: dropout streams.
        messages: to and from the ranks of neighbouring stages.
        accumulate: adds a gradient that a W action computed to its parameter's buffer.
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
        self, program: Sequence[Action], read: BatchReader, *, iteration: int, seq_length: int, gradient_scale: float
    ) -> StepLosses:
        """Run the program; gradients are accumulated into the parameters' buffers.

        Args:
            program: this rank's actions, with messages. A program of forwards only is an evaluation: run it under
                no_grad, with the stages in eval mode.
            read: reads this replica's micro-batches.
            iteration: number of the iteration, part of the seed of dropout masks.
            seq_length: tokens per sample, which gives the shape of messages.
            gradient_scale: factor on the gradient of the sum of sample losses: loss scale / global batch.
        """
        losses, tensors = StepLosses(), _Tensors()
        last_use = {action.microbatch: index for index, action in enumerate(program)}
        for index, action in enumerate(program):
            if action.microbatch not in tensors.batches:
                self._current = "reading data"
                with self._timed("batch-generator"):
                    tensors.batches[action.microbatch] = read(action.microbatch)
            batch = tensors.batches[action.microbatch]
            self._rng.set_microbatch(iteration, batch.number)
            name = _PHASES.get(action.kind, "message")
            self._current = f"{name} of micro-batch {action.microbatch} on stage {action.stage}"
            with self._timed(_TIMERS.get(action.kind, "pipeline-messages")):
                if action.kind == "F":
                    self._forward(action, batch, tensors, losses)
                elif action.kind == "B":
                    self._backward(action, tensors, gradient_scale)
                elif action.kind == "W":
                    assert self._deferred is not None, "a W action needs deferred weight gradients"
                    self._deferred.compute((action.stage, action.microbatch), self._accumulate)
                else:
                    self._message(action, batch, tensors, seq_length)
            if last_use[action.microbatch] == index:
                del tensors.batches[action.microbatch]
            if self._trace is not None:
                self._trace.append(action)
        self._messages.finish()
        self._current = ""
        return losses

    def _forward(self, action: Action, batch: Batch, tensors: _Tensors, losses: StepLosses) -> None:
        stage, key = action.stage, (action.stage, action.microbatch)
        training, next_is_local = torch.is_grad_enabled(), stage + 1 in self._stages
        output = self._stages[stage](tensors.inputs.get(key), batch)
        if stage == self._last_stage:
            samples = self._stages[stage].sample_losses(output, batch)
            losses.samples.append(samples.detach())
            losses.sources.append(batch.sources)
            output = samples.sum()
        elif next_is_local:
            tensors.inputs[stage + 1, action.microbatch] = output.detach().requires_grad_(training)
        if training or not (next_is_local or stage == self._last_stage):
            tensors.outputs[key] = output
        if not training:
            tensors.inputs.pop(key, None)

    def _backward(self, action: Action, tensors: _Tensors, gradient_scale: float) -> None:
        stage, key = action.stage, (action.stage, action.microbatch)
        output = tensors.outputs.pop(key)
        is_last = stage == self._last_stage
        gradient = torch.full_like(output, gradient_scale) if is_last else tensors.gradients.pop(key)
        with nullcontext() if self._deferred is None else self._deferred.collect(key):
            torch.autograd.backward(output, gradient)
        if stage == 0:
            return
        received = tensors.inputs[key]
        assert received.grad is not None
        if stage - 1 in self._stages:
            tensors.gradients[stage - 1, action.microbatch] = received.grad
            del tensors.inputs[key]

    def _message(self, action: Action, batch: Batch, tensors: _Tensors, seq_length: int) -> None:
        assert action.peer is not None
        key, stage = (action.stage, action.microbatch), self._stages[action.stage]
        if action.kind == "SEND_F":
            output = tensors.outputs[key] if torch.is_grad_enabled() else tensors.outputs.pop(key)
            self._messages.send(output.detach(), action.peer)
        elif action.kind == "SEND_B":
            gradient = tensors.inputs.pop(key).grad
            assert gradient is not None
            self._messages.send(gradient, action.peer)
        else:
            shape = stage.hidden_shape(seq_length, batch.tokens.shape[0])
            received = self._messages.receive(shape, stage.hidden_dtype, action.peer)
            if action.kind == "RECV_F":
                tensors.inputs[key] = received.requires_grad_(torch.is_grad_enabled())
            else:
                tensors.gradients[key] = received
