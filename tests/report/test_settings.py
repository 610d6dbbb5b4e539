"""Tests of recorded settings rendered as command-line text."""

import pytest

from megatron_lite.report.settings import change_text, setting_name, setting_text
from megatron_lite.runs.comparison import Difference


@pytest.mark.parametrize(
    ("path", "value", "text"),
    [
        ("lr.lr", 1e-3, "0.001"),
        ("lr.lr", None, "not given"),
        ("training.exit_interval", 0, "not given"),
        ("training.eval_iters", 0, "0"),
        ("training.skip_train", True, "on"),
        ("training.skip_train", False, "off"),
        ("parallel.overlap_grad_reduce", True, "on"),
        ("data.sources", [], "not given"),
        ("batch.rampup", [4, 4, 300], "4 4 300"),
        ("model.num_query_groups", 2, "2"),
        ("checkpoint.phases", [{"interval": 10, "until": 0}], "--save-interval 10"),
        ("precision.dtype", "bf16", "--bf16"),
        ("fields.of_another_version", [1, 2], "1 2"),
        ("checkpoint.phases", [{"of another version": 1}], "{'of another version': 1}"),
    ],
)
def test_a_value_is_shown_as_on_a_command_line(path, value, text):
    assert setting_text(path, value) == text


def test_a_field_of_several_flags_without_arguments_has_its_own_name():
    assert setting_name("precision.dtype") == "dtype" and setting_name("lr.lr") == "--lr"


@pytest.mark.parametrize(
    ("path", "before", "after", "text"),
    [
        ("training.exit_interval", 15, 0, "--exit-interval 15 removed"),
        ("training.exit_interval", 0, 15, "--exit-interval 15 added"),
        ("training.eval_iters", 100, 0, "--eval-iters 100 → 0"),
        ("training.skip_train", True, False, "--skip-train removed"),
        ("training.exit_interval", None, 0, "--exit-interval: None → 0"),
        ("precision.dtype", "fp32", "bf16", "--fp32 → --bf16"),
        (
            "checkpoint.phases",
            [{"interval": 10, "until": 0}],
            [{"interval": 10, "until": 20}, {"interval": 5, "until": 0}],
            "--save-interval 10 → --save-schedule '10:20 5'",
        ),
    ],
)
def test_a_change_names_what_was_added_or_removed(path, before, after, text):
    assert change_text(Difference(path, before, after)) == text
