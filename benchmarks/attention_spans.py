"""--reset-attention-mask without a mask in memory against with it: attention and its projections, there and back.

    OMP_NUM_THREADS=1 python benchmarks/attention_spans.py [--hidden-size 512] [--repeats 5]

Prints milliseconds of both (the best of the repeats, which take turns) and the ratio.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch

from megatron_lite.backend.environment import Launch
from megatron_lite.backend.select import select_backend
from megatron_lite.config.model import ModelConfig
from megatron_lite.config.parallel import ParallelConfig
from megatron_lite.config.runtime import RuntimeConfig
from megatron_lite.data.serving.masks import document_ids, document_rows
from megatron_lite.model.attention import AttentionContext
from megatron_lite.model.batch import Documents, MicroBatch
from megatron_lite.model.gpt import GPTStage
from megatron_lite.parallel.mesh import build_mesh
from megatron_lite.parallel.random import RngStreams

EOD = 0
CASES = {
    "b2 s2048, 3 documents a sample": (2, 2048, 3, 0),
    "b1 s4096, 4 documents a sample": (1, 4096, 4, 0),
    "b2 s2048, 32 documents a sample": (2, 2048, 32, 0),
    "b2 s2048, 3 documents and 200 of padding": (2, 2048, 3, 200),
}
"""Samples, tokens of each, documents in each, and one-token documents at its end."""


def main() -> None:
    """Measure every case, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    for name, case in CASES.items():
        batch = synthesise(*case)
        stage = one_layer(options.hidden_size, batch.tokens.shape[1])
        assert batch.documents is not None
        masked = AttentionContext(mask=stage.mask(batch.tokens.shape[1], 0, batch.document_ids))
        contexts = (masked, AttentionContext(documents=batch.documents))
        hidden = torch.randn(*batch.tokens.t().shape, options.hidden_size, requires_grad=True)
        seconds = [[measure(stage, hidden, context) for context in contexts] for _ in range(options.repeats + 1)][1:]
        mask, apart = (min(times) * 1000 for times in zip(*seconds, strict=True))
        print(f"{name}: mask {mask:.0f} ms, apart {apart:.0f} ms ({len(batch.documents.groups)} calls)", end="")
        print(f": ratio {mask / apart:.2f}")


def synthesise(size: int, length: int, count: int, padding: int) -> MicroBatch:
    """Random documents, each ended by EOD, then padding with EOD."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 100, (size, length))
    for row in tokens:
        row[rng.choice(length - padding - 1, count - 1, replace=False)] = EOD
        row[length - padding - 1 :] = EOD
    ids = document_ids(tokens, EOD)
    found = document_rows(ids)
    assert found is not None
    rows, places, groups = found
    documents = Documents(torch.from_numpy(rows), torch.from_numpy(places), groups)
    text = torch.from_numpy(tokens)
    return MicroBatch(text, text, document_ids=torch.from_numpy(ids), documents=documents)


def one_layer(hidden_size: int, length: int) -> GPTStage:
    """A stage of one layer, without embedding and head; heads of 64 channels."""
    config = ModelConfig(
        num_layers=1,
        hidden_size=hidden_size,
        num_attention_heads=hidden_size // 64,
        max_position_embeddings=length,
        vocab_size=100,
        padded_vocab_size=128,
        hidden_dropout=0.0,
        attention_dropout=0.0,
    )
    mesh = build_mesh(select_backend(RuntimeConfig(device="cpu"), ParallelConfig(), Launch()), ParallelConfig())
    return GPTStage(
        config,
        layers=range(1),
        has_embedding=False,
        has_head=False,
        mesh=mesh,
        rng=RngStreams(7, mesh.backend),
        seed=1234,
        dtype=torch.float32,
    )


def measure(stage: GPTStage, hidden: torch.Tensor, context: AttentionContext) -> float:
    """Seconds of a forward and backward of the layer's attention."""
    began = time.perf_counter()
    stage.decoder.layers["0"].self_attention(hidden, context).sum().backward()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
