"""Layer sharing: values of --share-layers, owners and names of shared parameters, counts and FLOPs."""

import pytest

from megatron_lite.config.counts import flops_per_token, layer_parameters, parameter_count, stored_parameters
from megatron_lite.config.model import ModelConfig
from megatron_lite.config.sharing import describe_sharing, read_sharing, shared_modules, stored_name

NAME = "decoder.layers.5.mlp.fc1.weight"


def model(share, **more):
    sizes = {"num_layers": 6, "hidden_size": 8, "num_attention_heads": 2, "vocab_size": 10}
    return ModelConfig(**sizes, share_layers=share, max_position_embeddings=4, **more)


@pytest.mark.parametrize(
    ("text", "value"), [("all", "all"), ("ALL", "all"), ("1", "all"), ("3", "3"), ("mlp", "mlp"), ("2e0", "2")]
)
def test_values(text, value):
    assert read_sharing([text]) == value


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "ffn", ""])
def test_wrong_values(text):
    with pytest.raises(ValueError, match="all, attention, mlp, or a number of groups"):
        read_sharing([text])


@pytest.mark.parametrize(
    ("share", "mlp", "norm", "modules", "text"),
    [
        ("", 5, 5, {}, ""),
        ("all", 0, 0, {"decoder.layers.0": range(6)}, " (one set of parameters)"),
        ("2", 3, 3, {"decoder.layers.0": range(3), "decoder.layers.3": range(3, 6)}, " (2 sets of parameters)"),
        ("6", 5, 5, {}, ""),
        ("attention", 5, 5, {"decoder.layers.0.self_attention": range(6)}, " (one attention for all)"),
        ("mlp", 0, 5, {"decoder.layers.0.mlp": range(6)}, " (one MLP for all)"),
    ],
)
def test_shared_modules_are_stored_under_the_first_layer(share, mlp, norm, modules, text):
    shared = model(share)
    assert stored_name(shared, NAME) == f"decoder.layers.{mlp}.mlp.fc1.weight"
    assert stored_name(shared, "decoder.layers.5.input_norm.bias") == f"decoder.layers.{norm}.input_norm.bias"
    assert stored_name(shared, "decoder.final_norm.weight") == "decoder.final_norm.weight"
    assert shared_modules(shared) == modules
    assert describe_sharing(shared) == text


def test_counts():
    parts = layer_parameters(model(""))
    assert parts == {"input_norm": 16, "self_attention": 4 * 64 + 32, "pre_mlp_norm": 16, "mlp": 8 * 64 + 40}
    whole = sum(parts.values())
    assert stored_parameters(model("2"), range(1, 5)) == {0: whole, 3: whole}
    assert stored_parameters(model("mlp"), (4, 5)) == {
        0: parts["mlp"],
        4: whole - parts["mlp"],
        5: whole - parts["mlp"],
    }
    outside = (10 + 4) * 8 + 16
    assert parameter_count(model("all")) == outside + whole
    assert parameter_count(model("attention")) == outside + 6 * whole - 5 * parts["self_attention"]
    assert parameter_count(model("", embedding_size=2)) == (10 + 4) * 2 + (2 * 8 + 8) + 6 * whole + 16 + (8 * 2 + 2)


def test_sharing_saves_no_flops_and_a_narrow_embedding_adds_two_products():
    assert flops_per_token(model("all"), 4) == flops_per_token(model(""), 4)
    saved = 3 * 2 * (10 * 8 - 10 * 2)
    assert flops_per_token(model("", embedding_size=2), 4) == flops_per_token(model(""), 4) - saved + 3 * 2 * 2 * (
        2 * 8
    )
