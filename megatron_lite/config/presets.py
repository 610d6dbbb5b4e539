"""Model presets: `--preset NAME` stands for the flags of a published model's shape; explicit flags override them."""

from __future__ import annotations

from collections.abc import Mapping


def _sizes(layers: int, hidden: int, heads: int, more: str = "") -> str:
    return f"--num-layers {layers} --hidden-size {hidden} --num-attention-heads {heads} {more}".rstrip()


def _positions(length: int) -> str:
    return f"--seq-length {length} --max-position-embeddings {length}"


_NO_DROPOUT = "--hidden-dropout 0 --attention-dropout 0"
_GPT2 = _positions(1024)
_ALGPT2 = f"{_GPT2} --share-layers all"
_BLOOM = f"{_positions(2048)} --position-embedding-type alibi --embed-layernorm {_NO_DROPOUT}"
_GROWN = f"{_positions(2048)} --position-embedding-type alibi"
_LLAMA = (
    "--position-embedding-type rotary --normalization RMSNorm --swiglu --disable-bias-linear "
    f"--untie-embeddings-and-output-weights {_NO_DROPOUT}"
)
_TIED_LLAMA = _LLAMA.replace("--untie-embeddings-and-output-weights ", "")


def _llama(ffn: int, groups: int = 0, *, length: int = 2048, epsilon: str = "1e-5", base: int = 10000) -> str:
    grouped = f"--group-query-attention --num-query-groups {groups} " if groups else ""
    rope = f" --rotary-base {base}" if base != 10000 else ""
    return f"--ffn-hidden-size {ffn} {grouped}{_positions(length)} {_LLAMA} --norm-epsilon {epsilon}{rope}"


def _qwen(ffn: int, groups: int, *, tied: bool, more: str) -> str:
    style = _TIED_LLAMA if tied else _LLAMA
    return (
        f"--ffn-hidden-size {ffn} --group-query-attention --num-query-groups {groups} --seq-length 4096 "
        f"--max-position-embeddings 32768 {style} --norm-epsilon 1e-6 --rotary-base 1000000 {more}"
    )


PRESETS: Mapping[str, str] = {
    # Radford et al. 2019; sizes as on Hugging Face.
    "gpt2-124m": _sizes(12, 768, 12, _GPT2),
    "gpt2-350m": _sizes(24, 1024, 16, _GPT2),
    "gpt2-774m": _sizes(36, 1280, 20, _GPT2),
    "gpt2-1.5b": _sizes(48, 1600, 25, _GPT2),
    # ALBERT-style GPT-2: one set of parameters for all layers, factorized embedding.
    "algpt2": _sizes(12, 768, 12, f"{_ALGPT2} --embedding-size 128"),
    "algpt2-e256": _sizes(12, 768, 12, f"{_ALGPT2} --embedding-size 256"),
    "algpt2-e512": _sizes(12, 768, 12, f"{_ALGPT2} --embedding-size 512"),
    "algpt2-shared": _sizes(12, 768, 12, _ALGPT2),
    "algpt2-medium": _sizes(24, 1024, 16, f"{_ALGPT2} --embedding-size 128"),
    "algpt2-large": _sizes(36, 1280, 20, f"{_ALGPT2} --embedding-size 128"),
    "algpt2-xl": _sizes(48, 1600, 25, f"{_ALGPT2} --embedding-size 128"),
    # BigScience's first 13B run (tr1-13B-base).
    "tr1-13b": _sizes(40, 5120, 32, f"--ffn-hidden-size 20480 {_positions(2048)}"),
    # Models grown by duplicating layers.
    "gpt-580m": _sizes(18, 1536, 12, _GROWN),
    "gpt-760m": _sizes(24, 1536, 12, _GROWN),
    "gpt-1.1b": _sizes(36, 1536, 12, _GROWN),
    # Black et al. 2022, arXiv:2204.06745.
    "gpt-neox-20b": _sizes(
        44,
        6144,
        64,
        f"{_positions(2048)} --position-embedding-type rotary --rotary-percent 0.25 --parallel-residual "
        f"--untie-embeddings-and-output-weights {_NO_DROPOUT}",
    ),
    # BigScience 2022, arXiv:2211.05100.
    "bloom-560m": _sizes(24, 1024, 16, _BLOOM),
    "bloom-1b1": _sizes(24, 1536, 16, _BLOOM),
    "bloom-1b7": _sizes(24, 2048, 16, _BLOOM),
    "bloom-3b": _sizes(30, 2560, 32, _BLOOM),
    "bloom-7b1": _sizes(30, 4096, 32, _BLOOM),
    "bloom-176b": _sizes(70, 14336, 112, _BLOOM),
    # Touvron et al. 2023, arXiv:2302.13971 and arXiv:2307.09288; Dubey et al. 2024, arXiv:2407.21783.
    "llama-7b": _sizes(32, 4096, 32, _llama(11008, epsilon="1e-6")),
    "llama-13b": _sizes(40, 5120, 40, _llama(13824, epsilon="1e-6")),
    "llama-2-7b": _sizes(32, 4096, 32, _llama(11008, length=4096)),
    "llama-2-13b": _sizes(40, 5120, 40, _llama(13824, length=4096)),
    "llama-2-70b": _sizes(80, 8192, 64, _llama(28672, 8, length=4096)),
    "llama-3-8b": _sizes(32, 4096, 32, _llama(14336, 8, length=8192, base=500000)),
    "llama-3-70b": _sizes(80, 8192, 64, _llama(28672, 8, length=8192, base=500000)),
    # Yang et al. 2024, arXiv:2407.10671, and 2025, arXiv:2505.09388.
    "qwen2-0.5b": _sizes(24, 896, 14, _qwen(4864, 2, tied=True, more="--add-qkv-bias")),
    "qwen2-1.5b": _sizes(28, 1536, 12, _qwen(8960, 2, tied=True, more="--add-qkv-bias")),
    "qwen2-7b": _sizes(28, 3584, 28, _qwen(18944, 4, tied=False, more="--add-qkv-bias")),
    "qwen3-0.6b": _sizes(28, 1024, 16, _qwen(3072, 8, tied=True, more="--kv-channels 128 --qk-layernorm")),
    "qwen3-8b": _sizes(36, 4096, 32, _qwen(12288, 8, tied=False, more="--kv-channels 128 --qk-layernorm")),
}
"""Flags by name: the model's shape and the sequence length, without training flags."""


def preset_args(name: str) -> list[str] | None:
    """Return the arguments that a preset stands for; None: there is no such preset."""
    text = PRESETS.get(name.lower())
    return None if text is None else text.split()
