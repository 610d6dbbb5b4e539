import pytest

from megatron_lite.config.counts import flops_per_token, parameter_count
from megatron_lite.config.model import ModelConfig
from megatron_lite.config.vocabulary import padded_vocab_size
from megatron_lite.formatting import format_parameters

GPT2 = ModelConfig(
    num_layers=12, hidden_size=768, num_attention_heads=12, max_position_embeddings=1024, vocab_size=50257
)
LLAMA = {
    "normalization": "RMSNorm",
    "activation": "swiglu",
    "linear_bias": False,
    "qkv_bias": False,
    "tied_embeddings": False,
    "position_embedding": "rotary",
}


@pytest.mark.parametrize(
    ("model", "exact", "name"),
    [
        (GPT2, 124_439_808, "124M"),
        (
            ModelConfig(
                num_layers=32,
                hidden_size=4096,
                num_attention_heads=32,
                ffn_hidden_size=11008,
                vocab_size=32000,
                **LLAMA,
            ),
            6_738_415_616,
            "6.7B",
        ),
        (
            ModelConfig(
                num_layers=32,
                hidden_size=4096,
                num_attention_heads=32,
                num_query_groups=8,
                ffn_hidden_size=14336,
                vocab_size=128256,
                **LLAMA,
            ),
            8_030_261_248,
            "8.0B",
        ),
        (
            ModelConfig(
                num_layers=70,
                hidden_size=14336,
                num_attention_heads=112,
                position_embedding="alibi",
                embed_layernorm=True,
                padded_vocab_size=250880,
            ),
            176_247_271_424,
            "176B",
        ),
    ],
    ids=["GPT-2", "Llama-2-7B", "Llama-3-8B", "BLOOM"],
)
def test_published_models_have_their_published_sizes(model, exact, name):
    assert parameter_count(model) == exact
    assert format_parameters(exact) == name


def test_qk_layernorm_and_no_positions():
    plain = ModelConfig(num_layers=2, hidden_size=8, num_attention_heads=2, position_embedding="none", vocab_size=10)
    normed = ModelConfig(
        num_layers=2, hidden_size=8, num_attention_heads=2, position_embedding="none", vocab_size=10, qk_layernorm=True
    )
    assert parameter_count(normed) - parameter_count(plain) == 2 * 2 * 2 * 4


def test_flops_equal_the_paper():
    """Narayanan et al. 2021, eq. 3, with three passes: 72 l h^2 (1 + s / 6h + V / 12lh)."""
    length, h, layers, rows = 1024, 768, 12, 50304
    model = ModelConfig(
        num_layers=layers, hidden_size=h, num_attention_heads=12, vocab_size=50257, padded_vocab_size=rows
    )
    expected = 72 * layers * h**2 * (1 + length / (6 * h) + rows / (12 * layers * h))
    assert flops_per_token(model, length) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("tp", "rows"), [(1, 50304), (2, 50432), (4, 50688)])
def test_padded_vocabularies(tp, rows):
    assert padded_vocab_size(50257, 128, tp) == rows
    assert padded_vocab_size(50257, 128, tp, 51200) == 51200
