"""Errors of lm-evaluation-harness tasks, without importing lm_eval; tests/end_to_end/test_harness.py runs tasks."""

import fnmatch
import importlib.util
from types import MappingProxyType, SimpleNamespace

import pytest

from megatron_lite.errors import ConfigError, DataError
from megatron_lite.evaluation import harness


class Task(SimpleNamespace):
    """Task as far as harness.py sets it up."""

    def get_config(self, key):
        return getattr(self, key, None)

    def set_config(self, key, value):
        setattr(self, key, value)


class Manager(SimpleNamespace):
    """Task manager with two tasks."""

    task_index = MappingProxyType({"piqa": SimpleNamespace(cfg={}, yaml_path="piqa.yaml"), "arc_easy": None})
    all_tasks = ("arc_easy", "piqa")

    def match_tasks(self, patterns):
        return [name for name in self.all_tasks if fnmatch.fnmatch(name, patterns[0])]

    def load(self, names):
        raise ConnectionError("Couldn't reach 'x' on the Hub.\nmore")


def test_a_missing_library_names_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"lm_eval.*not installed.*pip install .*\[eval\]'"):
        harness.load_tasks(["piqa"], [], None, print)


def test_unknown_tasks_name_the_nearest():
    harness._require_known(["piqa", "arc_*"], Manager())
    with pytest.raises(ConfigError, match=r"no task piqe, x_\*.*Did you mean piqa\?.*--include-path"):
        harness._require_known(["piqe", "x_*"], Manager())


def test_missing_data_name_the_command_that_downloads_them():
    with pytest.raises(DataError, match=r"Couldn't reach 'x' on the Hub\. Data are not .*load_dataset\(…\)"):
        harness._load("piqa", Manager())


@pytest.mark.parametrize(("flag", "said"), [("UNSAFE_CODE", "executes code"), ("MULTIMODAL", "images or sound")])
def test_tasks_that_are_not_supported(flag, said):
    harness._require_supported("t", Task())
    with pytest.raises(ConfigError, match=rf"task t {'' if flag == 'UNSAFE_CODE' else 'has '}{said}.*Remove t from"):
        harness._require_supported("t", Task(**{flag: True}))


def test_few_shot_examples():
    told = []
    for configured, given, wanted in ((None, None, 0), (5, None, 5), (5, 2, 2), (None, 3, 3), (5, 0, 0), (0, 4, 0)):
        task = Task(num_fewshot=configured)
        harness._set_fewshot("t", task, given, told.append)
        assert task.num_fewshot == wanted
    assert len(told) == 1 and "--num-fewshot 4 does not apply" in told[0]


def test_metrics_by_plain_names():
    values = {"acc,none": 1, "acc_stderr,none": "N/A", "alias": "t", "exact_match,strict-match": 0.5}
    values["exact_match_stderr,strict-match"] = 0.1
    assert harness._metrics(values) == {
        "acc": 1.0,
        "exact_match (strict-match)": 0.5,
        "exact_match (strict-match)_stderr": 0.1,
    }
