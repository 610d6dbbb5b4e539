"""Random models of every architecture that is exported, and checkpoints of them written by any layout."""

import dataclasses

import torch

from megatron_lite.checkpoint.load import load_checkpoint
from megatron_lite.checkpoint.save import save_checkpoint
from megatron_lite.checkpoint.stored_model import stored_model
from megatron_lite.checkpoint.writing import SaveRequest
from megatron_lite.config.batch import BatchConfig
from megatron_lite.config.model import ModelConfig
from megatron_lite.config.optimizer import PrecisionConfig
from megatron_lite.config.parameters import shared_stages
from megatron_lite.config.run import RunConfig
from megatron_lite.config.runtime import RuntimeConfig
from megatron_lite.config.tokenizer import TokenizerConfig
from megatron_lite.config.vocabulary import padded_vocab_size
from megatron_lite.model.batch import MicroBatch
from megatron_lite.model.gpt import GPTStage
from megatron_lite.parallel.mesh import build_mesh
from megatron_lite.parallel.random import RngStreams
from megatron_lite.parallel.shared import belongs_to
from megatron_lite.parallel.tensors import narrow, parameter_tensor
from megatron_lite.runs.comparison import config_as_json
from megatron_lite.runs.manifest import Provenance, read_manifest
from megatron_lite.schedules.progress import Progress

VOCAB = 96
_LLAMA = {
    "position_embedding": "rotary",
    "normalization": "RMSNorm",
    "activation": "swiglu",
    "linear_bias": False,
    "qkv_bias": False,
    "tied_embeddings": False,
    "ffn_hidden_size": 48,
}
MODELS = {
    "gpt2": ("GPT2LMHeadModel", {}),
    "gpt2 erf untied": (
        "GPT2LMHeadModel",
        {"activation": "gelu", "tied_embeddings": False, "ffn_hidden_size": 40, "norm_epsilon": 1e-3},
    ),
    "gpt2 zero-centered": ("GPT2LMHeadModel", {"zero_centered_norm": True}),
    "bloom": ("BloomForCausalLM", {"position_embedding": "alibi", "embed_layernorm": True}),
    "llama": ("LlamaForCausalLM", {**_LLAMA, "num_query_groups": 2, "rotary_base": 5000.0, "rotary_scaling": 2.0}),
    "llama biases": (
        "LlamaForCausalLM",
        {**_LLAMA, "linear_bias": True, "qkv_bias": True, "head_dim": 16, "activation": "geglu"},
    ),
    "qwen2": ("Qwen2ForCausalLM", {**_LLAMA, "qkv_bias": True, "num_query_groups": 2, "tied_embeddings": True}),
    "qwen3": ("Qwen3ForCausalLM", {**_LLAMA, "qk_layernorm": True, "num_query_groups": 2, "head_dim": 16}),
    "gpt-neox": (
        "GPTNeoXForCausalLM",
        {"position_embedding": "rotary", "rotary_percent": 0.25, "activation": "gelu", "tied_embeddings": False},
    ),
    "gpt-neox parallel": (
        "GPTNeoXForCausalLM",
        {"position_embedding": "rotary", "rotary_percent": 0.5, "parallel_residual": True},
    ),
    "algpt2": ("ALGPT2LMHeadModel", {"share_layers": "all", "embedding_size": 16}),
    "algpt2 attention": (
        "ALGPT2LMHeadModel",
        {"share_layers": "attention", "embedding_size": 8, "tied_embeddings": False, "activation": "gelu"},
    ),
}
"""The class that each model is exported as, and its fields."""


def run_config(dtype="fp32", **fields):
    shape = {"num_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "max_position_embeddings": 64}
    shape |= {"vocab_size": VOCAB, "padded_vocab_size": 128, "init_std": 0.08}
    return RunConfig(
        model=ModelConfig(**(shape | fields)),
        batch=BatchConfig(seq_length=64, micro_batch_size=1),
        tokenizer=TokenizerConfig(type="NullTokenizer", vocab_size=VOCAB - 1),
        precision=PrecisionConfig(dtype=dtype),
        runtime=RuntimeConfig(device="cpu"),
    )


def save(backend, config, root, iteration=7):
    """Saves a random model, of which each rank builds its own part, as training does."""
    mesh = build_mesh(backend, config.parallel)
    layers = config.model.num_layers // config.parallel.pp
    stages = [range(start, start + layers) for start in range(0, config.model.num_layers, layers)]
    copies = [name for name, holders in shared_stages(config.model, stages).items() if holders[0] != mesh.pp.rank]
    stage = GPTStage(config, stages[mesh.pp.rank], mesh, RngStreams(1, backend, mesh.tp.rank))
    tensors = []
    with torch.no_grad():
        for entry in stage.named_parameters_global():
            if len(entry.global_shape) == 1 or "position" in entry.name:  # norms, biases and positions that matter
                draw = torch.Generator().manual_seed(sum(entry.name.encode()))
                whole = torch.randn(entry.global_shape, generator=draw) * 0.1
                entry.local().add_(narrow(whole, entry.rectangle))
            first = mesh.tp.rank == 0 or entry.tp_dim is not None
            copy = any(belongs_to(entry.name, name) for name in copies)
            tensors.append(parameter_tensor(entry, write=first and not copy))
    scalars = {"progress": dataclasses.replace(Progress(), iteration=iteration).to_dict()}
    save_checkpoint(SaveRequest(root, iteration, scalars, Provenance(config_as_json(config))), tensors, mesh.world)


def save_on_rank(backend, config, root, iteration):
    save(backend, config, root, iteration)


def logits_on_rank(backend, parallel, load, tokens):
    """Logits [b, s, vocabulary] of a checkpoint that every rank of a layout loads its part of; None: not the last."""
    (path,) = load.glob("iter_*")
    stored = stored_model(read_manifest(path), path)
    padded = padded_vocab_size(stored.model.vocab_size, 16, parallel.tp)
    config = dataclasses.replace(run_config(), model=dataclasses.replace(stored.model, padded_vocab_size=padded))
    mesh = build_mesh(backend, parallel)
    layers = config.model.num_layers // parallel.pp
    numbers = range(mesh.pp.rank * layers, (mesh.pp.rank + 1) * layers)
    stage = GPTStage(dataclasses.replace(config, parallel=parallel), numbers, mesh, RngStreams(1, backend)).eval()
    tensors = [parameter_tensor(entry, write=False) for entry in stage.named_parameters_global()]
    load_checkpoint(path, tensors, mesh.world, weights_only=True)
    x = None
    if mesh.pp.rank:
        x = torch.empty(stage.hidden_shape(tokens.shape[1], tokens.shape[0]))
        mesh.pp.exchange([], [(x, mesh.pp.rank - 1)])[0].wait()
    with torch.no_grad():
        batch = MicroBatch(tokens=tokens, labels=tokens)
        x = stage(x, batch) if stage.output_layer is None else stage.logits(x, batch)
    if mesh.pp.rank < parallel.pp - 1:
        mesh.pp.exchange([(x, mesh.pp.rank + 1)], [])[0].wait()
        return None
    parts = mesh.tp.all_gather_object(x)
    return torch.cat(parts, -1)[..., : config.model.vocab_size].transpose(0, 1)
