"""Tests against Hugging Face models with the same weights: equal logits, loss and gradients."""

import pytest
import torch
from support.stage_backward import run_backward
from torch.nn import functional as F

transformers = pytest.importorskip("transformers")


def rows_by_head(q, k, v, groups, head_dim):
    """Return q, k and v in the row order of qkv: for each group its query heads, its key, its value."""
    parts = (x.reshape(groups, -1, head_dim, *x.shape[1:]) for x in (q, k, v))
    return torch.cat(tuple(parts), dim=1).flatten(0, 2)


def from_gpt2(w, config):
    yield "embedding.word_embeddings.weight", w["transformer.wte.weight"]
    yield "embedding.position_embeddings.weight", w["transformer.wpe.weight"]
    for n in range(config.num_layers):
        ours, theirs = f"decoder.layers.{n}.", f"transformer.h.{n}."
        for kind in ("weight", "bias"):
            yield f"{ours}input_norm.{kind}", w[f"{theirs}ln_1.{kind}"]
            yield f"{ours}pre_mlp_norm.{kind}", w[f"{theirs}ln_2.{kind}"]
            q, k, v = (
                w[f"{theirs}attn.c_attn.{kind}"].t().chunk(3)
                if kind == "weight"
                else w[f"{theirs}attn.c_attn.{kind}"].chunk(3)
            )
            yield f"{ours}self_attention.qkv.{kind}", rows_by_head(q, k, v, config.num_query_groups, config.head_dim)
            yield f"{ours}self_attention.proj.{kind}", w[f"{theirs}attn.c_proj.{kind}"].t()
            yield f"{ours}mlp.fc1.{kind}", w[f"{theirs}mlp.c_fc.{kind}"].t()
            yield f"{ours}mlp.fc2.{kind}", w[f"{theirs}mlp.c_proj.{kind}"].t()
    for kind in ("weight", "bias"):
        yield f"decoder.final_norm.{kind}", w[f"transformer.ln_f.{kind}"]


def from_llama(w, config):
    yield "embedding.word_embeddings.weight", w["model.embed_tokens.weight"]
    yield "output_layer.weight", w["lm_head.weight"]
    yield "decoder.final_norm.weight", w["model.norm.weight"]
    for n in range(config.num_layers):
        ours, theirs = f"decoder.layers.{n}.", f"model.layers.{n}."
        yield f"{ours}input_norm.weight", w[f"{theirs}input_layernorm.weight"]
        yield f"{ours}pre_mlp_norm.weight", w[f"{theirs}post_attention_layernorm.weight"]
        q, k, v = (w[f"{theirs}self_attn.{x}_proj.weight"] for x in "qkv")
        yield f"{ours}self_attention.qkv.weight", rows_by_head(q, k, v, config.num_query_groups, config.head_dim)
        yield f"{ours}self_attention.proj.weight", w[f"{theirs}self_attn.o_proj.weight"]
        gate, up = (w[f"{theirs}mlp.{x}_proj.weight"] for x in ("gate", "up"))
        yield f"{ours}mlp.fc1.weight", torch.stack((gate, up))
        yield f"{ours}mlp.fc2.weight", w[f"{theirs}mlp.down_proj.weight"]


def from_neox(w, config):
    yield "embedding.word_embeddings.weight", w["gpt_neox.embed_in.weight"]
    yield "output_layer.weight", w.get("embed_out.weight", w.get("lm_head.weight"))
    yield from big_science_layers(w, config, "gpt_neox.layers.", "attention", "gpt_neox.final_layer_norm")


def from_bloom(w, config):
    yield "embedding.word_embeddings.weight", w["transformer.word_embeddings.weight"]
    for kind in ("weight", "bias"):
        yield f"embedding.norm.{kind}", w[f"transformer.word_embeddings_layernorm.{kind}"]
    yield from big_science_layers(w, config, "transformer.h.", "self_attention", "transformer.ln_f")


def big_science_layers(w, config, layers, attention, final_norm):
    """Yield layers of BLOOM and GPT-NeoX, whose qkv rows have Megatron's order, as ours."""
    for kind in ("weight", "bias"):
        yield f"decoder.final_norm.{kind}", w[f"{final_norm}.{kind}"]
        for n in range(config.num_layers):
            ours, theirs = f"decoder.layers.{n}.", f"{layers}{n}."
            yield f"{ours}input_norm.{kind}", w[f"{theirs}input_layernorm.{kind}"]
            yield f"{ours}pre_mlp_norm.{kind}", w[f"{theirs}post_attention_layernorm.{kind}"]
            yield f"{ours}self_attention.qkv.{kind}", w[f"{theirs}{attention}.query_key_value.{kind}"]
            yield f"{ours}self_attention.proj.{kind}", w[f"{theirs}{attention}.dense.{kind}"]
            yield f"{ours}mlp.fc1.{kind}", w[f"{theirs}mlp.dense_h_to_4h.{kind}"]
            yield f"{ours}mlp.fc2.{kind}", w[f"{theirs}mlp.dense_4h_to_h.{kind}"]


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=101, n_positions=48, n_embd=64, n_layer=2, n_head=4, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    return transformers.GPT2LMHeadModel(config), from_gpt2, {}


def llama():
    config = transformers.LlamaConfig(
        vocab_size=101,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
    )
    changes = {"position_embedding": "rotary", "normalization": "RMSNorm", "activation": "swiglu"}
    changes |= {"num_query_groups": 2, "ffn_hidden_size": 96, "norm_epsilon": 1e-6, "tied_embeddings": False}
    return transformers.LlamaForCausalLM(config), from_llama, changes | {"linear_bias": False, "qkv_bias": False}


def bloom(heads=4):
    config = transformers.BloomConfig(
        vocab_size=101, hidden_size=96, n_layer=2, n_head=heads, hidden_dropout=0.0, attention_dropout=0.0
    )
    changes = {"position_embedding": "alibi", "embed_layernorm": True, "hidden_size": 96, "num_attention_heads": heads}
    return transformers.BloomForCausalLM(config), from_bloom, changes


def bloom_with_six_heads():
    return bloom(6)


def neox():
    config = transformers.GPTNeoXConfig(
        vocab_size=101,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        rotary_pct=0.25,
        use_parallel_residual=False,
        hidden_act="gelu",
        tie_word_embeddings=False,
    )
    changes = {"position_embedding": "rotary", "rotary_percent": 0.25, "activation": "gelu", "tied_embeddings": False}
    return transformers.GPTNeoXForCausalLM(config), from_neox, changes


def scattered(model):
    """Move weights away from their initialization, so that no term vanishes."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(torch.randn(param.shape, generator=generator) * 0.05)
    return model.train()


@pytest.mark.parametrize("build", [gpt2, llama, bloom, bloom_with_six_heads, neox])
def test_logits_loss_and_gradients_equal_hugging_faces(build, make_stage, make_batch):
    theirs, translate, changes = build()
    scattered(theirs)
    stage = make_stage(**changes)
    params = stage.named_parameters_global()
    weights = dict(translate({name: p.detach() for name, p in theirs.named_parameters()}, stage.config))
    assert sorted(weights) == sorted(p.name for p in params)
    for p in params:
        p.local().copy_(weights[p.name])

    batch = make_batch()
    expected = theirs(batch.tokens).logits
    F.cross_entropy(expected.flatten(0, 1), batch.labels.flatten(), reduction="mean").backward()
    logits = stage.logits(None, batch)
    torch.testing.assert_close(logits[..., :101].transpose(0, 1), expected, rtol=1e-5, atol=1e-5)
    loss = run_backward(stage, batch, scale=1 / len(batch.tokens)) / len(batch.tokens)
    torch.testing.assert_close(loss, F.cross_entropy(expected.flatten(0, 1), batch.labels.flatten()))

    gradients = dict(translate({name: p.grad for name, p in theirs.named_parameters()}, stage.config))
    for p in params:
        expected = gradients[p.name].reshape(p.rectangle.shape)
        atol = 1e-5 * expected.abs().max().item()
        torch.testing.assert_close(
            p.local(p.param.grad), expected, rtol=1e-5, atol=atol, msg=lambda m, p=p: f"{p.name}: {m}"
        )
