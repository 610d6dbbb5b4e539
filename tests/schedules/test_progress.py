from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from megatron_lite.schedules.progress import Progress


def test_an_iteration_without_step_consumes_samples_without_applied_progress():
    progress = Progress().advance(8, 256, applied=True).advance(16, 512, applied=False).advance(16, 512, applied=True)
    assert progress == Progress(
        iteration=3,
        consumed_train_samples=40,
        consumed_train_tokens=1280,
        skipped_iterations=1,
        applied_iterations=2,
        applied_samples=24,
        applied_tokens=768,
    )


@given(st.lists(st.tuples(st.integers(0, 99), st.integers(0, 9999), st.booleans())))
def test_roundtrip(iterations):
    progress = Progress(consumed_valid_samples=7)
    for samples, tokens, applied in iterations:
        progress = progress.advance(samples, tokens, applied)
    assert Progress.from_dict(progress.to_dict()) == progress


def test_counts_of_a_foreign_checkpoint_are_completed():
    progress = Progress.from_dict({"iteration": 10, "consumed_train_samples": 160, "skipped_iterations": 2, "args": 3})
    assert (progress.applied_iterations, progress.applied_samples) == (8, 160)
