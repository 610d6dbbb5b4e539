"""Presets: they expand to flags, what is written wins, and their sizes are the published ones."""

import json

import pytest
from support.trainer import command

from megatron_lite.config.arguments import parse_run, to_argv
from megatron_lite.config.counts import parameter_count
from megatron_lite.config.presets import PRESETS
from megatron_lite.errors import ConfigError

REST = ("--micro-batch-size", "1", "--train-iters", "1", "--lr", "1", "--mock-data")
# Parameters with the published vocabulary, by each model's own paper or config.
PUBLISHED = {
    "gpt2-124m": (50257, 124_439_808),
    "gpt2-350m": (50257, 354_823_168),
    "gpt2-774m": (50257, 774_030_080),
    "gpt2-1.5b": (50257, 1_557_611_200),
    "algpt2": (50257, 13_850_880),
    "algpt2-e256": (50257, 20_611_584),
    "algpt2-e512": (50257, 34_132_992),
    "algpt2-shared": (50257, 46_473_216),
    "algpt2-medium": (50257, 19_425_536),
    "algpt2-large": (50257, 26_573_056),
    "algpt2-xl": (50257, 37_719_296),
    "tr1-13b": (50304, 12_853_626_880),
    "gpt-580m": (50304, 587_237_376),
    "gpt-760m": (50304, 757_226_496),
    "gpt-1.1b": (50304, 1_097_204_736),
    "gpt-neox-20b": (50432, 20_554_567_680),
    "bloom-560m": (250880, 559_214_592),
    "bloom-1b1": (250880, 1_065_314_304),
    "bloom-7b1": (250880, 7_069_016_064),
    "bloom-176b": (250880, 176_247_271_424),
    "llama-7b": (32000, 6_738_415_616),
    "llama-2-70b": (32000, 68_976_648_192),
    "llama-3-8b": (128256, 8_030_261_248),
    "llama-3-70b": (128256, 70_553_706_496),
    "qwen2-0.5b": (151936, 494_032_768),
    "qwen2-1.5b": (151936, 1_543_714_304),
    "qwen2-7b": (152064, 7_615_616_512),
    "qwen3-0.6b": (151936, 596_049_920),
    "qwen3-8b": (151936, 8_190_735_360),
}


@pytest.mark.parametrize("name", PRESETS)
def test_each_is_a_valid_run_of_the_published_size(name):
    parsed = parse_run(["--preset", name, *REST])
    if name in PUBLISHED:
        vocabulary, count = PUBLISHED[name]
        assert parameter_count(parsed.config.model, vocabulary) == count
    assert any(note.startswith(f"--preset {name} stands for --num-layers") for note in parsed.notes)
    # The flags say it all without the preset.
    assert parse_run(to_argv(parsed.config)).config == parsed.config


@pytest.mark.parametrize("before", [True, False])
def test_explicit_flags_override_the_preset(before):
    written = ["--num-layers", "2", "--activation", "gelu", "--rope-theta", "7"]
    preset = ["--preset=llama-3-8b"]
    parsed = parse_run([*(written + preset if before else preset + written), *REST])
    model = parsed.config.model
    assert (model.num_layers, model.activation, model.rotary_base) == (2, "gelu", 7.0)
    assert (model.hidden_size, model.num_query_groups) == (4096, 8)
    assert "--swiglu of --preset llama-3-8b is overridden by --activation gelu" in parsed.notes


def test_explicit_flags_beside_a_preset_can_contradict():
    with pytest.raises(ConfigError, match="contradict"):
        parse_run(["--preset", "llama-3-8b", "--activation", "gelu", "--squared-relu", *REST])


def test_unknown_presets():
    with pytest.raises(ConfigError, match=r"Did you mean --preset gpt2-124m\?"):
        parse_run(["--preset", "gpt2-125m", *REST])
    with pytest.raises(ConfigError, match=r"Cannot read --preset.*: expected one value"):
        parse_run(["--preset", *REST])


def test_explain_prints_the_flags():
    shared = command(
        "explain", "--preset", "algpt2", *REST, "--tokenizer-type", "NullTokenizer", "--vocab-size", "50256"
    ).out
    assert "13,850,880 parameters" in shared and "12 layers (one set of parameters), embedding 128" in shared
    result = command("explain", "--preset", "GPT2-124M", *REST)
    assert result.code == 0
    assert "--preset gpt2-124m stands for --num-layers 12 --hidden-size 768" in result.out
    assert "  --num-layers 12 \\\n  --hidden-size 768" in result.out
    described = json.loads(command("explain", "--json", "--preset", "qwen2-0.5b", *REST).out)
    assert "--preset" not in described["argv"]
    assert "--add-qkv-bias" in described["argv"]
