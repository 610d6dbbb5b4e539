"""Tests of W&B, CSV and CodeCarbon, with stand-ins of their packages, and of the guard around these sinks."""

import csv
import inspect
import io
import sys
from types import SimpleNamespace

import pytest

from megatron_lite.config.batch import BatchConfig
from megatron_lite.config.checkpoint import CheckpointConfig
from megatron_lite.config.metrics import MetricsConfig
from megatron_lite.config.model import ModelConfig
from megatron_lite.config.run import RunConfig
from megatron_lite.errors import ConfigError
from megatron_lite.metrics.csv_files import CsvSink
from megatron_lite.metrics.report import IterationReport, RunFacts, SaveRecord, ValidationReport
from megatron_lite.metrics.reporter import build_reporter
from megatron_lite.runs.metrics_file import read_records


class Wandb:
    """Stand-in of the package wandb (0.31) that records what is logged, by run id."""

    def __init__(self, fails=False):
        self.runs, self.calls, self.fails = {}, [], fails

    def Settings(self, *, console, init_timeout):
        return SimpleNamespace(console=console, init_timeout=init_timeout)

    def init(self, *, project, entity, name, dir, id, resume, config, allow_val_change, settings):
        if self.fails:
            raise ConnectionError("no server\nsecond line")
        self.calls.append({"project": project, "entity": entity, "name": name, "dir": dir, "id": id, "resume": resume})
        run_id = id or f"id{len(self.runs)}"
        return self.runs.setdefault(run_id, WandbRun(run_id, config))


class WandbRun:
    def __init__(self, run_id, config):
        self.id, self.config, self.rows, self.metrics, self.codes = run_id, config, [], [], []

    def define_metric(self, name, step_metric=None):
        self.metrics.append((name, step_metric))

    def log(self, data):
        assert all(isinstance(value, (int, float)) for value in data.values())
        self.rows.append(data)

    def finish(self, exit_code=None):
        self.codes.append(exit_code)


class CodeCarbon:
    """Stand-in of the package codecarbon (3.3)."""

    def __init__(self, emissions=0.25):
        self.emissions, self.trackers = emissions, []

    def OfflineEmissionsTracker(self, **options):
        events = []
        tracker = SimpleNamespace(
            options=options,
            events=events,
            start=lambda: events.append("start"),
            flush=lambda: events.append("flush") or self.emissions,
            stop=lambda: events.append("stop") or self.emissions,
        )
        self.trackers.append(tracker)
        return tracker


def config(save, **metrics):
    return RunConfig(
        model=ModelConfig(num_layers=1, hidden_size=8, num_attention_heads=1),
        batch=BatchConfig(seq_length=8, micro_batch_size=1),
        checkpoint=CheckpointConfig(save=str(save), load=str(save)),
        metrics=MetricsConfig(progress_bar=False, **metrics),
    )


def report(iteration, **losses):
    return IterationReport(
        iteration=iteration,
        train_iterations=9,
        consumed_train_samples=4 * iteration,
        consumed_train_tokens=32 * iteration,
        losses={"lm loss": 1.0 / iteration, **losses},
        learning_rate=1e-3,
        global_batch_size=4,
        seq_length=8,
        seconds=0.1,
        tokens_per_second=320.0,
    )


def train(settings, iterations, start=0, *, error=None, stream=None):
    """Report a job that saves after its last iteration, or fails."""
    facts = RunFacts(parameters=1, train_iterations=9, start_iteration=start)
    with build_reporter(settings, stream or io.StringIO(), emissions_rank=0) as reporter:
        reporter.start(settings, facts)
        for iteration in iterations:
            reporter.iteration(report(iteration))
        last = iterations[-1]
        reporter.validation(
            ValidationReport(iteration=last, consumed_train_samples=4 * last, losses={"lm loss": 0.5}, seconds=1.0)
        )
        if error is not None:
            raise error
        reporter.saved(SaveRecord(last, 2.0, 10, 0.5))


@pytest.fixture
def wandb(monkeypatch):
    package = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", package)
    return package


def test_wandb_continues_the_same_run_after_a_restart(wandb, tmp_path):
    save = tmp_path / "124m"
    settings = config(save, wandb_project="gpt")
    with pytest.raises(ValueError):
        train(settings, [1, 2, 3], error=ValueError())
    train(settings, [3, 4], start=2)
    assert [call["id"] for call in wandb.calls] == [None, "id0"]
    assert wandb.calls[0] == {
        "project": "gpt", "entity": None, "name": "124m", "dir": str(save), "id": None, "resume": "allow"
    }  # fmt: skip
    run = wandb.runs["id0"]
    assert run.codes == [1, 0] and run.metrics[:2] == [("iteration", None), ("*", "iteration")]
    assert run.config["model"]["hidden_size"] == 8 and run.config["facts"]["train_iterations"] == 9
    losses = [(row["iteration"], row["lm loss"]) for row in run.rows if "lm loss" in row]
    assert losses == [(1, 1.0), (2, 1 / 2), (3, 1 / 3), (3, 1 / 3), (4, 1 / 4)]
    assert run.rows[-1] == {
        "iteration": 4, "consumed-train-samples": 16, "consumed-train-tokens": 0, "lm loss validation": 0.5
    }  # fmt: skip
    train(settings, [1])
    assert list(wandb.runs) == ["id0", "id1"], "a run from the beginning is another one"


def test_wandb_takes_megatrons_flags(wandb, tmp_path):
    flags = {"wandb_exp_name": "night", "wandb_entity": "team", "wandb_save_dir": str(tmp_path / "w")}
    train(config("", wandb_project="gpt", tensorboard_log_interval=2, **flags), [1, 2, 3, 4])
    assert wandb.calls[0]["name"] == "night" and wandb.calls[0]["entity"] == "team"
    assert wandb.calls[0]["dir"] == str(tmp_path / "w") and (tmp_path / "w").is_dir()
    assert [row["iteration"] for row in wandb.runs["id0"].rows] == [2, 4, 4]


def test_a_server_that_does_not_answer_is_one_warning(wandb, tmp_path):
    wandb.fails = True
    stream = io.StringIO()
    train(config(tmp_path, wandb_project="gpt"), [1, 2], stream=stream)
    text = (
        "WARNING: Weights & Biases failed and receives nothing more from this job, and training continues: "
        "ConnectionError: no server"
    )
    assert stream.getvalue().count("Weights & Biases") == 1 and f"{text}\n" in stream.getvalue()
    records = read_records(tmp_path / "metrics.jsonl")
    assert [record["text"] for record in records if record["kind"] == "message"] == [text]
    assert [record["iteration"] for record in records if record["kind"] == "iteration"] == [1, 2]


def rows(folder, name):
    with (folder / f"{name}.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_csv_files_read_as_one_run_after_a_restart(tmp_path):
    settings = config(tmp_path / "run", csv_dir=str(tmp_path / "csv"))
    train(settings, [1, 2, 3, 4])
    with (tmp_path / "csv" / "iterations.csv").open("a", encoding="utf-8") as file:
        file.write("5,20,160")  # torn by a kill
    train(settings, [3, 4, 5], start=2)
    found = rows(tmp_path / "csv", "iterations")
    assert [(int(row["iteration"]), float(row["lm loss"])) for row in found] == [(i, 1.0 / i) for i in range(1, 6)]
    assert [row["iteration"] for row in rows(tmp_path / "csv", "validations")] == ["5"]
    assert rows(tmp_path / "csv", "saves") == [
        {"iteration": "5", "seconds": "2.0", "blocking_seconds": "0.5", "size": "10"}
    ]
    train(settings, [1])
    assert [row["iteration"] for row in rows(tmp_path / "csv", "iterations")] == ["1"]
    assert len(rows(tmp_path / "csv", "iterations.previous-1")) == 5


def test_a_loss_that_appears_later_is_a_new_column(tmp_path):
    sink = CsvSink(tmp_path)
    sink.start(config(""), RunFacts(parameters=1, train_iterations=9))
    sink.iteration(report(1))
    sink.iteration(report(2, **{"lm loss wiki, new": 4.0}))
    sink.iteration(report(3, **{"lm loss wiki, new": 5.0}))
    sink.close()
    assert [row["lm loss wiki, new"] for row in rows(tmp_path, "iterations")] == ["", "4.0", "5.0"]


def test_codecarbon_measures_and_writes_at_saves(monkeypatch, tmp_path):
    package = CodeCarbon()
    monkeypatch.setitem(sys.modules, "codecarbon", package)
    settings = config("", codecarbon_dir=str(tmp_path / "cc"), codecarbon_country="DEU")
    train(settings, [1])
    (tracker,) = package.trackers
    assert tracker.options["output_dir"] == str(tmp_path / "cc") and (tmp_path / "cc").is_dir()
    assert tracker.options["output_file"] == "emissions-000.csv" and tracker.options["country_iso_code"] == "DEU"
    assert [event for event in tracker.events if event != "flush"] == ["start", "stop"]
    # One rank of each node measures, whether it reports or not.
    with build_reporter(settings, io.StringIO(), active=False, emissions_rank=8) as reporter:
        reporter.start(settings, RunFacts(parameters=1, train_iterations=9))
    assert package.trackers[1].options["output_file"] == "emissions-008.csv"
    with build_reporter(settings, io.StringIO(), active=False) as reporter:
        reporter.start(settings, RunFacts(parameters=1, train_iterations=9))
    assert len(package.trackers) == 2


def test_a_tracker_without_measurements_is_a_warning(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "codecarbon", CodeCarbon(emissions=None))
    stream = io.StringIO()
    train(config("", codecarbon_dir=str(tmp_path)), [1], stream=stream)
    assert stream.getvalue().count("WARNING: CodeCarbon failed") == 1
    assert "the tracker does not measure" in stream.getvalue()


@pytest.mark.parametrize(
    ("name", "flags"), [("wandb", {"wandb_project": "gpt"}), ("codecarbon", {"codecarbon_dir": "cc"})]
)
def test_a_missing_package_names_the_extra(monkeypatch, name, flags):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=rf"needs the library {name}.*\[{name}\].*remove --{name}-"):
        build_reporter(config("", **flags), io.StringIO(), emissions_rank=0)


def test_the_stand_ins_have_the_signatures_of_the_packages():
    """Where the packages are installed: each argument that is given exists."""
    if (package := _installed("wandb")) is not None:
        assert set(inspect.signature(Wandb().init).parameters) <= set(inspect.signature(package.init).parameters)
        package.Settings(console="off", init_timeout=60)
        for name in ("define_metric", "log", "finish"):
            ours, theirs = inspect.signature(getattr(WandbRun, name)), inspect.signature(getattr(package.Run, name))
            assert set(ours.parameters) <= set(theirs.parameters)
    if (package := _installed("codecarbon")) is not None:
        base = package.emissions_tracker.BaseEmissionsTracker
        assert {
            "output_dir",
            "output_file",
            "on_csv_write",
            "allow_multiple_runs",
            "log_level",
            "logger_preamble",
        } <= set(inspect.signature(base.__init__).parameters)


def _installed(name):
    try:
        return __import__(name)
    except ImportError:
        return None


def test_a_csv_folder_that_cannot_be_made_is_an_error_before_the_start(tmp_path):
    (tmp_path / "file").write_text("")
    settings = config(tmp_path / "run", csv_dir=str(tmp_path / "file"))
    with pytest.raises(ConfigError, match=r"Cannot create the folder --csv-dir .*file: File exists"):
        build_reporter(settings, io.StringIO())
