"""The executor: does what the schedule's actions say, in their order, and nothing else.

There is one path for one stage and for many: the program for pp = 1 is `0F0 0B0 0F1 0B1 …`, with no messages in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_lite.parallel.random import RngStreams
from megatron_lite.parallel.weight_gradients import Accumulate, WeightGradients
from megatron_lite.pipeline.messages import Messages
from megatron_lite.pipeline.stage import Batch, Stage
from megatron_lite.schedules.pipeline import Action

BatchReader = Callable[[int], Batch]
"""Reads micro-batch `i` of this replica's share (0, 1, … in its own order)."""

Timed = Callable[[str], AbstractContextManager[None]]
_UNTIMED: AbstractContextManager[None] = nullcontext()
_TIMERS = {"F": "forward-compute", "B": "backward-compute", "W": "weight-gradients"}
"""Megatron's names, by the kind of action; all messages together are pipeline-messages."""


@dataclass
class StepLosses:
    """Losses of this replica's micro-batches, in the order they were run; empty on all but the last stage.

    Attributes:
        samples: for each micro-batch its samples' losses, [b] fp32.
        sources: for each micro-batch the data source of each sample; None where there is only one source.
    """

    samples: list[Tensor] = field(default_factory=list)
    sources: list[tuple[int, ...] | None] = field(default_factory=list)


@dataclass
class _Tensors:
    """What lies between actions, by (stage, micro-batch)."""

    inputs: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    outputs: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    gradients: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    """Gradients of outputs, from the next stage."""
    batches: dict[int, Batch] = field(default_factory=dict)


class Executor:
    """Interprets programs (schedules/lowering.py) on this rank's stages.

    Args:
        stages: this rank's model chunks by global stage number.
        num_stages: stages of the whole pipeline; the last one computes the loss.
        rng: dropout streams, told before each forward and backward where they are.
        messages: to and from the ranks of neighbouring stages.
        accumulate: adds a gradient that a W action computed to its parameter's.
        weight_gradients: where backward leaves what W actions compute; None: schedules that do not split.
        trace: if given, each action is appended once it is done.
        timed: makes a context that measures a named part of a micro-batch's work; None: nothing is measured.
    """

    def __init__(
        self,
        stages: Mapping[int, Stage],
        *,
        num_stages: int,
        rng: RngStreams,
        messages: Messages,
        accumulate: Accumulate,
        weight_gradients: WeightGradients | None = None,
        trace: list[Action] | None = None,
        timed: Timed | None = None,
    ) -> None:
        self._stages = stages
        self._last_stage = num_stages - 1
        self._rng = rng
        self._messages = messages
        self._accumulate = accumulate
        self._weight_gradients = weight_gradients
        self._trace = trace
        self._timed: Timed = timed or (lambda name: _UNTIMED)

    def run(
        self, program: Sequence[Action], read: BatchReader, *, iteration: int, seq_length: int, gradient_scale: float
    ) -> StepLosses:
        """Runs the program; gradients are left in the parameters' buffers.

        Args:
            program: this rank's actions, messages included. One of forwards only evaluates: call it under no_grad,
                with the stages in eval mode.
            read: gives this replica's micro-batches.
            iteration: the iteration's number, which decides the dropout masks.
            seq_length: tokens of each sample, which decides the messages' shapes.
            gradient_scale: factor on the gradient of the summed sample losses: loss scale / global batch.
        """
        losses, tensors = StepLosses(), _Tensors()
        last_use = {action.microbatch: place for place, action in enumerate(program)}
        for place, action in enumerate(program):
            if action.microbatch not in tensors.batches:
                with self._timed("batch-generator"):
                    tensors.batches[action.microbatch] = read(action.microbatch)
            batch = tensors.batches[action.microbatch]
            self._rng.at(iteration, batch.number)
            with self._timed(_TIMERS.get(action.kind, "pipeline-messages")):
                if action.kind == "F":
                    self._forward(action, batch, tensors, losses)
                elif action.kind == "B":
                    self._backward(action, tensors, gradient_scale)
                elif action.kind == "W":
                    assert self._weight_gradients is not None, "this schedule splits backward"
                    self._weight_gradients.compute((action.stage, action.microbatch), self._accumulate)
                else:
                    self._message(action, batch, tensors, seq_length)
            if last_use[action.microbatch] == place:
                del tensors.batches[action.microbatch]
            if self._trace is not None:
                self._trace.append(action)
        self._messages.finish()
        return losses

    def _forward(self, action: Action, batch: Batch, tensors: _Tensors, losses: StepLosses) -> None:
        stage, key = action.stage, (action.stage, action.microbatch)
        trains, stays = torch.is_grad_enabled(), stage + 1 in self._stages
        output = self._stages[stage](tensors.inputs.get(key), batch)
        if stage == self._last_stage:
            samples = self._stages[stage].sample_losses(output, batch)
            losses.samples.append(samples.detach())
            losses.sources.append(batch.sources)
            output = samples.sum()
        elif stays:
            tensors.inputs[stage + 1, action.microbatch] = output.detach().requires_grad_(trains)
        if trains or not (stays or stage == self._last_stage):
            tensors.outputs[key] = output
        if not trains:
            tensors.inputs.pop(key, None)

    def _backward(self, action: Action, tensors: _Tensors, gradient_scale: float) -> None:
        stage, key = action.stage, (action.stage, action.microbatch)
        output = tensors.outputs.pop(key)
        is_last = stage == self._last_stage
        gradient = torch.full_like(output, gradient_scale) if is_last else tensors.gradients.pop(key)
        if self._weight_gradients is None:
            torch.autograd.backward(output, gradient)
        else:
            with self._weight_gradients.deferred(key):
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
