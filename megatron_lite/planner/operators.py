"""Simulated operators: tensors that each allocates, saves for backward and reads in backward (memory estimate).

They mirror parallel/tensor_parallel.py, model/attention.py, model/layer.py and model/norms.py, as eager torch runs them
on a GPU. Gradients of biases and norms are left out.

Letters: s sequence, b micro-batch, i and o channels, tp size of the tensor-parallel group.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_lite.config.model import ModelConfig
from megatron_lite.config.run import RunConfig
from megatron_lite.config.runtime import GRADIENT_ROWS
from megatron_lite.planner.tape import Deferred, Storage, Tape, Value
from megatron_lite.schedules.pipeline import SPLIT_BACKWARD


@dataclass(frozen=True)
class Shapes:
    """Sizes that the operators of a run share.

    Attributes:
        tokens: s b of a micro-batch, where s is the part of a context-parallel rank.
        local_tokens: tokens between the parallel layers: s b / tp with sequence parallelism.
        samples: b.
        itemsize: bytes of an element of parameters and activations.
        tp: tensor-parallel ranks.
        split: sequence parallelism is in effect.
        defers: weight gradients are computed by W actions (zero-bubble schedules).
        fused: weight gradients are added to the fp32 buffers while they are computed.
        immediate: backward does so, and no weight gradient is a tensor of its own.
        fp8: products of the layers are in fp8.
        cp: context-parallel ranks.
        gathers_keys: keys and values are all-gathered over them; False: passed round a ring.
        documents: attention is restricted to documents.
    """

    tokens: int
    local_tokens: int
    samples: int
    itemsize: int
    tp: int
    split: bool
    defers: bool
    fused: bool
    immediate: bool
    fp8: bool
    cp: int
    gathers_keys: bool
    documents: bool

    @property
    def own_functions(self) -> bool:
        """True if linear layers are the autograd functions of parallel/tensor_parallel.py, and not torch's."""
        return self.tp > 1 or self.defers or self.immediate or self.fp8


def shapes_of(config: RunConfig, seq_length: int) -> Shapes:
    """Return the sizes of a run's micro-batches with samples of some length."""
    parallel, dtype = config.parallel, config.precision.dtype
    tokens = seq_length // parallel.cp * config.batch.micro_batch_size
    split = parallel.sequence_parallel and parallel.tp > 1
    defers = parallel.pipeline_schedule in SPLIT_BACKWARD
    fused = dtype != "fp32" and config.runtime.gradient_accumulation_fusion
    return Shapes(
        tokens=tokens,
        local_tokens=tokens // parallel.tp if split else tokens,
        samples=config.batch.micro_batch_size,
        itemsize=4 if dtype == "fp32" else 2,
        tp=parallel.tp,
        split=split,
        defers=defers,
        fused=fused,
        immediate=fused and not defers and config.runtime.compile == "off",
        fp8=config.fp8.format != "off",
        cp=parallel.cp,
        gathers_keys=parallel.cp_comm_type == "all_gather",
        documents=config.data.reset_attention_mask,
    )


class Operators:
    """Operators of a model on a tape. Each returns its output, and drops no reference of its inputs.

    Args:
        tape: the pass.
        model: the model.
        shapes: of the micro-batch.
        recomputes_attention: attention is recomputed in backward (selective recomputation).
    """

    def __init__(self, tape: Tape, model: ModelConfig, shapes: Shapes, *, recomputes_attention: bool = False) -> None:
        self.tape = tape
        self.model = model
        self.shapes = shapes
        self.recomputes_attention = recomputes_attention

    def norm(self, x: Value, width: int) -> Value:
        """Normalize over `width` channels, in fp32 if the input is a fp32 residual or the norm is zero-centered."""
        tape, itemsize = self.tape, self.shapes.itemsize
        native = x.itemsize == itemsize and not self.model.zero_centered_norm
        inner = 4 if not native else itemsize
        converted = tape.new(4 * x.elements) if x.itemsize < inner else tape.keep(x)
        statistics = tape.new(8 * (x.elements // width))
        y = tape.tensor(x.elements, inner)

        def backward() -> None:
            gradient = tape.take_gradient(y)
            if itemsize < inner:
                gradient = self.converted(gradient, 4 * x.elements)
            of_input = tape.new(inner * x.elements)
            tape.drop(gradient)
            if x.itemsize < inner:
                of_input = self.converted(of_input, x.size)
            tape.add_gradient(x, of_input)

        tape.node(backward, converted, statistics)
        tape.drop(converted, statistics)
        if itemsize < inner:  # rounded to the parameters' dtype
            tape.drop(y)
            y.storage, y.itemsize = tape.new(itemsize * y.elements), itemsize
        return y

    def column(self, x: Value, inputs: int, outputs: int) -> Value:
        """Column-parallel linear layer: `x` [s/tp or s, b, i] -> [s, b, o], where o is per rank."""
        tape, shapes = self.tape, self.shapes
        whole = shapes.tokens * inputs * shapes.itemsize
        gathered = tape.new(whole) if shapes.split else None
        y = tape.tensor(shapes.tokens * outputs, shapes.itemsize)
        if gathered is not None:
            tape.drop(gathered)

        def backward() -> None:
            gradient = tape.take_gradient(y)
            gathered = tape.new(whole) if shapes.split and not shapes.defers else None
            of_input = tape.new(whole)
            if shapes.split:
                unreduced, of_input = of_input, tape.new(x.size)
            product = self._weight_gradient(gradient, x, inputs, outputs, whole if shapes.split else 0)
            if shapes.split:
                tape.drop(unreduced)
            if gathered is not None:
                tape.drop(gathered)
            tape.add_gradient(x, of_input)
            tape.drop(gradient, *product)

        tape.node(backward, x)
        return y

    def row(self, x: Value, inputs: int, outputs: int, *, bias: bool) -> Value:
        """Row-parallel linear layer: `x` [s, b, i], where i is per rank -> [s/tp or s, b, o]."""
        tape, shapes = self.tape, self.shapes
        y = tape.tensor(shapes.tokens * outputs, shapes.itemsize)
        if shapes.split:
            summand, y = y, tape.tensor(shapes.local_tokens * outputs, shapes.itemsize)
            tape.drop(summand)
        if bias and shapes.own_functions:  # added after the sum over ranks
            without, y = y, tape.tensor(y.elements, y.itemsize)
            tape.drop(without)

        def backward() -> None:
            gradient = tape.take_gradient(y)
            whole = tape.new(shapes.tokens * outputs * shapes.itemsize) if shapes.split else tape.keep(gradient)
            of_input = tape.new(x.size)
            product = self._weight_gradient(whole, x, inputs, outputs, 0)
            tape.drop(whole)
            tape.add_gradient(x, of_input)
            tape.drop(gradient, *product)

        tape.node(backward, x)
        return y

    def dropout(self, x: Value, rate: float) -> Value:
        """Apply dropout, whose mask has a byte an element; the input's reference passes to it."""
        tape = self.tape
        if not rate:
            return x
        y, mask = tape.tensor(x.elements, x.itemsize), tape.new(x.elements)

        def backward() -> None:
            gradient = tape.take_gradient(y)
            tape.add_gradient(x, tape.new(x.size))
            tape.drop(gradient)

        tape.node(backward, mask)
        tape.drop(mask, x)
        return y

    def add(self, residual: Value, branch: Value) -> Value:
        """Return the residual plus the branch after dropout; the branch's reference passes to it."""
        tape = self.tape
        branch = self.dropout(branch, self.model.hidden_dropout)
        y = tape.tensor(residual.elements, max(residual.itemsize, branch.itemsize))

        def backward() -> None:
            gradient = tape.take_gradient(y)
            tape.add_gradient(residual, tape.keep(gradient))
            if branch.itemsize < y.itemsize:
                gradient = self.converted(gradient, branch.size)
            tape.add_gradient(branch, gradient)

        tape.node(backward)
        tape.drop(branch)
        return y

    def _weight_gradient(
        self, gradient: Storage, x: Value, inputs: int, outputs: int, gathered: int
    ) -> tuple[Storage, ...]:
        """Defer, add or return a weight gradient; `gathered`: bytes of the input if it is gathered for it."""
        shapes = self.shapes
        if shapes.defers:
            in_place = shapes.fused or shapes.itemsize == 4
            product = 0 if in_place else min(outputs, GRADIENT_ROWS) * inputs * shapes.itemsize
            operands = self.tape.keep(gradient), self.tape.keep(x)
            self.tape.deferred.append(Deferred(operands, product + gathered))
            return ()
        return () if shapes.immediate else (self.tape.new(outputs * inputs * shapes.itemsize),)

    def converted(self, storage: Storage, size: int) -> Storage:
        """Return a new storage of some size in place of another one, computed from it."""
        found = self.tape.new(size)
        self.tape.drop(storage)
        return found

    def replaced(self, old: Value, new: Value) -> Value:
        """Return the new value of a variable, whose reference to the old one is dropped."""
        self.tape.drop(old)
        return new
