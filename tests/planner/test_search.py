"""Tests of the search over layouts, and of `megatron-lite plan --search`."""

import json
from dataclasses import replace

import pytest

from megatron_lite.cli import plan, plan_search
from megatron_lite.config.arguments import parse_run
from megatron_lite.config.optimizer import RecomputeConfig
from megatron_lite.config.vocabulary import with_vocabulary
from megatron_lite.errors import ConfigError, ConfigErrors
from megatron_lite.planner import search as search_module
from megatron_lite.planner.hardware import RUNTIME_BYTES, hardware
from megatron_lite.planner.memory import rank_memory
from megatron_lite.planner.search import layout_flags, search
from megatron_lite.planner.step_time import step_time_of

MODEL = "--num-layers 8 --hidden-size 512 --num-attention-heads 8 --seq-length 256 --max-position-embeddings 256"
RUN = "--global-batch-size 16 --train-iters 10 --lr 1e-3 --bf16 --tokenizer-type NullTokenizer --vocab-size 999"
LAYOUT = "--micro-batch-size 1 --world-size 8"
COMMAND = f"{MODEL} {RUN} {LAYOUT}".split()


def machine_with(megabytes):
    machine = hardware("h100-80gb", per_node=4, network_gbit=0.0)
    device = replace(machine.device, memory_gib=(RUNTIME_BYTES + megabytes * 2**20) / 2**30)
    return replace(machine, device=device)


@pytest.fixture(scope="module")
def config():
    return parse_run(COMMAND).config


@pytest.mark.parametrize("megabytes", [1000, 100])
def test_the_layouts_fit_and_are_sorted_by_time(config, megabytes):
    machine = machine_with(megabytes)
    found = search(config, 1000, machine)
    assert 0 < len(found.layouts) < found.tried
    choices = [
        (replace(layout.config.parallel, distributed_optimizer=False), layout.config.batch.micro_batch_size)
        for layout in found.layouts
    ]
    assert len(set(choices)) == len(choices), "each once, with or without ZeRO-1"
    times = [layout.step.total for layout in found.layouts]
    assert times == sorted(times)
    for layout in found.layouts[:20]:
        assert layout.memory == max(rank.total for rank in rank_memory(layout.config)) <= machine.device.available
        assert layout.step == step_time_of(layout.config, machine, 16, 256)


def test_no_layout_with_heavier_recomputation_is_faster_than_the_best(config, monkeypatch):
    machine = machine_with(100)
    best = search(config, 1000, machine).layouts[0]
    assert best.config.recompute.granularity != "none" or best.config.parallel.pp * best.config.parallel.tp > 1
    for recompute in (RecomputeConfig(granularity="full"), RecomputeConfig(granularity="selective")):
        monkeypatch.setattr(search_module, "_recomputations", lambda config, parallel, one=recompute: [one])
        assert search(config, 1000, machine).layouts[0].step.total >= best.step.total


def test_the_flags_of_a_layout_give_its_config(config):
    kinds = set()
    for layout in search(config, 1000, machine_with(130)).layouts:
        flags = layout_flags(layout.config)
        read = parse_run([*MODEL.split(), *RUN.split(), "--world-size", "8", *flags]).config
        assert with_vocabulary(read, 1000) == layout.config, flags
        kinds.add((layout.config.parallel.pipeline_schedule, layout.config.recompute.method))
    assert len(kinds) > 4


def test_the_command_prints_the_best_layouts(capsys, monkeypatch):
    assert plan.run([*COMMAND, "--search", "--json", "--gpu", "a100-40gb"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["best"] == record["layouts"][0]["flags"]
    assert record["given"]["fits"]
    assert record["layouts"][0]["step_seconds"] <= record["given"]["step_seconds"]
    monkeypatch.setenv("COLUMNS", "80")
    assert plan.run([*COMMAND, "--search"]) == 0
    text = capsys.readouterr().out
    assert " layouts fit, of " in text
    assert "--tensor-model-parallel-size" in text.splitlines()[-1]
    assert "…" not in text, "nothing is truncated"


@pytest.mark.parametrize(
    ("most", "fix"), [(16, "Use a model with fewer parameters"), (64, "Use --world-size 32, on which a layout fits")]
)
def test_a_model_that_fits_nowhere_names_the_closest_layout_and_the_devices_that_would_do(most, fix, monkeypatch):
    monkeypatch.setattr(plan_search, "MAX_DEVICES", most)
    huge = ["--hidden-size", "32768", "--num-attention-heads", "64", "--global-batch-size", "64"]
    pattern = r"\(103B parameters\) fits with no layout of 8 x h100-80gb\. The closest of .* too little\)\. "
    with pytest.raises(ConfigError, match=pattern + fix):
        plan.run([*COMMAND, *huge, "--search"])


def test_more_ranks_than_samples_have_no_layout():
    with pytest.raises(ConfigError, match="No layout of 4,096 ranks is possible"):
        plan.run([*COMMAND[:-1], "4096", "--search"])


def test_options_without_effect_are_refused_with_all_other_errors():
    with pytest.raises(ConfigErrors) as found:
        plan.run([*COMMAND, "--search", "--pue", "1.1", "--price", "3"])
    assert [str(error).split(" ")[0] for error in found.value.errors] == ["Unknown", "--pue"]
