"""Fields that ranks must share: every field is one of them, or declares why it may differ."""

from dataclasses import fields, replace

import pytest
from support.job_commands import FAMOUS, SMALL

from megatron_lite.config.arguments import parse_run
from megatron_lite.config.shared_fields import data_paths, shared_values
from megatron_lite.config.table import SECTIONS, field_metadata

MAY_DIFFER = {".".join(key): reason for key, reason in field_metadata("may_differ").items()}
ALL = {f"{section}.{field.name}" for section, kind in SECTIONS.items() for field in fields(kind)}


def values(*words):
    return shared_values(parse_run([*SMALL, *words]).config)


def test_every_field_is_shared_unless_listed():
    assert len(MAY_DIFFER) == 16 and set(MAY_DIFFER) <= ALL
    assert set(values()) == ALL - set(MAY_DIFFER)


@pytest.mark.parametrize(
    ("words", "field", "text"),
    [
        ("--lr 2e-3", "lr.lr", "--lr 0.002"),
        ("--bf16", "precision.dtype", "--bf16"),
        ("", "precision.dtype", "--fp32"),
        ("", "checkpoint.save", "no --save"),
        ("--save x --save-interval 5", "checkpoint.phases", "--save-schedule 5"),
        ("--sequence-parallel", "parallel.sequence_parallel", "--sequence-parallel"),
        ("", "parallel.sequence_parallel", "no --sequence-parallel"),
        ("--no-overlap-grad-reduce", "parallel.overlap_grad_reduce", "--no-overlap-grad-reduce"),
        ("--rampup-batch-size 2 2 100", "batch.rampup", "--rampup-batch-size 2 2 100"),
        ("--data-path 1 /a 2 /b", "data.sources", "--data-path 1 PATH 2 PATH"),
    ],
)
def test_values_are_command_line_arguments(words, field, text):
    assert values(*words.split())[field] == text


def test_folders_are_absolute_so_that_working_directories_count(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert values("--save", "x", "--save-interval", "5")["checkpoint.save"] == f"--save {tmp_path / 'x'}"


def test_data_paths_may_differ_but_not_weights():
    one, two = (parse_run([*SMALL, "--data-path", "1", path, "2", "/b"]).config for path in ("/a", "/local/a"))
    assert shared_values(one) == shared_values(two)
    assert data_paths(one) == ("/a", "/b") and data_paths(two) == ("/local/a", "/b")
    words = "--train-weighted-split-paths", "TRAIN: 0.3 0:0.95 /a, 0.7 0:0.95 /b"
    assert data_paths(parse_run([*SMALL, *words]).config) == ("/a", "/b")
    assert values(*words)["data.train_groups"].count("PATH") == 2


@pytest.mark.parametrize("name", FAMOUS)
def test_every_field_of_real_commands_has_arguments(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ds_config.json").write_text("{}")
    argv, world = FAMOUS[name]
    assert all(shared_values(parse_run(argv, world_size=world).config).values())


def test_a_changed_field_changes_its_value():
    config = parse_run(SMALL).config
    changed = replace(config, runtime=replace(config.runtime, seed=99))
    differing = {name for name, text in shared_values(config).items() if shared_values(changed)[name] != text}
    assert differing == {"runtime.seed"}
