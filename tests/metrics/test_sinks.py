import io
import sys

import pytest

from megatron_lite.config.batch import BatchConfig
from megatron_lite.config.checkpoint import CheckpointConfig
from megatron_lite.config.metrics import MetricsConfig
from megatron_lite.config.model import ModelConfig
from megatron_lite.config.run import RunConfig
from megatron_lite.errors import ConfigError
from megatron_lite.metrics.progress_bar import ProgressSink, is_terminal
from megatron_lite.metrics.report import IterationReport, RunFacts, ValidationReport
from megatron_lite.metrics.reporter import Reporter, build_reporter
from megatron_lite.metrics.tensorboard import TensorboardSink, open_writer
from megatron_lite.runs.metrics_file import metrics_path, read_records

FACTS = RunFacts(parameters=100, train_iterations=4, world_size=8)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def config(save="", **metrics):
    return RunConfig(
        model=ModelConfig(num_layers=1, hidden_size=8, num_attention_heads=1),
        batch=BatchConfig(seq_length=8, micro_batch_size=1),
        checkpoint=CheckpointConfig(save=str(save)),
        metrics=MetricsConfig(**metrics),
    )


def report(iteration, **changes):
    values = {
        "losses": {"lm loss": 2.0, "lm loss wiki": 3.0},
        "learning_rate": 1e-3,
        "global_batch_size": 4,
        "seq_length": 8,
        "grad_norm": 1.5,
        "seconds": 0.1,
        "tokens_per_second": 12345.0,
        "mfu": 0.412,
        "eta_seconds": 61.0,
        "memory": {"allocated": 10, "max_allocated": 20, "reserved": 30},
        "timers": {"optimizer": 0.01},
    }
    return IterationReport(
        iteration=iteration,
        train_iterations=4,
        consumed_train_samples=4 * iteration,
        consumed_train_tokens=32 * iteration,
        **{**values, **changes},
    )


def valid(iteration, **changes):
    return ValidationReport(
        iteration=iteration, consumed_train_samples=4 * iteration, losses={"lm loss": 1.0}, **changes
    )


class Writer:
    """SummaryWriter that records its calls."""

    def __init__(self):
        self.scalars, self.texts = {}, {}

    def add_scalar(self, tag, value, step):
        self.scalars.setdefault(tag, []).append((step, value))

    def add_text(self, tag, text, global_step):
        self.texts[tag] = text

    def flush(self):
        pass

    close = flush


def scalars_of(metrics, *events):
    writer = Writer()
    sink = TensorboardSink(metrics, writer)
    sink.start(config(), FACTS)
    for event in events:
        (sink.iteration if isinstance(event, IterationReport) else sink.validation)(event)
    return writer


def test_tensorboard_has_megatrons_tags():
    everything = MetricsConfig(
        log_timers=True, log_memory=True, log_world_size=True, log_params_norm=True, log_validation_ppl=True
    )
    writer = scalars_of(
        everything, report(3, num_zeros=0, params_norm=7.0, tflops_per_device=2.0), valid(3), valid(3, name="wiki")
    )
    both = {"learning-rate", "batch-size", "lm loss", "lm loss wiki", "loss-scale", "world-size", "grad-norm"}
    both |= {"num-zeros", "params-norm", "lm loss validation", "lm loss validation ppl"}
    both |= {"lm loss validation-wiki", "lm loss validation-wiki ppl"}
    once = {"iteration-time", "throughput", "optimizer-time", "tokens-per-second", "mfu"}
    once |= {"mem-reserved-bytes", "mem-allocated-bytes", "mem-max-allocated-bytes"}
    assert set(writer.scalars) == both | {f"{tag} vs samples" for tag in both} | once
    assert writer.scalars["lm loss"] == [(3, 2.0)] and writer.scalars["lm loss vs samples"] == [(12, 2.0)]
    assert writer.scalars["world-size"] == [(3, 8)]
    assert writer.texts["model.hidden_size"] == "8"


def test_tensorboard_writes_only_configured_tags():
    quiet = MetricsConfig(log_learning_rate=False, log_loss_scale=False, tensorboard_log_interval=2)
    writer = scalars_of(quiet, *(report(iteration) for iteration in range(1, 5)), valid(4))
    plain = {tag for tag in writer.scalars if not tag.endswith(" vs samples")}
    assert plain == {
        *("batch-size", "lm loss", "lm loss wiki", "grad-norm", "tokens-per-second", "mfu", "lm loss validation")
    }
    assert [step for step, _ in writer.scalars["lm loss"]] == [2, 4]


def test_tensorboard_files_can_be_read(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    reporter = build_reporter(config(tensorboard_dir=str(tmp_path), progress_bar=False), io.StringIO())
    with reporter:
        reporter.start(config(), FACTS)
        reporter.iteration(report(1))
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("lm loss")] == [(1, 2.0)]
    assert "runtime.seed/text_summary" in events.Tags()["tensors"]


def test_a_missing_tensorboard_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match=r"-e .*\[tensorboard\]"):
        open_writer(str(tmp_path), 10)


def run_on(stream, settings):
    with build_reporter(settings, stream) as reporter:
        reporter.message("hello [bold]world[/bold]")
        reporter.start(settings, FACTS)
        for iteration in range(1, 5):
            reporter.iteration(report(iteration))
        reporter.validation(valid(4))
    return stream.getvalue()


def test_plain_lines_without_terminal():
    text = run_on(io.StringIO(), config(log_interval=2))
    assert "\x1b" not in text
    assert text.count(" iteration        ") == 2
    assert "hello [bold]world[/bold]\n" in text


def test_a_bar_below_the_lines_on_a_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.delenv("NO_COLOR", raising=False)
    stream = Terminal()
    text = run_on(stream, config(log_interval=2))
    assert "hello [bold]world[/bold]" in text
    assert "4/4 · loss 2.0000 · valid 1.0000 · lr 1.00e-03 · 12.3k tokens/s · MFU 41.2% · ETA 00:01:01" in text
    assert text.rstrip().endswith("\x1b[?25h")  # the cursor is given back
    assert "\x1b" not in run_on(Terminal(), config(progress_bar=False))


def test_a_dumb_terminal_has_no_bar(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    assert not is_terminal(Terminal())
    monkeypatch.setenv("TERM", "xterm")
    assert is_terminal(Terminal()) and not is_terminal(io.StringIO())


def test_a_bar_can_be_closed_before_start(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    sink = ProgressSink(Terminal())
    sink.iteration(report(1))
    sink.close()


def test_metrics_are_in_the_save_folder(tmp_path):
    assert metrics_path(config()) is None
    assert metrics_path(config(save="out")).as_posix() == "out/metrics.jsonl"
    assert metrics_path(config(save="out", metrics_file="here.jsonl")).as_posix() == "here.jsonl"
    run_on(io.StringIO(), config(save=tmp_path, progress_bar=False))
    kinds = [record["kind"] for record in read_records(tmp_path / "metrics.jsonl")]
    assert kinds == ["start", "message", *["iteration"] * 4, "validation"]


def test_a_rank_that_does_not_report_writes_nothing(tmp_path):
    stream = io.StringIO()
    with build_reporter(config(save=tmp_path / "out"), stream, active=False) as reporter:
        reporter.start(config(), FACTS)
        reporter.iteration(report(1))
    assert stream.getvalue() == "" and not (tmp_path / "out").exists()


def test_every_sink_is_closed_even_if_one_fails():
    closed = []

    class Failing(Writer):
        def close(self):
            closed.append("failing")
            raise OSError("full")

    class Good(Writer):
        def close(self):
            closed.append("good")

    with pytest.raises(OSError, match="full"):
        Reporter([TensorboardSink(MetricsConfig(), Failing()), TensorboardSink(MetricsConfig(), Good())]).close()
    assert closed == ["failing", "good"]


def test_a_narrow_terminal_drops_less_important_values(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    for columns, status in (
        (80, "4/4 · loss 2.0000 · valid 1.0000 · 12.3k tokens/s · ETA 00:01:01"),
        (62, "4/4 · loss 2.0000 · valid 1.0000 · ETA 00:01:01"),
        (30, "4/4 · loss 2.0000"),
    ):
        monkeypatch.setenv("COLUMNS", str(columns))
        last = run_on(Terminal(), config(log_interval=2)).rsplit("\r", 1)[-1]
        assert status in last
        assert "100%" in last
        assert "━━━━━" in last
