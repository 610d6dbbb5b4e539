import pytest

pytest.importorskip("tensorboard")

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_lite.config.metrics import MetricsConfig
from megatron_lite.metrics.report import IterationReport
from megatron_lite.metrics.rewind import cut_events
from megatron_lite.metrics.tensorboard import TensorboardSink, open_writer

SAMPLES = 4


def write(folder, iterations):
    sink = TensorboardSink(MetricsConfig(), open_writer(str(folder), 1))
    for iteration in iterations:
        sink.iteration(
            IterationReport(
                iteration=iteration,
                train_iterations=100,
                consumed_train_samples=SAMPLES * iteration,
                consumed_train_tokens=0,
                losses={"lm loss": float(iteration)},
                learning_rate=1e-3,
                global_batch_size=SAMPLES,
                seq_length=8,
                seconds=1.0,
                tokens_per_second=1.0,
            )
        )
    sink.close()


def points(folder, tag="lm loss"):
    events = EventAccumulator(str(folder), purge_orphaned_data=False)
    events.Reload()
    return [event.step for event in events.Scalars(tag)]


def test_points_after_the_iteration_are_removed(tmp_path):
    write(tmp_path, range(1, 8))
    (path,) = tmp_path.iterdir()
    before = path.read_bytes()
    assert cut_events(tmp_path, 5, tmp_path / "aside")
    assert points(tmp_path) == [1, 2, 3, 4, 5]
    # Most of these steps are above 5, and stay.
    assert points(tmp_path, "lm loss vs samples") == [4, 8, 12, 16, 20]
    assert points(tmp_path, "tokens-per-second") == [1, 2, 3, 4, 5]
    assert before.startswith(path.read_bytes()), "what stays is as it was"
    assert (tmp_path / "aside" / path.name).read_bytes() == before


def test_files_without_later_points_do_not_change(tmp_path):
    write(tmp_path, range(1, 4))
    (path,) = tmp_path.iterdir()
    before = path.stat()
    assert not cut_events(tmp_path, 3, tmp_path / "aside")
    assert path.stat() == before and not (tmp_path / "aside").exists()


@pytest.mark.parametrize("lost", [1, 11, 40])
def test_an_incomplete_file_is_truncated(tmp_path, lost):
    write(tmp_path, range(1, 8))
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-lost])
    assert cut_events(tmp_path, 6)
    assert points(tmp_path) == [1, 2, 3, 4, 5, 6]
