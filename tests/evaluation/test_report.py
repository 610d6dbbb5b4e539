"""Tables, JSON and curves of results; evaluations.jsonl."""

import json
import math

import pytest

from megatron_lite.errors import DataError
from megatron_lite.evaluation.report import curves, format_checkpoints, format_results, json_record
from megatron_lite.runs.evaluations import (
    EVALUATIONS_NAME,
    Evaluation,
    append_evaluations,
    checkpoint_identity,
    read_evaluations,
)


def result(task="text", name="a/b.txt", iteration=10, checkpoint="c", settings=None, **metrics):
    metrics = metrics or {"tokens": 10, "loss": 2.0, "perplexity": math.e**2, "bytes": 40, "bits_per_byte": 0.7}
    settings = settings or {"seq_length": 8, "stride": 4}
    return Evaluation(
        task=task, name=name, settings=settings, metrics=metrics, iteration=iteration, checkpoint=checkpoint
    )


def test_table_and_json_of_extreme_values():
    huge = {"tokens": 1_000_000, "loss": 1000.0, "perplexity": math.inf, "bytes": 4_000_000, "bits_per_byte": 360.7}
    hopeless = result(**huge, words=1_000, word_perplexity=math.inf)
    table = format_results([hopeless, result(**{**huge, "perplexity": 4e5}, words=200_000, word_perplexity=1e13)])
    lines = table.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].split() == ["tokens", "loss", "perplexity", "bits/byte", "words", "word", "ppl"]
    assert lines[1] == "a/b.txt (window 8, stride 4)"
    assert all(len(line.split()) == 6 for line in lines[2::2])
    record = json.loads(json.dumps(json_record(hopeless), allow_nan=False))
    assert record["word_perplexity"] == "Infinity" and record["bytes"] == 4_000_000 and record["stride"] == 4


def test_each_kind_of_metrics_has_its_labels():
    harness = result("piqa", "piqa", settings={"seq_length": 8, "num_fewshot": 5}, acc=0.5, acc_stderr=0.25, samples=4)
    table = format_results([result(), result(), harness])
    firsts = ["tokens", "a/b.txt", "10", "a/b.txt", "10", "acc", "piqa", "0.5000"]
    assert [line.split()[0] for line in table.splitlines()] == firsts
    assert "0.5000 ±0.250" in table and "piqa (window 8, 5-shot)" in table


def test_checkpoints_in_rows_and_curves():
    results = [result(iteration=n, perplexity=9.0 - n) for n in (1, 2, 3)]
    results += [result("lambada", "l", n, settings={"seq_length": 8}, accuracy=n / 10) for n in (1, 3)]
    table = format_checkpoints(results)
    rows = [line.split() for line in table.splitlines()[3:]]
    assert rows == [["1", "8.00", "0.1000"], ["2", "7.00", "-"], ["3", "6.00", "0.3000"]]
    drawn = curves([*results, result("ptb", "p", 1, settings={"seq_length": 8}, word_perplexity=3.0)])
    assert set(drawn) == {"perplexity", "accuracy"}, "one point is no curve"
    assert drawn["accuracy"].validation == {"lambada l (window 8)": ((1.0, 0.1), (3.0, 0.3))}
    assert drawn["perplexity"].quantity == "perplexity"


def test_recorded_results_are_read_again(tmp_path):
    assert read_evaluations(tmp_path) == []
    first, second = result(iteration=20), result(iteration=10, checkpoint="d", perplexity=math.inf)
    append_evaluations(tmp_path, [first, second])
    again = result(iteration=20, perplexity=3.0)
    append_evaluations(tmp_path, [again])
    assert read_evaluations(tmp_path) == [second, again], "the latest of equal keys, by iteration"


def test_an_incomplete_last_line_is_removed(tmp_path):
    append_evaluations(tmp_path, [result()])
    path = tmp_path / EVALUATIONS_NAME
    path.write_bytes(path.read_bytes() + b'{"kind": "eval')
    assert len(read_evaluations(tmp_path)) == 1
    append_evaluations(tmp_path, [result(iteration=20, checkpoint="d")])
    assert [one.iteration for one in read_evaluations(tmp_path)] == [10, 20]
    path.write_text("x\n" + path.read_text())
    with pytest.raises(DataError, match="damaged: line 1"):
        read_evaluations(tmp_path)


def test_a_checkpoint_that_was_saved_again_is_another_one(tmp_path):
    manifest = tmp_path / "manifest.json"
    manifest.write_text("1")
    before = checkpoint_identity(tmp_path)
    manifest.write_text("2")
    assert checkpoint_identity(tmp_path) != before
