"""Judgement of foreign settings: every Megatron arg and every DeepSpeed config key is used, harmless or refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.deepspeed_files import write_deepspeed
from support.interop_models import VOCAB
from support.megatron_files import arguments, write_classic
from support.trainer import command

from megatron_lite.errors import CheckpointError
from megatron_lite.interop.megatron.judgement import UNSUPPORTED, USED, judge_arguments, judge_deepspeed_config


def read_table():
    """(name, default, whether it is of the model) of every arg in megatron_arguments.tsv."""
    lines = Path(__file__).with_name("megatron_arguments.tsv").read_text(encoding="utf-8").splitlines()
    rows = [line.split("\t") for line in lines if not line.startswith("#")]
    return [(row[0], json.loads(row[1]), row[2:] == ["model"]) for row in rows]


TABLE = read_table()
DEFAULTS = {name: tuple(default) if isinstance(default, list) else default for name, default, _ in TABLE}


def test_every_default_is_accepted():
    assert len(DEFAULTS) > 550
    judge_arguments(DEFAULTS, "file")


@pytest.mark.parametrize("of_model", [True, False])
def test_every_argument_with_another_value(of_model):
    """An arg of the model is used or refused by name; another value of any other arg changes nothing."""
    for name, default, is_of_model in TABLE:
        if is_of_model is not of_model:
            continue
        changed = {**DEFAULTS, name: not default if isinstance(default, bool) else "another"}
        if of_model and name not in USED:
            with pytest.raises(CheckpointError, match=f"file has .*{name}="):
                judge_arguments(changed, "file")
        else:
            judge_arguments(changed, "file")


def test_every_unsupported_setting_is_refused_by_name():
    for name in UNSUPPORTED:
        with pytest.raises(CheckpointError, match=f"file has {name}='another': there is no support for"):
            judge_arguments({name: "another"}, "file", ignored=[name])


@pytest.mark.parametrize("value", [True, 1, 0.5, "yes", [1], {"a": 1}])
def test_an_unknown_argument_that_asks_for_something(value):
    arguments = {"brand_new_attention": value, "brand_new_norm": value}
    with pytest.raises(CheckpointError, match=r"--ignore-config-keys brand_new_attention brand_new_norm") as caught:
        judge_arguments(arguments, "mp_rank_00/file.pt")
    assert (
        f"mp_rank_00/file.pt has settings that this importer does not know: brand_new_attention={value!r}, "
        f"brand_new_norm={value!r}" in str(caught.value)
    )
    judge_arguments(arguments, "file", ignored=["brand_new_attention", "brand_new_norm"])


@pytest.mark.parametrize("value", [None, False, 0, 0.0, "", (), [], {}])
def test_an_unknown_argument_that_asks_for_nothing(value):
    judge_arguments({"brand_new_attention": value}, "file")


def test_deepspeed_config():
    harmless = {
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 1},
        "train_batch_size": 8,
        "steps_per_print": 10,
    }
    judge_deepspeed_config(None, "file")
    judge_deepspeed_config(
        {**harmless, "sparse_attention": {"enabled": False}, "brand_new": {"enabled": False}}, "file"
    )
    for name in ("compression_training", "quantize_training", "sparse_attention", "moe"):
        with pytest.raises(CheckpointError, match=rf"has ds_config\.{name}="):
            judge_deepspeed_config({**harmless, name: {"enabled": True}}, "file")
        with pytest.raises(CheckpointError, match=rf"has ds_config\.{name}="):
            judge_deepspeed_config({**harmless, name: {"mode": "fixed", "groups": {"weights": {"bits": 8}}}}, "file")
    with pytest.raises(CheckpointError, match="--ignore-config-keys brand_new"):
        judge_deepspeed_config({**harmless, "brand_new": 2}, "file")
    judge_deepspeed_config({**harmless, "brand_new": 2}, "file", ignored=["brand_new"])


def test_deepspeed_config_within_the_args(original, refused, tmp_path):
    state, model, _, _ = original()
    args = arguments(model, deepspeed_config_dict={"sparse_attention": {"mode": "fixed"}})
    write_deepspeed(tmp_path / "ds", state, model, args=args)
    refused(tmp_path / "ds", r"has ds_config\.sparse_attention=")


def test_grouped_queries_of_megatron_deepspeed(original, imported, same, tmp_path):
    """num_key_value_heads counts without group_query_attention."""
    state, model, _, _ = original(position_embedding="rotary", num_query_groups=2)
    args = arguments(model, position_embedding_type="rotary", num_key_value_heads=2)
    write_classic(tmp_path / "m", state, model, args=args)
    _, source = imported(tmp_path / "m", tmp_path / "ck", "--vocab-size", str(VOCAB))
    same(source, state)


def test_gated_units_whose_activation_is_not_said(original, refused, tmp_path):
    state, model, _, _ = original(activation="swiglu", ffn_hidden_size=48)
    write_classic(tmp_path / "m", state, model, args=arguments(model, core=True, swiglu=False, gated_linear_unit=True))
    refused(tmp_path / "m", "gated_linear_unit=True", "--vocab-size", str(VOCAB))


def test_unknown_settings_can_be_ignored_on_the_command_line(original, tmp_path):
    state, model, _, _ = original()

    def edit(name, content):
        if name.startswith("mp_rank"):
            content["ds_config"] = {"brand_new_section": {"size": 3}}

    write_deepspeed(tmp_path / "ds", state, model, args=arguments(model, brand_new_norm="deep"), edit=edit)
    words = ("import", tmp_path / "ds", "--output", tmp_path / "ck")
    result = command(*words)
    assert result.code == 1
    assert "brand_new_norm='deep'" in result.err
    result = command(*words, "--ignore-config-keys", "brand_new_norm")
    assert "brand_new_section={'size': 3}" in result.err
    assert not (tmp_path / "ck").exists()
    result = command(*words, "--ignore-config-keys", "brand_new_norm", "brand_new_section")
    assert result.code == 0, result.err
