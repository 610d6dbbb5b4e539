"""Benchmark of document-masked attention: varlen by document length against a mask in memory, forward and backward.

    OMP_NUM_THREADS=1 python benchmarks/attention_spans.py [--hidden-size 512] [--repeats 5]

Measures the attention of one layer with its projections. Prints milliseconds of both (the best of the repeats, which
alternate) and the ratio.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch

from megatron_lite.backend.environment import Launch
from megatron_lite.backend.select import select_backend
from megatron_lite.config.batch import BatchConfig
from megatron_lite.config.model import ModelConfig
from megatron_lite.config.parallel import ParallelConfig
from megatron_lite.config.run import RunConfig
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
"""(samples, tokens per sample, documents per sample, one-token documents of padding at its end)."""


def main() -> None:
    """Measure and print every case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    for name, case in CASES.items():
        batch, ids = synthesize(*case)
        stage = one_layer(options.hidden_size, batch.tokens.shape[1])
        assert batch.documents is not None
        masked = AttentionContext(mask=(ids.unsqueeze(2) == ids.unsqueeze(1)).unsqueeze(1).tril())
        contexts = (masked, AttentionContext(documents=batch.documents))
        hidden = torch.randn(*batch.tokens.t().shape, options.hidden_size, requires_grad=True)
        seconds = [[measure(stage, hidden, context) for context in contexts] for _ in range(options.repeats + 1)][1:]
        mask, varlen = (min(times) * 1000 for times in zip(*seconds, strict=True))
        print(f"{name}: mask {mask:.0f} ms, varlen {varlen:.0f} ms ({len(batch.documents.groups)} calls)", end="")
        print(f": ratio {mask / varlen:.2f}")


def synthesize(size: int, length: int, count: int, padding: int) -> tuple[MicroBatch, torch.Tensor]:
    """Return random documents, each ended by EOD, then padding of EOD tokens; and document numbers [b, s]."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 100, (size, length))
    for row in tokens:
        row[rng.choice(length - padding - 1, count - 1, replace=False)] = EOD
        row[length - padding - 1 :] = EOD
    ids = document_ids(tokens, EOD)
    found = document_rows(ids)
    assert found is not None
    order, inverse, groups, cu_seqlens = found
    order, inverse, cu_seqlens = (torch.from_numpy(array) for array in (order, inverse, cu_seqlens))
    documents = Documents(order, inverse, groups, cu_seqlens)
    text = torch.from_numpy(tokens)
    return MicroBatch(text, text, documents=documents), torch.from_numpy(ids)


def one_layer(hidden_size: int, length: int) -> GPTStage:
    """Return a model of one layer with heads of 64 channels."""
    model = ModelConfig(
        num_layers=1,
        hidden_size=hidden_size,
        num_attention_heads=hidden_size // 64,
        max_position_embeddings=length,
        vocab_size=100,
        padded_vocab_size=128,
        hidden_dropout=0.0,
        attention_dropout=0.0,
    )
    config = RunConfig(model=model, batch=BatchConfig(seq_length=length, micro_batch_size=1))
    mesh = build_mesh(select_backend(RuntimeConfig(device="cpu"), ParallelConfig(), Launch()), ParallelConfig())
    return GPTStage(config, range(1), mesh, RngStreams(7, mesh.backend))


def measure(stage: GPTStage, hidden: torch.Tensor, context: AttentionContext) -> float:
    """Return the seconds of a forward and backward pass of the layer's attention."""
    began = time.perf_counter()
    stage.decoder.layers["0"].self_attention(hidden, context).sum().backward()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
