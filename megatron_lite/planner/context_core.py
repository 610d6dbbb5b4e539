"""Memory estimate of context-parallel attention: the tensors that model/context_attention.py allocates, simulated.

The tensors of the first context-parallel rank, whose other blocks are later half of its queries and all keys.
"""

from __future__ import annotations

from megatron_lite.config.runtime import MAX_SCORES
from megatron_lite.planner.operators import Operators
from megatron_lite.planner.tape import Storage, Value


class ContextCore(Operators):
    """Attention to the keys of all context-parallel ranks, block by block."""

    def core_over_ranks(self, query: Value, key: Value, value: Value) -> Value:
        """Attention of queries, keys and values of this rank: a value shaped as `query`."""
        tape, again = self.tape, self.recomputes_attention
        own = tape.new(query.size) if query.storage.size > query.size else tape.keep(query)
        kv, rows = tape.new(2 * key.size), tape.new(self._row_bytes(query))
        out = self._forward(query, key)
        inputs = (query, key, value)

        def backward() -> None:
            recomputed: list[Storage] = []
            if again:
                recomputed = [tape.new(query.size), tape.new(2 * key.size), self._forward(query, key).storage]
            self._backward(query, key, value, tape.take_gradient(out))
            tape.drop(*recomputed)

        tape.node(backward, *(inputs if again else (own, kv, out, rows)))
        tape.drop(own, kv, rows)
        return out

    def _forward(self, query: Value, key: Value) -> Value:
        """Allocate what forward needs beside its inputs; return its output."""
        tape, wide = self.tape, 4 * query.elements
        sums = tape.new(wide)
        part, exchanged = tape.new(query.size), self._exchanged(key)
        products = tape.new(self._scores(query, backward=False))
        # Of half the queries: the sums of exponentials before, of the block, and of both, and the scaled output.
        other = tape.new((wide + query.size) // 2 + 3 * self._row_bytes(query))
        tape.drop(products, part, other, exchanged)
        if query.itemsize == 4:
            return Value(sums, query.elements, 4)
        out = tape.tensor(query.elements, query.itemsize)
        tape.drop(sums)
        return out

    def _backward(self, query: Value, key: Value, value: Value, gradient: Storage) -> None:
        tape, kv, gathers = self.tape, 2 * key.size, self.shapes.gathers_keys
        sums, exchanged = tape.new(4 * query.elements), self._exchanged(key)
        of_keys = tape.new(self.shapes.cp * kv if gathers else 8 * key.elements)
        # The gradients of a block are alive until those of the next one are computed.
        of_block, joined = tape.new(query.size + kv), tape.new(kv + self._row_bytes(query))
        products = tape.new(self._scores(query, backward=True))
        tape.drop(products)
        others = kv * (self.shapes.cp - 1 if gathers else 1)
        of_next = tape.new(query.size // 2 + others)
        tape.drop(of_block)
        # Joined; under p2p also the gradient that arrives, of the first chunk.
        joined_next = tape.new(others + (0 if gathers else kv // 2))
        tape.drop(of_next, joined_next, joined, gradient)
        parts = [tape.new(part.size) for part in (key, value)]
        tape.drop(of_keys, exchanged)
        if query.itemsize < 4:
            sums = self.converted(sums, query.size)
        for part, own in zip((query, key, value), (sums, *parts), strict=True):
            tape.add_gradient(part, own)

    def _row_bytes(self, query: Value) -> int:
        """Return the bytes of a number for each head of each query, in fp32."""
        return 4 * (query.elements // self.model.head_dim)

    def _exchanged(self, key: Value) -> Storage:
        """Allocate the keys and values of other ranks: gathered, with a copy of those of a block, or passed on."""
        cp, kv = self.shapes.cp, 2 * key.size
        return self.tape.new((2 * cp - 1 if self.shapes.gathers_keys else min(cp, 4) - 1) * kv)

    def _scores(self, query: Value, *, backward: bool) -> int:
        """Return the bytes of the scores and their gradients, if separate products compute the blocks."""
        model, shapes = self.model, self.shapes
        dropout = model.attention_dropout > 0
        if not (dropout or model.position_embedding == "alibi" or shapes.documents):
            return 0
        length = shapes.tokens // shapes.samples
        keys = max(length, length * (shapes.cp - 1) // 2) if shapes.gathers_keys else length
        heads = query.elements // model.head_dim // shapes.tokens
        scores = min(MAX_SCORES, shapes.samples * heads * length * keys)
        copies = (4 + 2 * dropout) if backward else (3 + dropout)
        # The mask of ALiBi is that of one sample.
        biases = 0 if model.position_embedding != "alibi" else scores // shapes.samples
        return 4 * (scores * copies + biases)
