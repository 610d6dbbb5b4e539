import math
import re
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_lite.cli import curve as command
from megatron_lite.errors import ConfigError, DataError
from megatron_lite.metrics.curve import LossCurve, final_loss, make_axis, read_curve, smooth, thin
from megatron_lite.metrics.curve_svg import draw_svg
from megatron_lite.metrics.curve_terminal import draw_terminal
from megatron_lite.runs.metrics_file import encode

finite = st.floats(-1e6, 1e6)
series = st.lists(finite, min_size=1, max_size=60).map(lambda ys: tuple((float(x), y) for x, y in enumerate(ys, 1)))


@pytest.fixture
def metrics(tmp_path):
    lines = [encode({"kind": "start", "iteration": 0, "parameters": 4_800_000})]
    for iteration in range(1, 41):
        loss = math.nan if iteration == 7 else 3 + 7 * math.exp(-iteration / 10)
        lines.append(encode({"kind": "iteration", "iteration": iteration, "losses": {"lm loss": loss}}))
        if iteration % 10 == 0:
            lines.append(encode({"kind": "validation", "iteration": iteration, "losses": {"lm loss": loss + 0.1}}))
    last = {"kind": "validation", "iteration": 40, "losses": {"lm loss": 9.0}, "split": "test", "at_end": True}
    lines.append(encode(last))
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"".join(lines))
    return path


def test_reads_finite_training_and_validation_losses(metrics):
    curve = read_curve(metrics)
    assert curve.title == "Loss of a GPT with 4.8M parameters"
    assert len(curve.train) == 39
    assert [x for x, _ in curve.validation["validation"]] == [10, 20, 30, 40]


def test_a_run_without_a_loss_is_an_error(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_bytes(encode({"kind": "start", "iteration": 0}))
    with pytest.raises(DataError, match="contains no finite loss"):
        read_curve(path)


@given(values=st.lists(finite, min_size=1, max_size=20), count=st.integers(2, 12), whole=st.booleans())
def test_an_axis_covers_its_values_with_round_ticks(values, count, whole):
    axis = make_axis(values, count, whole=whole)
    assert axis.low <= min(values) and axis.high >= max(values) and axis.low < axis.high
    assert len(axis.ticks) <= 2 * count + 3
    span = axis.high - axis.low
    assert all(axis.low - 1e-6 * span <= tick <= axis.high + 1e-6 * span for tick in axis.ticks)
    if whole:
        assert all(tick == round(tick) for tick in axis.ticks)
    elif max(values) - min(values) > 1e-3:
        assert axis.ticks
        labels = [axis.label(tick) for tick in axis.ticks]
        assert len(set(labels)) == len(labels)


@given(series)
def test_smoothing_keeps_ends_and_bounds(points):
    smoothed = smooth(points)
    assert [x for x, _ in smoothed] == [x for x, _ in points]
    low, high = min(y for _, y in points), max(y for _, y in points)
    assert all(low - 1e-3 <= y <= high + 1e-3 for _, y in smoothed)
    assert low - 1e-3 <= final_loss(points) <= high + 1e-3


def test_smoothing_does_not_lag():
    line = [(float(x), 1000.0 - x) for x in range(500)]
    assert all(abs(a[1] - b[1]) < 1e-6 for a, b in zip(line, smooth(line), strict=True))


@given(series, st.integers(4, 50))
def test_thinning_keeps_order_and_extremes(points, limit):
    kept = thin(points, limit)
    assert kept == sorted(kept) and set(kept) <= set(points)
    assert min(y for _, y in kept) == min(y for _, y in points)
    assert max(y for _, y in kept) == max(y for _, y in points)
    assert len(kept) <= max(limit, 4) + 2


@given(series, st.lists(finite, max_size=5), st.text(max_size=8))
def test_the_svg_is_well_formed_and_inside_its_frame(train, losses, name):
    validation = {name: tuple((float(x), y) for x, y in enumerate(losses, 1))} if losses else {}
    name_is_xml = all(character.isprintable() for character in name)
    picture = draw_svg(LossCurve("a < b & c", train, validation if name_is_xml else {}))
    root = ElementTree.fromstring(picture)
    width, height = float(root.get("width")), float(root.get("height"))
    for line in root.iter("{http://www.w3.org/2000/svg}polyline"):
        for x, y in (map(float, pair.split(",")) for pair in line.get("points").split()):
            assert 0 <= x <= width and 0 <= y <= height


def test_the_svg_has_title_and_legend(metrics):
    text = draw_svg(read_curve(metrics))
    for words in ("Loss of a GPT with 4.8M parameters", ">iteration<", ">lm loss<", ">validation 3.2282<", ">40<"):
        assert words in text
    assert text.count("<circle") == 4


@given(series, st.integers(20, 200), st.integers(3, 40), st.booleans())
def test_the_terminal_drawing_fits(train, width, height, unicode):
    text = draw_terminal(LossCurve("t", train, {"validation": train[-1:]}), width, height, unicode=unicode)
    lines = text.splitlines()
    assert len(lines) == height + 4
    margin = max(0, *(len(re.split(r"[│|]", line)[0]) for line in lines[2 : 2 + height]))
    assert all(len(line) <= max(width, margin + 18) for line in lines[2:])
    if not unicode:
        assert text.isascii()


def test_a_single_loss_has_a_tick_beside_it_at_any_height():
    curve = LossCurve("t", ((1.0, 4.73685),), {})
    for height in range(3, 20):
        rows = draw_terminal(curve, 40, height, unicode=False).splitlines()[2 : 2 + height]
        assert any(row.split("|")[0].strip() for row in rows), height


def test_the_terminal_drawing_shows_a_falling_loss(metrics):
    rows = draw_terminal(read_curve(metrics), 60, 10, unicode=False).splitlines()[2:12]
    first_dots = [row.index(".") for row in rows if "." in row]
    assert first_dots == sorted(first_dots)
    assert sum(row.count("o") for row in rows) == 4


def test_the_command_draws_both(metrics, tmp_path, capsys):
    assert command.run([str(metrics.parent), "--svg", str(tmp_path / "new" / "loss.svg"), "--title", "Mine"]) == 0
    assert "Mine" in capsys.readouterr().out
    assert "<svg" in (tmp_path / "new" / "loss.svg").read_text(encoding="utf-8")
    with pytest.raises(ConfigError, match="--svg"):
        command.run([str(metrics), "--no-terminal", "--svg", str(metrics / "below" / "loss.svg")])
