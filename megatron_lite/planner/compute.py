"""Roofline of one rank's kernels: seconds of matrix products, attention and elementwise work of a layer and the head.

A matrix product is cut into tiles, which the multiprocessors compute in waves; what the last wave and the tiles at the
edges leave unused is lost (NVIDIA, Matrix Multiplication Background User's Guide: tile and wave quantization). It takes
at least the time of its memory traffic. Elementwise kernels take the time of theirs.

Letters: s sequence, b micro-batch, h hidden, f width of the MLP, V padded vocabulary, t tokens of a micro-batch on one
rank (b s / cp), tp and cp sizes of the axes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import ceil

from megatron_lite.config.run import RunConfig
from megatron_lite.planner.hardware import Hardware

TILES = ((256, 128, 1.0), (128, 128, 0.95), (128, 64, 0.8), (64, 64, 0.6))
"""Rows and columns of cuBLAS's usual tiles, and the share of the rate that small ones reach: they read more."""
ALIGNMENT = 8
"""Elements: 16-bit products of sizes that are no multiples of it run at about half the rate."""


@dataclass(frozen=True)
class Seconds:
    """Seconds of a rank by kind; recomputed kernels count in `recompute`."""

    matmul: float = 0.0
    attention: float = 0.0
    elementwise: float = 0.0
    recompute: float = 0.0
    tensor_parallel: float = 0.0
    context_parallel: float = 0.0

    @property
    def total(self) -> float:
        """Sum of all kinds."""
        local = self.matmul + self.attention + self.elementwise + self.recompute
        return local + self.tensor_parallel + self.context_parallel

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(
            self.matmul + other.matmul,
            self.attention + other.attention,
            self.elementwise + other.elementwise,
            self.recompute + other.recompute,
            self.tensor_parallel + other.tensor_parallel,
            self.context_parallel + other.context_parallel,
        )

    def __mul__(self, factor: float) -> Seconds:
        return Seconds(
            factor * self.matmul,
            factor * self.attention,
            factor * self.elementwise,
            factor * self.recompute,
            factor * self.tensor_parallel,
            factor * self.context_parallel,
        )

    def as_recompute(self) -> Seconds:
        """Return the same work as recomputation; communication keeps its kind."""
        own = self.matmul + self.attention + self.elementwise + self.recompute
        return Seconds(recompute=own, tensor_parallel=self.tensor_parallel, context_parallel=self.context_parallel)


@dataclass(frozen=True)
class Passes:
    """Seconds of forward, of the input gradients (with recomputation), and of the weight gradients."""

    forward: Seconds = Seconds()
    backward: Seconds = Seconds()
    weight: Seconds = Seconds()

    @property
    def total(self) -> float:
        """Sum of the three."""
        return self.forward.total + self.backward.total + self.weight.total

    def __add__(self, other: Passes) -> Passes:
        return Passes(self.forward + other.forward, self.backward + other.backward, self.weight + other.weight)

    def __mul__(self, factor: float) -> Passes:
        return Passes(self.forward * factor, self.backward * factor, self.weight * factor)


def peak_of(config: RunConfig, machine: Hardware) -> tuple[str, float]:
    """Return the dtype in which a run's linear layers compute on a device, and its peak FLOP/s: MFU is a share of it.

    Devices without fp8 units compute in 16 bits, and those without bf16 units in fp32.
    """
    device, tf32 = machine.device, config.runtime.tf32
    wanted = (*(["fp8"] if config.fp8.format != "off" else []), config.precision.dtype, "fp32")
    dtype = next(dtype for dtype in wanted if device.peak(dtype, tf32=tf32))
    return dtype, device.peak(dtype, tf32=tf32)


@lru_cache(maxsize=65536)
def product_seconds(
    machine: Hardware, dtype: str, rows: int, columns: int, inner: int, *, batch: int = 1, out_bytes: int = 0
) -> float:
    """Return the seconds of `batch` products [rows, inner] x [inner, columns].

    Args:
        machine: its peak and memory bandwidth.
        dtype: of the operands: fp32, tf32, bf16, fp16 or fp8.
        rows: of the result.
        columns: of the result.
        inner: the dim that is summed over.
        batch: number of equal products.
        out_bytes: bytes read and written for an element of the result; 0: one write in the dtype.
    """
    device, size = machine.device, element_bytes(dtype)
    peak = device.rate("fp32" if dtype == "tf32" else dtype, tf32=dtype == "tf32")
    rate = peak * machine.efficiency.matmul / device.processors
    compute = min(
        ceil(batch * ceil(rows / high) * ceil(columns / wide) / device.processors) * 2 * high * wide * inner / share
        for high, wide, share in TILES
    ) / rate if device.processors > 1 else 2.0 * batch * rows * columns * inner / rate  # fmt: skip
    if size < 4 and (inner % ALIGNMENT or columns % ALIGNMENT):
        compute *= 2
    traffic = batch * ((rows + columns) * inner * size + rows * columns * (out_bytes or size))
    return max(compute, traffic / machine.memory_rate) + device.kernel_seconds


def element_bytes(dtype: str) -> int:
    """Return the bytes of an element; TF32 operands lie in memory as fp32."""
    return {"fp32": 4, "tf32": 4, "fp8": 1}.get(dtype, 2)


class LayerCosts:
    """Seconds of one rank's kernels for a micro-batch, without communication.

    Args:
        config: its model.padded_vocab_size is filled in.
        machine: the rank's device.
        seq_length: s of this iteration.
    """

    def __init__(self, config: RunConfig, machine: Hardware, seq_length: int) -> None:
        self._config, self._machine = config, machine
        self._model, self._tp = config.model, config.parallel.tp
        self.seq_length = seq_length
        self.tokens = max(1, config.batch.micro_batch_size * seq_length // config.parallel.cp)
        dtype: str = config.precision.dtype
        self._dtype = "tf32" if dtype == "fp32" and config.runtime.tf32 else dtype
        self._bytes = element_bytes(dtype)
        self._compiled = config.runtime.compile != "off"

    def layer(self) -> Passes:
        """Return the passes of one layer, without recomputation."""
        return self._linears() + self._attention() + self._elementwise()

    def embedding(self) -> Passes:
        """Return the passes of the embedding: a gather, and a scatter of its gradient in fp32."""
        row = self.tokens * self._model.embedding_width
        return Passes(self._traffic(3 * row * self._bytes), self._traffic(row * (2 * self._bytes + 8)))

    def head(self) -> Passes:
        """Return the passes of output layer and loss.

        The three products are computed in forward, chunk by chunk; statistics and gradient of the loss read and write
        the logits, in fp32 where they are not compiled.
        """
        model, tokens = self._model, self.tokens
        rows = -(-model.vocab_rows // self._tp)
        width = model.embedding_width
        dtype = self._dtype
        products = (
            self._product(tokens, rows, width, dtype=dtype)
            + self._product(tokens, width, rows, dtype=dtype)
            + self._product(rows, width, tokens, dtype=dtype, out_bytes=8)
        )
        passes = 4 * self._bytes if self._compiled else 10 * 4
        norm = self._traffic(6 * tokens * model.hidden_size * self._bytes)
        return Passes(Seconds(matmul=products) + self._traffic(passes * tokens * rows) + norm)

    def _linears(self) -> Passes:
        model, tp, tokens = self._model, self._tp, self.tokens
        queries, groups = model.num_attention_heads * model.head_dim, max(model.num_query_groups, tp) * model.head_dim
        shapes = (
            (model.hidden_size, (queries + 2 * groups) // tp),
            (queries // tp, model.hidden_size),
            (model.hidden_size, (2 if model.gated else 1) * model.ffn_hidden_size // tp),
            (model.ffn_hidden_size // tp, model.hidden_size),
        )
        is_fp8 = peak_of(self._config, self._machine)[0] == "fp8"
        dtype = "fp8" if is_fp8 else self._dtype
        fused = self._config.runtime.gradient_accumulation_fusion and not self._compiled
        # A weight gradient that is not added to the buffer while it is computed is written, read, and added.
        out = 8 if fused or self._dtype in ("fp32", "tf32") else 2 * self._bytes + 8
        forward = backward = weight = 0.0
        for inner, outer in shapes:
            forward += self._product(tokens, outer, inner, dtype=dtype)
            backward += self._product(tokens, inner, outer, dtype=dtype)
            weight += self._product(outer, inner, tokens, dtype=dtype, out_bytes=out)
        passes = Passes(Seconds(matmul=forward), Seconds(matmul=backward), Seconds(matmul=weight))
        if dtype != "fp8":
            return passes
        # Conversion of activations and gradients: an amax and a cast read each once, in both layouts.
        cast = self._traffic(sum(inner + outer for inner, outer in shapes) * tokens * 4)
        return passes + Passes(cast, cast)

    def _attention(self) -> Passes:
        """Return the core of attention: fused (half of the square is masked and not computed), or separate products."""
        model, runtime = self._model, self._config.runtime
        heads, channels = model.num_attention_heads // self._tp, model.head_dim
        queries = self.seq_length // self._config.parallel.cp
        batch = self._config.batch.micro_batch_size * heads
        scores = batch * queries * self.seq_length
        if runtime.attention == "unfused":
            one = self._product(queries, self.seq_length, channels, dtype=self._dtype, batch=batch)
            other = self._product(queries, channels, self.seq_length, dtype=self._dtype, batch=batch)
            dropout = 2.5 if model.attention_dropout else 0.0
            # Scaling and mask, softmax, dropout; backward reads the result of each again.
            forward = self._traffic(scores * (4 + dropout) * self._bytes)
            backward = self._traffic(scores * (5 + dropout) * self._bytes)
            return Passes(
                Seconds(attention=one + other + forward.elementwise),
                Seconds(attention=2 * (one + other) + backward.elementwise),
            )
        # ALiBi's bias is a mask to the kernels, which then compute the whole square.
        flops = 4.0 * scores * channels * (1.0 if model.position_embedding == "alibi" else 0.5)
        peak = self._machine.device.rate(self._config.precision.dtype)
        seconds = flops / (peak * self._machine.efficiency.attention)
        # Backward has five products where forward has two.
        kernel = self._machine.device.kernel_seconds
        return Passes(Seconds(attention=seconds + kernel), Seconds(attention=2.5 * seconds + 2 * kernel))

    def _elementwise(self) -> Passes:
        """Return norms, residuals, dropout, activation, rotation and biases: tensors read and written, times size."""
        model, parallel = self._model, self._config.parallel
        dropout = 5.0 if model.hidden_dropout else 0.0
        hidden = 8.0 if self._compiled else 10.0 + dropout + (4.0 if model.linear_bias else 0.0)
        wide = 3.0 if model.gated and self._compiled else 5.0 if model.gated else 2.0
        rotated = 0.0 if model.position_embedding != "rotary" else 2.0 if self._compiled else 6.0
        queries, groups = model.num_attention_heads * model.head_dim, model.num_query_groups * model.head_dim
        split = self._tp if parallel.sequence_parallel else 1
        elements = hidden * model.hidden_size / split
        elements += (wide * model.ffn_hidden_size + rotated * (queries + groups)) / self._tp
        kernels = 4 if self._compiled else 10
        forward = self._traffic(elements * self.tokens * self._bytes, kernels)
        return Passes(forward, forward * 2.0)

    def _product(self, rows: int, columns: int, inner: int, *, dtype: str, batch: int = 1, out_bytes: int = 0) -> float:
        return product_seconds(
            self._machine, dtype, max(1, rows), max(1, columns), max(1, inner), batch=batch, out_bytes=out_bytes
        )

    def _traffic(self, size: float, kernels: int = 1) -> Seconds:
        return Seconds(elementwise=size / self._machine.memory_rate + kernels * self._machine.device.kernel_seconds)
