"""Activation memory of a pipeline stage: bytes of a micro-batch kept between forward and backward, and used in each.

A layer is simulated once (planner/model_parts.py); equal layers of a stage have equal numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from megatron_lite.config.model import ModelConfig
from megatron_lite.config.optimizer import RecomputeConfig
from megatron_lite.config.recompute import recompute_units
from megatron_lite.config.runtime import GRADIENT_ROWS, LOSS_BLOCKS, LOSS_CHUNK
from megatron_lite.planner.model_parts import ModelParts
from megatron_lite.planner.operators import Shapes
from megatron_lite.planner.tape import Tape


@dataclass(frozen=True)
class StageMemory:
    """Bytes of one micro-batch on one stage.

    Attributes:
        forward: most bytes during its forward, with the stage's input.
        saved: bytes from its forward to its backward, without the output that is sent.
        backward: most bytes during its backward, with those that were saved and the output's gradient.
        deferred: operands of weight gradients, from its backward to the computation of the gradients.
        weight: most bytes during that computation, with the operands.
        loss: bytes of `forward` that are the loss's: logits of a chunk, and their gradients.
        message: bytes of the hidden states that stages send to each other.
    """

    forward: int
    saved: int
    backward: int
    deferred: int
    weight: int
    loss: int
    message: int


@dataclass(frozen=True)
class _Part:
    """Bytes of a part of a stage.

    Attributes:
        kept: saved for backward, with the part's input if it is saved.
        forward: most bytes in forward above those before it, with the output.
        backward: most bytes in backward above those before it, which include `kept` and the output's gradient.
        change: bytes after backward less those before it; `kept` is free, the input's gradient is there.
        deferred: operands of deferred weight gradients, part of `change`.
        weight: most temporary bytes of a deferred weight gradient.
    """

    kept: int
    forward: int
    backward: int
    change: int
    deferred: int = 0
    weight: int = 0


@lru_cache(maxsize=4096)
def stage_memory(
    model: ModelConfig,
    recompute: RecomputeConfig,
    shapes: Shapes,
    layers: range,
) -> StageMemory:
    """Return the memory of one micro-batch on a stage.

    Args:
        model: the model, with the padded vocabulary.
        recompute: recomputation of its layers.
        shapes: of the micro-batch.
        layers: those of the stage.
    """
    first, last = layers.start == 0, layers.stop == model.num_layers
    hidden, output = _hidden_size(model, shapes), _hidden_size(model, shapes)
    selective = recompute.granularity == "selective"
    parts = [_embedding(model, shapes)] if first else []
    for numbers, again in recompute_units(len(layers), recompute):
        parts += (
            [_recomputed(model, shapes, len(numbers))] if again else [_layer(model, shapes, selective)] * len(numbers)
        )
    if last:
        parts.append(_head(model, shapes))
    level = peak = received = 0 if first else hidden
    for number, part in enumerate(parts):
        peak = max(peak, level + part.forward)
        is_input_free = number or first or part.kept >= hidden
        level += part.kept + (hidden if number < len(parts) - 1 else 0) - (hidden if number else received)
        if not is_input_free:  # the executor holds what was received
            level += received
    loss = 0
    if last:
        output, loss = _head_size(model, shapes), _loss(model, shapes)
        peak = max(peak, level + output + loss)
        level += output + 8 * shapes.tokens  # the gradient of the hidden states, and the labels
    # Tokens, and the order of the documents' tokens with its inverse.
    saved = level + (8 * shapes.tokens if first else 0) + (16 * shapes.tokens if shapes.documents else 0)
    level = highest = saved + (0 if last else output)
    for part in reversed(parts):
        highest = max(highest, level + part.backward)
        level += part.change
    deferred = sum(part.deferred for part in parts)
    weight = max((part.weight for part in parts), default=0)
    return StageMemory(peak, saved, highest, deferred, deferred + weight, loss, hidden)


def _hidden_size(model: ModelConfig, shapes: Shapes) -> int:
    return shapes.local_tokens * model.hidden_size * (4 if model.fp32_residual else shapes.itemsize)


def _head_size(model: ModelConfig, shapes: Shapes) -> int:
    return shapes.local_tokens * model.embedding_width * shapes.itemsize


def _measure(model: ModelConfig, shapes: Shapes, operators: ModelParts, *, output: str = "layer") -> _Part:
    """Run one part forward and backward, and return its bytes."""
    tape = operators.tape
    itemsize = 4 if model.fp32_residual else shapes.itemsize
    x = tape.tensor(shapes.local_tokens * model.hidden_size, itemsize)
    before = tape.live
    tape.reset_peak()
    y = getattr(operators, output)(x)
    forward = tape.peak - before
    tape.drop(x, y)
    kept = tape.live
    if not tape.saves:
        return _Part(kept, forward, 0, 0)
    y.gradient = tape.new(y.size)
    start = tape.live
    tape.reset_peak()
    tape.backward()
    deferred = sum({id(one): one.size for own in tape.deferred for one in own.operands}.values())
    return _Part(
        kept,
        forward,
        tape.peak - start,
        tape.live - start,
        deferred,
        max((own.temporary for own in tape.deferred), default=0),
    )


@lru_cache(maxsize=512)
def _layer(model: ModelConfig, shapes: Shapes, selective: bool) -> _Part:
    return _measure(model, shapes, ModelParts(Tape(), model, shapes, recomputes_attention=selective))


@lru_cache(maxsize=512)
def _recomputed(model: ModelConfig, shapes: Shapes, layers: int) -> _Part:
    """Return the bytes of a unit of layers whose forward runs again in backward; it keeps its input only."""
    layer, hidden = _layer(model, shapes, False), _hidden_size(model, shapes)
    forward = _measure(model, shapes, ModelParts(Tape(saves=False), model, shapes)).forward
    # The unit's input is there before, and the last output is not computed again.
    kept = layers * layer.kept - hidden
    again = kept - layer.kept + layer.forward
    backward = max(again, kept + layer.backward)
    return _Part(
        hidden,
        forward,
        backward,
        layers * (layer.change + layer.kept + hidden) - hidden,
        layers * layer.deferred,
        layer.weight,
    )


@lru_cache(maxsize=512)
def _head(model: ModelConfig, shapes: Shapes) -> _Part:
    return _measure(model, shapes, ModelParts(Tape(), model, shapes), output="head")


@lru_cache(maxsize=512)
def _embedding(model: ModelConfig, shapes: Shapes) -> _Part:
    """Return the bytes of the embedding; its input, the tokens, belongs to the micro-batch."""
    tape = Tape()
    operators = ModelParts(tape, model, shapes)
    y = operators.embedding()
    forward = tape.peak
    tape.drop(y)
    kept = tape.live
    y.gradient = tape.new(y.size)
    start = tape.live
    tape.reset_peak()
    tape.backward()
    return _Part(kept, forward, tape.peak - start, tape.live - start)


def _loss(model: ModelConfig, shapes: Shapes) -> int:
    """Return the bytes of the loss besides hidden states: one chunk of logits with what its kernels need."""
    chunk = min(LOSS_CHUNK, shapes.tokens)
    rows, width = model.vocab_rows // shapes.tp, model.embedding_width
    logits = chunk * rows * shapes.itemsize
    of_input = chunk * width * shapes.itemsize
    gathered = of_input if shapes.split else 0
    block = -(-chunk // LOSS_BLOCKS) * rows * 4
    in_place = shapes.fused or shapes.itemsize == 4
    product = 0 if in_place else min(rows, GRADIENT_ROWS) * width * shapes.itemsize
    gradient = _head_size(model, shapes)
    per_token = 3 * 4 * shapes.tokens + (8 + 1 + 5 * 4) * chunk
    return gradient + per_token + gathered + logits + max(block, of_input + product)
