"""Matrix of layouts that must train the same model: a covering set, a runner, and deviations between two runs.

Each cell trains 20 iterations of a tiny model on the same samples through the real engine. The batch ramps up from 2
micro-batches over 6 to 10, so replicas hold uneven numbers of them, and where there are more than two, none at first.
"""

import dataclasses
import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from megatron_lite.config.batch import BatchConfig, Rampup
from megatron_lite.config.data import DataConfig
from megatron_lite.config.learning_rate import LrConfig
from megatron_lite.config.model import ModelConfig
from megatron_lite.config.optimizer import OptimizerConfig, PrecisionConfig, RecomputeConfig
from megatron_lite.config.parallel import ParallelConfig
from megatron_lite.config.run import RunConfig
from megatron_lite.config.runtime import RuntimeConfig
from megatron_lite.config.training import TrainingConfig
from megatron_lite.config.tuning import TuningConfig
from megatron_lite.config.vocabulary import padded_vocab_size
from megatron_lite.data.serving import masks
from megatron_lite.model.batch import Documents, MicroBatch
from megatron_lite.parallel.mesh import build_mesh
from megatron_lite.schedules.iteration import plan_iteration
from megatron_lite.schedules.microbatches import microbatch_number, num_microbatches
from megatron_lite.schedules.progress import Progress
from megatron_lite.train.assemble import build_engine
from megatron_lite.train.deepspeed import build_deepspeed_engine

VOCABULARY, LENGTH, ITERATIONS, EVALUATED = 41, 16, 20, 6
EOD = 7
GPT2 = {"hidden_size": 32, "num_attention_heads": 8, "max_position_embeddings": LENGTH}
LLAMA = {"position_embedding": "rotary", "activation": "swiglu", "normalization": "RMSNorm", "tied_embeddings": False}
LLAMA |= {"num_query_groups": 4, "linear_bias": False, "qkv_bias": False, "qk_layernorm": True, "ffn_hidden_size": 48}
BLOOM = {"position_embedding": "alibi", "embed_layernorm": True}
ALBERT = {"share_layers": "all", "embedding_size": 16}
MODELS = {"gpt2": GPT2, "llama": GPT2 | LLAMA, "bloom": GPT2 | BLOOM, "albert": GPT2 | ALBERT}
MODELS |= {
    "groups": GPT2 | {"share_layers": "2"},
    "one mlp": GPT2 | LLAMA | {"share_layers": "mlp", "embedding_size": 8},
}
NO_TUNING = TuningConfig()
DROPOUT = {"": (0.0, 0.0), "hidden": (0.1, 0.0), "all": (0.1, 0.1)}


@dataclass(frozen=True)
class Cell:
    """One layout and its model."""

    tp: int = 1
    cp: int = 1
    pp: int = 1
    dp: int = 1
    exchange: str = "p2p"
    schedule: str = "1f1b"
    layers_per_chunk: int = 0
    sequence_parallel: bool = False
    zero1: bool = False
    recompute: str = ""
    model: str = "gpt2"
    dropout: str = ""
    dtype: str = "fp32"
    first_layers: int = 0
    layers: int = 4
    micro_batch: int = 1
    bucket_megabytes: int = 1
    documents: bool = False
    tuning: TuningConfig = NO_TUNING
    optimizer: str = "adam"
    ema: float = 0.0

    @property
    def world(self):
        return self.tp * self.cp * self.pp * self.dp

    @property
    def chunks(self):
        return self.layers // self.pp // self.layers_per_chunk if self.layers_per_chunk else 1

    def reference(self):
        """Return the smallest layout with equal random numbers: one process, or the axes that split dropout's masks."""
        tp = self.tp if self.dropout and (self.dropout == "all" or self.sequence_parallel) else 1
        split = self.sequence_parallel and tp > 1
        micro_batch = self.micro_batch if self.dropout else 1
        same = {"model": self.model, "layers": self.layers, "dropout": self.dropout, "dtype": self.dtype}
        same |= {"documents": self.documents, "tuning": self.tuning, "optimizer": self.optimizer, "ema": self.ema}
        cp = self.cp if self.dropout else 1
        same |= {"cp": cp, "exchange": self.exchange if cp > 1 and self.dropout == "all" else "p2p"}
        return Cell(tp=tp, sequence_parallel=split, micro_batch=micro_batch, **same)

    def config(self):
        hidden_dropout, attention_dropout = DROPOUT[self.dropout]
        model = ModelConfig(
            **MODELS[self.model],
            num_layers=self.layers,
            vocab_size=VOCABULARY,
            padded_vocab_size=padded_vocab_size(VOCABULARY, 4, self.tp),
            hidden_dropout=hidden_dropout,
            attention_dropout=attention_dropout,
            init_std=0.1,
        )
        parallel = ParallelConfig(
            world_size=self.world,
            tp=self.tp,
            cp=self.cp,
            cp_comm_type=self.exchange,
            pp=self.pp,
            pipeline_schedule=self.schedule,
            num_layers_per_virtual_stage=self.layers_per_chunk,
            sequence_parallel=self.sequence_parallel,
            distributed_optimizer=self.zero1,
            first_stage_layers=self.first_layers,
            bucket_megabytes=self.bucket_megabytes,
        )
        return RunConfig(
            model=model,
            parallel=parallel,
            batch=BatchConfig(
                seq_length=LENGTH,
                micro_batch_size=self.micro_batch,
                global_batch_size=10,
                rampup=Rampup(start=2, increment=4, samples=48),
            ),
            data=DataConfig(reset_attention_mask=self.documents),
            training=TrainingConfig(train_iters=ITERATIONS),
            tuning=self.tuning,
            lr=LrConfig(lr=2e-3, min_lr=2e-4, style="cosine", warmup_iters=3),
            # An epsilon above the rounding errors of small gradients keeps a rule from turning them into full steps.
            optimizer=OptimizerConfig(
                kind=self.optimizer, weight_decay=0.1, adam_eps=1e-2, adafactor_eps1=1e-4, ema_decay=self.ema
            ),
            # DeepSpeed's local gradients are larger by the number of replicas: none overflows.
            precision=PrecisionConfig(dtype=self.dtype, initial_loss_scale=2.0**10),
            recompute=RecomputeConfig(granularity=self.recompute or "none"),
            runtime=RuntimeConfig(device="cpu", seed=1234),
        )

    def __str__(self):
        context = f"-cp{self.cp}-{self.exchange}" if self.cp > 1 else ""
        parts = [f"tp{self.tp}{context}-pp{self.pp}-dp{self.dp}", self.model]
        parts += [self.schedule] if self.pp > 1 or self.schedule != "1f1b" else []
        parts += [f"v{self.chunks}"] if self.layers_per_chunk else []
        parts += [word for word, on in (("sp", self.sequence_parallel), ("zero1", self.zero1)) if on]
        parts += [f"recompute_{self.recompute}"] if self.recompute else []
        parts += [f"layers{self.layers}"] if self.layers != 4 else []
        parts += [f"micro{self.micro_batch}"] if self.micro_batch != 1 else []
        parts += [f"first{self.first_layers}"] if self.first_layers else []
        parts += [f"bucket{self.bucket_megabytes}"] if self.bucket_megabytes != 1 else []
        parts += ["documents"] if self.documents else []
        parts += [self.optimizer] if self.optimizer != "adam" else []
        parts += [f"ema{self.ema}"] if self.ema else []
        parts += [f"dropout_{self.dropout}"] if self.dropout else []
        return "-".join([*parts, self.dtype] if self.dtype != "fp32" else parts)


SP, ZERO1, GATHER = {"sequence_parallel": True}, {"zero1": True}, {"exchange": "all_gather"}
CELLS = (
    # world 1
    Cell(recompute="full"),
    Cell(recompute="selective", model="llama", micro_batch=2),
    Cell(schedule="zb-h1"),
    # world 2: one axis at a time
    Cell(tp=2),
    Cell(tp=2, model="llama", **SP, recompute="selective"),
    Cell(tp=2, dropout="hidden"),
    Cell(dp=2, model="bloom"),
    Cell(dp=2, model="llama", **ZERO1, bucket_megabytes=0),
    Cell(pp=2),
    Cell(pp=2, model="llama", schedule="gpipe"),
    Cell(pp=2, model="bloom", schedule="interleaved", layers_per_chunk=1),
    Cell(pp=2, model="llama", schedule="zb-h1", recompute="full"),
    Cell(pp=2, layers=5, schedule="zb-v", first_layers=2),
    Cell(pp=2, schedule="zb-v", dropout="all", recompute="full"),
    Cell(pp=2, schedule="zb-v", dtype="bf16"),
    # world 4: two axes
    Cell(tp=4, layers=2, model="bloom", **SP, recompute="full", micro_batch=2),
    Cell(dp=4, bucket_megabytes=0, dropout="all"),
    Cell(dp=4, **ZERO1, dtype="bf16"),
    Cell(pp=4, schedule="gpipe", recompute="selective"),
    Cell(pp=4, model="bloom", schedule="zb-h1"),
    Cell(pp=4, layers=8, schedule="zb-v"),
    Cell(tp=2, pp=2, model="bloom", schedule="interleaved", layers_per_chunk=1),
    Cell(tp=2, pp=2, schedule="zb-h1", **SP, documents=True),
    Cell(tp=2, pp=2, **SP, dropout="all"),
    Cell(tp=2, dp=2, model="llama", **SP, **ZERO1),
    Cell(pp=2, dp=2, schedule="1f1b", **ZERO1),
    Cell(pp=2, dp=2, model="llama", schedule="zb-v", bucket_megabytes=0),
    # world 8: three axes, and the largest size of each
    Cell(tp=8, layers=2, micro_batch=2),
    Cell(pp=8, layers=8, model="bloom"),
    Cell(dp=8, model="llama", **ZERO1),
    Cell(tp=2, pp=2, dp=2, **SP, **ZERO1, recompute="selective"),
    Cell(tp=2, pp=2, dp=2, model="llama", schedule="gpipe", first_layers=3),
    Cell(tp=2, pp=2, dp=2, model="bloom", schedule="interleaved", layers_per_chunk=1, **ZERO1, recompute="full"),
    Cell(tp=2, pp=2, dp=2, schedule="zb-h1", **SP, **ZERO1, dropout="all"),
    Cell(tp=2, pp=2, dp=2, schedule="zb-v", **SP, **ZERO1, bucket_megabytes=0, documents=True),
    Cell(tp=2, pp=2, dp=2, model="llama", schedule="interleaved", layers_per_chunk=1, **SP, **ZERO1, dtype="bf16"),
    Cell(tp=4, pp=2, model="llama", schedule="zb-v", recompute="selective", micro_batch=2),
    Cell(pp=4, dp=2, layers=8, schedule="interleaved", layers_per_chunk=1, **ZERO1, dropout="all"),
    # context parallelism
    Cell(cp=2, documents=True),
    Cell(cp=2, model="bloom", **GATHER, recompute="full"),
    Cell(cp=4, model="llama", recompute="selective", micro_batch=2),
    Cell(cp=4, **GATHER, **ZERO1, documents=True),
    Cell(tp=2, cp=2, model="llama", **SP, **GATHER),
    Cell(cp=2, pp=2, model="bloom", schedule="zb-v", documents=True),
    Cell(cp=2, dp=2, **ZERO1, dropout="all"),
    Cell(cp=2, dp=2, model="llama", **GATHER, dtype="bf16"),
    Cell(tp=2, cp=2, pp=2, layers=2, **SP, **GATHER, dropout="all"),
    Cell(cp=2, pp=2, dp=2, model="llama", schedule="interleaved", layers_per_chunk=1, **ZERO1),
    # shared layers
    Cell(pp=2, model="groups", schedule="zb-h1", first_layers=1),
    Cell(tp=2, dp=2, model="one mlp", **SP, recompute="selective"),
    Cell(pp=2, dp=2, model="albert", schedule="interleaved", layers_per_chunk=1, **ZERO1),
    Cell(tp=2, pp=2, dp=2, model="albert", schedule="zb-v", **SP, **ZERO1, recompute="full", dropout="all"),
)


@dataclass
class Outcome:
    """Result of a layout: losses and gradient norms of each iteration, an evaluation loss, final tensors."""

    losses: list
    norms: list
    evaluation: float
    tensors: dict


@lru_cache(maxsize=64)
def mesh_of(backend, tp, pp, cp=1):
    """Return the mesh of a layout; meshes are cached because creating groups is slow."""
    return build_mesh(backend, ParallelConfig(world_size=backend.world_size, tp=tp, cp=cp, pp=pp))


def sample(number):
    """Return sample `number`: [LENGTH + 1] tokens, an arithmetic sequence with some terms replaced."""
    generator = np.random.default_rng([5, number])
    start, step = generator.integers(0, VOCABULARY), generator.integers(1, 4)
    tokens = (start + step * np.arange(LENGTH + 1)) % VOCABULARY
    return np.where(generator.random(LENGTH + 1) < 0.1, generator.integers(0, VOCABULARY, LENGTH + 1), tokens)


def reader(mesh, first, size, documents=False):
    """Reads this replica's micro-batches of `size` samples of the global batch that begins at sample `first`.

    With `documents`, tokens EOD end documents, which attend apart.
    """

    def read(index):
        number = microbatch_number(mesh.dp.size, mesh.dp.rank, index)
        start = first + number * size
        tokens = torch.from_numpy(np.stack([sample(start + place) for place in range(size)]))
        mask = (tokens[:, 1:] % 5 != 0).float()
        return MicroBatch(
            tokens[:, :-1], tokens[:, 1:], mask, documents=found(tokens[:, :-1]) if documents else None, number=number
        )

    def found(tokens):
        rows = masks.document_rows(masks.document_ids(tokens.numpy(), EOD))
        return rows and Documents(
            torch.from_numpy(rows.order), torch.from_numpy(rows.inverse), rows.groups, torch.from_numpy(rows.cu_seqlens)
        )

    return read


def iterate(config, mesh, engine, progress, iterations):
    """Train; return losses, gradient norms and progress."""
    losses, norms = [], []
    for _ in range(iterations):
        plan = plan_iteration(config, progress, replica=mesh.dp.rank)
        read = reader(mesh, plan.first_sample, config.batch.micro_batch_size, config.data.reset_attention_mask)
        outcome = engine.train_step(plan, read).outcome()
        progress = progress.advance(plan.global_batch, plan.tokens, outcome.applied)
        losses.append(outcome.loss)
        norms.append(outcome.grad_norm)
    return losses, norms, progress


def evaluate(config, mesh, engine):
    """Return the mean loss of held-out samples."""
    size = config.batch.micro_batch_size
    count = num_microbatches(EVALUATED, size, mesh.dp.size, mesh.dp.rank)
    read = reader(mesh, 10_000, size, config.data.reset_attention_mask)
    return engine.eval_step(count, read, LENGTH).mean


def build(config, mesh):
    """Build the engine of a config."""
    return (build_deepspeed_engine if config.runtime.engine == "deepspeed" else build_engine)(config, mesh)


def run_cell(backend, cell):
    """Run a cell on one rank; tensors as (name, global shape, write, [(offset, numpy array)])."""
    config = cell.config()
    mesh = mesh_of(backend, cell.tp, cell.pp, cell.cp)
    engine = build(config, mesh)
    losses, norms, _ = iterate(config, mesh, engine, Progress(), ITERATIONS)
    evaluation = evaluate(config, mesh, engine)
    tensors = [
        (t.name, t.global_shape, t.write, [(piece.offset, piece.tensor.detach().float().numpy()) for piece in t.pieces])
        for t in engine.state_tensors()
    ]
    return losses, norms, evaluation, tensors


def put_together(ranks):
    """Combine the results of all ranks into one Outcome; check equal numbers and that each element is written once."""
    losses, norms, evaluation, _ = ranks[0]
    for other in ranks[1:]:
        assert other[:3] == (losses, norms, evaluation), "ranks disagree on losses or norms"
    shapes = {name: shape for *_, tensors in ranks for name, shape, _, _ in tensors}
    whole = {name: np.full(shape, np.nan, np.float32) for name, shape in shapes.items()}
    for writes in (True, False):
        for *_, tensors in ranks:
            for name, _, write, pieces in tensors:
                for offset, piece in pieces if write is writes else ():
                    place = tuple(slice(first, first + size) for first, size in zip(offset, piece.shape, strict=True))
                    if writes:
                        assert np.isnan(whole[name][place]).all(), f"{name} is written twice"
                        whole[name][place] = piece
                    assert np.array_equal(whole[name][place], piece), f"copies of {name} differ"
    assert not any(np.isnan(values).any() for values in whole.values()), "something is written by nobody"
    return Outcome(losses, norms, evaluation, whole)


@dataclass(frozen=True)
class Deviation:
    """Largest deviations from the reference, relative; for tensors relative to the largest element."""

    loss: float
    norm: float
    evaluation: float
    parameters: float

    @property
    def numbers(self):
        return dataclasses.astuple(self)


# fp32 bounds of the invariant in docs/parallelism.md; bf16 has three digits and rounds differently in every layout.
LIMITS = {"fp32": Deviation(1e-5, 1e-4, 1e-5, 1e-5), "bf16": Deviation(5e-3, 1e-1, 5e-3, 5e-2)}


def deviation(ours, reference):
    """Return the deviations of two outcomes."""
    assert ours.tensors.keys() == reference.tensors.keys()
    model = {name: _meaningful(name, values) for name, values in reference.tensors.items() if "optimizer" not in name}
    return Deviation(
        loss=_relative(ours.losses, reference.losses),
        norm=_relative(ours.norms, reference.norms),
        evaluation=_relative([ours.evaluation], [reference.evaluation]),
        parameters=max(
            float(np.abs(_meaningful(name, ours.tensors[name]) - values).max() / (np.abs(values).max() or 1.0))
            for name, values in model.items()
        ),
    )


def _meaningful(name, values):
    """Return a parameter without the bias of keys: softmax is invariant to it, so its gradient is rounding error."""
    heads = GPT2["num_attention_heads"]
    return values.reshape(heads, 3, -1)[:, ::2] if name.endswith("qkv.bias") else values


def _relative(ours, expected):
    return max(abs(a - b) / abs(b) for a, b in zip(ours, expected, strict=True))


def within(found, limit):
    """Return whether every number is finite and within its limit."""
    return all(math.isfinite(a) and a <= b for a, b in zip(found.numbers, limit.numbers, strict=True))
