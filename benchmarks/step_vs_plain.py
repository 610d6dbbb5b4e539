"""Benchmark of the training step against the same GPT-2 in plain eager PyTorch: same shapes and data, one process.

    python benchmarks/step_vs_plain.py
    python benchmarks/step_vs_plain.py --device cuda --dtype bf16 --layers 12 --hidden 768 --heads 12 --seq 1024

Steps alternate (ours, plain, ours, ...), so that changes of the clock rate affect both; medians are compared. The
plain model uses nn.Linear, scaled_dot_product_attention, F.cross_entropy, clip_grad_norm_ and fused AdamW. Our step is
that of a run, from the plan of an iteration to its reported loss.
Exit code 1 if ours is slower than --limit times plain.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megatron_lite.backend.environment import Launch
from megatron_lite.backend.select import select_backend
from megatron_lite.config.batch import BatchConfig
from megatron_lite.config.learning_rate import LrConfig
from megatron_lite.config.model import ModelConfig
from megatron_lite.config.optimizer import PrecisionConfig
from megatron_lite.config.run import RunConfig
from megatron_lite.config.runtime import RuntimeConfig
from megatron_lite.config.training import TrainingConfig
from megatron_lite.model.batch import MicroBatch
from megatron_lite.parallel.mesh import build_mesh
from megatron_lite.schedules.iteration import plan_iteration
from megatron_lite.schedules.progress import Progress
from megatron_lite.train.assemble import build_engine

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Step = Callable[[Tensor], Tensor]


class PlainBlock(nn.Module):
    """GPT-2 layer in the style of nanoGPT: one qkv projection, scaled_dot_product_attention."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.c_attn, self.c_proj = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.c_fc, self.c_proj2 = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)
        self.gelu = nn.GELU(approximate="tanh")

    def forward(self, x: Tensor) -> Tensor:
        """`x` [b, s, h] -> [b, s, h]."""
        b, s, h = x.shape
        q, k, v = self.c_attn(self.ln_1(x)).split(h, dim=2)
        q, k, v = (t.view(b, s, self.heads, h // self.heads).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.c_proj(y.transpose(1, 2).contiguous().view(b, s, h))
        return x + self.c_proj2(self.gelu(self.c_fc(self.ln_2(x))))


class PlainGPT2(nn.Module):
    """GPT-2 with a tied head."""

    def __init__(self, vocab: int, length: int, layers: int, hidden: int, heads: int) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocab, hidden), nn.Embedding(length, hidden)
        self.blocks = nn.ModuleList(PlainBlock(hidden, heads) for _ in range(layers))
        self.ln_f = nn.LayerNorm(hidden)
        self.head = nn.Linear(hidden, vocab, bias=False)
        self.head.weight = self.wte.weight
        for param in self.parameters():
            if param.dim() > 1:
                nn.init.normal_(param, 0.0, 0.02)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """`tokens` and `labels` [b, s] -> mean loss, a scalar."""
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.ln_f(x))
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), labels.reshape(-1))


def plain_step(args: argparse.Namespace, device: torch.device) -> Step:
    """Return a function that runs forward, backward and AdamW of the plain model on tokens [b, s + 1]."""
    model = PlainGPT2(args.vocab, args.seq, args.layers, args.hidden, args.heads).to(device, DTYPES[args.dtype])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01, fused=True)

    def step(tokens: Tensor) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss: Tensor = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.detach()

    return step


def gpt2_model(layers: int, hidden: int, heads: int, length: int, vocab: int) -> ModelConfig:
    """Return the architecture of PlainGPT2."""
    return ModelConfig(
        num_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        max_position_embeddings=length,
        vocab_size=vocab,
        padded_vocab_size=vocab,
        hidden_dropout=0.0,
        attention_dropout=0.0,
    )


def our_step(args: argparse.Namespace) -> Step:
    """Return a function that runs the training step of a run: executor, gradient buffers, clipping, optimizer, loss."""
    config = RunConfig(
        model=gpt2_model(args.layers, args.hidden, args.heads, args.seq, args.vocab),
        batch=BatchConfig(seq_length=args.seq, micro_batch_size=args.batch, global_batch_size=args.batch),
        training=TrainingConfig(train_iters=10**6),
        lr=LrConfig(lr=1e-4, style="constant"),
        precision=PrecisionConfig(dtype=args.dtype),
        runtime=RuntimeConfig(device=args.device),
    )
    mesh = build_mesh(select_backend(config.runtime, config.parallel, Launch()), config.parallel)
    engine = build_engine(config, mesh)
    plan = plan_iteration(config, Progress())

    def step(tokens: Tensor) -> Tensor:
        batch = MicroBatch(tokens[:, :-1], tokens[:, 1:])
        return torch.tensor(engine.train_step(plan, lambda number: batch).outcome().loss)

    return step


def measure(steps: dict[str, Step], args: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """Return the median seconds of each step, alternating between the steps."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, args.vocab, (args.batch, args.seq + 1), generator=generator).to(device)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(args.warmup + args.steps):
        for name, step in steps.items():
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            start = time.perf_counter()
            step(tokens)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if turn >= args.warmup:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--dtype", default="fp32", choices=tuple(DTYPES))
    for name, value in (("layers", 4), ("hidden", 256), ("heads", 4), ("seq", 256), ("batch", 4), ("vocab", 8192)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: torch's choice")
    parser.add_argument("--limit", type=float, default=1.05)
    return parser.parse_args()


def main() -> int:
    """Measure and print the ratio; return 1 if it is above --limit."""
    args = arguments()
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(1234)
    device = torch.device(args.device)
    median = measure({"ours": our_step(args), "plain": plain_step(args, device)}, args, device)
    ratio = median["ours"] / median["plain"]
    tokens = args.batch * args.seq
    for name, value in median.items():
        print(f"{name:>5}: {value * 1e3:8.2f} ms a step, {tokens / value:10,.0f} tokens/s")
    print(f"ratio: {ratio:.3f} (limit {args.limit:g})")
    return int(ratio > args.limit)


if __name__ == "__main__":
    sys.exit(main())
