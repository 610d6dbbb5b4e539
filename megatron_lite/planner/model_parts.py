"""Memory estimate of a transformer layer, embedding and head, as sequences of simulated operators.

They mirror model/layer.py, model/attention.py, model/embedding.py and model/head.py.
"""

from __future__ import annotations

from megatron_lite.planner.context_core import ContextCore
from megatron_lite.planner.tape import Storage, Value


class ModelParts(ContextCore):
    """Parts of a pipeline stage on a tape."""

    def layer(self, x: Value) -> Value:
        """Transformer layer: `x` [s/tp or s, b, h] -> the same shape."""
        tape, model, hidden = self.tape, self.model, self.model.hidden_size
        normed = self.norm(x, hidden)
        if model.parallel_residual:
            attended = self.attention(normed)
            inner = self.norm(x, hidden)
            beside = self.add(x, self.mlp(inner))
            y = self.add(beside, attended)
            tape.drop(normed, inner, beside)
            return y
        middle = self.add(normed if model.residual_post_layernorm else x, self.attention(normed))
        tape.drop(normed)
        normed = self.norm(middle, hidden)
        y = self.add(normed if model.residual_post_layernorm else middle, self.mlp(normed))
        tape.drop(normed, middle)
        return y

    def head(self, x: Value) -> Value:
        """Final norm, and the projection to a factorized embedding: `x` [s/tp or s, b, h] -> [s/tp or s, b, E]."""
        y = self.norm(x, self.model.hidden_size)
        return self._projected(y, self.model.hidden_size, self.model.embedding_size) if self.model.embedding_size else y

    def embedding(self) -> Value:
        """Embedding of the micro-batch's tokens -> [s/tp or s, b, h]."""
        tape, model, shapes = self.tape, self.model, self.shapes
        width, tokens, local = model.embedding_width, shapes.tokens, shapes.local_tokens
        indices = tape.new(8 * tokens if shapes.samples > 1 else 0)  # [b, s] to [s, b]
        if shapes.tp > 1:
            indices = self._masked(indices)
        elsewhere = tape.new(tokens if shapes.tp > 1 else 0)
        x = tape.tensor(tokens * width, shapes.itemsize)
        if shapes.tp > 1:
            x = self.replaced(x, tape.tensor(tokens * width, shapes.itemsize))
            x = self.replaced(x, tape.tensor(local * width, shapes.itemsize))
        looked_up = x
        rows = model.vocab_rows // shapes.tp

        def backward() -> None:
            gradient = tape.take_gradient(looked_up)
            if shapes.split:
                gradient = self.converted(gradient, tokens * width * shapes.itemsize)
            if shapes.tp > 1:
                gradient = self.converted(gradient, tokens * width * shapes.itemsize)
            table = tape.new(rows * width * shapes.itemsize)
            tape.drop(gradient, table)

        tape.node(backward, indices, elsewhere)
        tape.drop(indices, elsewhere)
        if model.embed_layernorm:
            x = self.replaced(x, self.norm(x, width))
        if model.position_embedding == "learned":
            x = self._with_positions(x)
        if model.embedding_size:
            x = self._projected(x, width, model.hidden_size)
        if model.fp32_residual and x.itemsize < 4:
            x = self.replaced(x, self.cast(x, 4))
        return self.dropout(x, model.hidden_dropout)

    def mlp(self, x: Value) -> Value:
        """MLP: `x` [s/tp or s, b, h] -> the same shape."""
        model, width = self.model, self.model.ffn_hidden_size // self.shapes.tp
        inner = self.column(x, model.hidden_size, width * (2 if model.gated else 1))
        activated = self.gated(inner) if model.gated else self.activation(inner)
        y = self.row(activated, width, model.hidden_size, bias=model.linear_bias)
        self.tape.drop(inner, activated)
        return y

    def activation(self, x: Value) -> Value:
        """Activation of a MLP that is not gated; relu saves its result, gelu its input."""
        tape, kind = self.tape, self.model.activation
        y = tape.tensor(x.elements, x.itemsize)

        def backward() -> None:
            gradient = tape.take_gradient(y)
            tape.add_gradient(x, tape.new(x.size))
            tape.drop(gradient)

        tape.node(backward, x if kind in ("gelu", "gelu_tanh") else y)
        if kind != "squared_relu":
            return y
        rectified, squared = y, tape.tensor(x.elements, x.itemsize)

        def backward_of_square() -> None:
            gradient = tape.take_gradient(squared)
            copy, twice = tape.new(x.size), tape.new(x.size)
            tape.add_gradient(rectified, tape.new(x.size))
            tape.drop(copy, twice, gradient)

        tape.node(backward_of_square, rectified)
        tape.drop(rectified)
        return squared

    def gated(self, x: Value) -> Value:
        """Product of activation(gate) and up, the halves of `x`."""
        tape, kind = self.tape, self.model.activation
        half = x.elements // 2
        gate = tape.view(x, half) if kind == "liglu" else tape.tensor(half, x.itemsize)
        y = tape.tensor(half, x.itemsize)

        def backward() -> None:
            gradient = tape.take_gradient(y)
            of_gate, of_up = tape.new(y.size), tape.new(y.size)
            tape.drop(gradient)
            if kind != "liglu":
                of_gate = self.converted(of_gate, y.size)
            joined = tape.new(x.size)
            tape.drop(of_gate, of_up)
            tape.add_gradient(x, joined)

        tape.node(backward, gate, x)
        tape.drop(gate)
        return y

    def attention(self, x: Value) -> Value:
        """Self-attention with its projections: `x` [s/tp or s, b, h] -> the same shape."""
        tape, model, shapes = self.tape, self.model, self.shapes
        tokens, groups = shapes.tokens, model.num_query_groups // shapes.tp
        width, of_keys = model.num_attention_heads // shapes.tp * model.head_dim, groups * model.head_dim
        qkv = self.column(x, model.hidden_size, width + 2 * of_keys)
        # With several query heads in each of several groups, the queries are copied.
        copies = groups > 1 and width > of_keys
        query = tape.tensor(tokens * width, qkv.itemsize) if copies else tape.view(qkv, tokens * width)
        key, value = (tape.view(qkv, tokens * of_keys) for _ in range(2))
        parts = query, key, value

        def backward() -> None:
            gradients = [tape.take_gradient(part) for part in parts]
            joined = tape.new(qkv.size)
            tape.drop(*gradients)
            tape.add_gradient(qkv, joined)

        tape.node(backward)
        tape.drop(qkv)
        if model.qk_layernorm:
            query, key = (self.replaced(part, self.norm(part, model.head_dim)) for part in (query, key))
        if model.position_embedding == "rotary":
            query, key = (self.replaced(part, self.rotate(part)) for part in (query, key))
        # The other kernels do not take grouped heads.
        if shapes.cp == 1 and width > of_keys and not self.uses_flash_attention:
            key, value = (self.replaced(part, self._repeated(part, tokens * width)) for part in (key, value))
        if shapes.documents and shapes.cp == 1:  # in the order of the documents
            query, key, value = (self.replaced(part, self.cast(part, part.itemsize)) for part in (query, key, value))
        out = (self.core if shapes.cp == 1 else self.core_over_ranks)(query, key, value)
        if shapes.documents and shapes.cp == 1:
            out = self.replaced(out, self.cast(out, out.itemsize))
        y = self.row(out, width, model.hidden_size, bias=model.linear_bias)
        tape.drop(query, key, value, out)
        return y

    def core(self, query: Value, key: Value, value: Value) -> Value:
        """Attention kernel that keeps no attention matrix, but the logarithm of each row's sum, in fp32."""
        tape, again = self.tape, self.recomputes_attention
        out, rows = tape.tensor(query.elements, query.itemsize), 4 * (query.elements // self.model.head_dim)
        sums = tape.new(rows)
        # The memory-efficient kernel's result has the samples first, and torch's linear function copies it.
        shapes = self.shapes
        copies = shapes.samples > 1 and not self.uses_flash_attention and not shapes.own_functions

        def backward() -> None:
            recomputed = [tape.new(out.size), tape.new(rows)] if again else []
            gradient = tape.take_gradient(out)
            gradients = [tape.new(part.size) for part in (query, key, value)]
            tape.drop(gradient, *recomputed)
            for part, own in zip((query, key, value), gradients, strict=True):
                tape.add_gradient(part, own)

        saved: tuple[Value | Storage, ...] = (query, key, value)
        tape.node(backward, *saved, *(() if again else (out, sums)))
        tape.drop(sums)
        return self.replaced(out, self.cast(out, out.itemsize)) if copies else out

    @property
    def uses_flash_attention(self) -> bool:
        """True for FlashAttention, which needs half precision and has no bias."""
        return self.shapes.itemsize < 4 and self.model.position_embedding != "alibi"

    def rotate(self, x: Value) -> Value:
        """Rotary embedding of a share of each head's channels, computed in fp32; only tables are saved."""
        tape, model = self.tape, self.model
        rotated = int(model.head_dim * model.rotary_percent) // 2 * 2
        elements = x.elements // model.head_dim * rotated
        size, itemsize = 4 * elements, x.itemsize
        # The converted input, its rotated partner, both products and their sum.
        held = [tape.new(size) for _ in range(5 if itemsize < 4 else 4)]
        if itemsize < 4 or rotated < model.head_dim:
            turned = tape.new(itemsize * elements)
            tape.drop(*held)
            held = [turned]
        if rotated < model.head_dim:
            held.append(tape.new(x.size))
        y = Value(held.pop(), x.elements, itemsize)
        tape.drop(*held)

        def backward() -> None:
            gradient = tape.take_gradient(y)
            if itemsize < 4:
                gradient = self.converted(gradient, size)
            direct, partner = tape.new(size), tape.new(size)
            tape.drop(gradient)
            parts = [tape.new(size // 2), tape.new(size)]
            tape.drop(partner, *parts)
            if itemsize < 4:
                direct = self.converted(direct, itemsize * elements)
            if rotated < model.head_dim:
                direct = self.converted(direct, x.size)
            tape.add_gradient(x, direct)

        tape.node(backward)
        return y

    def _masked(self, indices: Storage) -> Storage:
        """Return indices of this rank's rows, computed from others with masks of a byte a token."""
        tape, tokens = self.tape, self.shapes.tokens
        rows, masks = tape.new(8 * tokens), [tape.new(tokens) for _ in range(3)]
        tape.drop(*masks, indices)
        return self.converted(rows, 8 * tokens)

    def _with_positions(self, x: Value) -> Value:
        """Add learned positions, whose gradient is a table of all positions."""
        tape, model = self.tape, self.model
        y = tape.tensor(x.elements, x.itemsize)

        def backward() -> None:
            gradient = tape.take_gradient(y)
            table = tape.new(model.max_position_embeddings * model.embedding_width * x.itemsize)
            tape.drop(table)
            tape.add_gradient(x, gradient)

        tape.node(backward)
        tape.drop(x)
        return y

    def _projected(self, x: Value, inputs: int, outputs: int) -> Value:
        """Replicated linear layer of the embedding or the head, a function of torch."""
        tape = self.tape
        y = tape.tensor(x.elements // inputs * outputs, x.itemsize)

        def backward() -> None:
            gradient = tape.take_gradient(y)
            of_input, of_weight = tape.new(x.size), tape.new(inputs * outputs * x.itemsize)
            tape.drop(gradient, of_weight)
            tape.add_gradient(x, of_input)

        tape.node(backward, x)
        tape.drop(x)
        return y

    def cast(self, x: Value, itemsize: int) -> Value:
        """Convert or copy a tensor."""
        tape = self.tape
        y = tape.tensor(x.elements, itemsize)

        def backward() -> None:
            tape.add_gradient(x, self.converted(tape.take_gradient(y), x.size))

        tape.node(backward)
        return y

    def _repeated(self, x: Value, elements: int) -> Value:
        tape = self.tape
        y = tape.tensor(elements, x.itemsize)

        def backward() -> None:
            tape.add_gradient(x, self.converted(tape.take_gradient(y), x.size))

        tape.node(backward)
        return y
