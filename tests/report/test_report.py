"""Tests of the report: content, time accounting, size, errors, comparison, and the page in a browser."""

import html.parser
import json
import math
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.run_files import BATCH, SEQ, RunFiles, config, eventful_run

from megatron_lite.cli import report as command
from megatron_lite.errors import ConfigError, DataError
from megatron_lite.planner.hardware import Hardware, device_of
from megatron_lite.planner.step_time import step_time_of
from megatron_lite.report.chart import Chart, draw, line_of
from megatron_lite.report.comparison import comparison_page
from megatron_lite.report.energy import Energy, read_energy
from megatron_lite.report.html import Markup, duration, table
from megatron_lite.report.page import key_figures, read_config, run_page
from megatron_lite.report.plan import make_plan, planned_parts
from megatron_lite.report.run_log import read_run
from megatron_lite.report.timeline import account
from megatron_lite.runs.evaluations import Evaluation, append_evaluations
from megatron_lite.runs.exit_status import ExitStatus
from megatron_lite.runs.lock import FolderLock
from megatron_lite.runs.process import this_process

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Balance(html.parser.HTMLParser):
    """Checks that every element is closed by its own end tag."""

    VOID = ("meta", "input")

    def __init__(self, text):
        super().__init__()
        self.open = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "gpt <1.3B> & co"
    eventful_run(folder)
    shared = {"settings": {"seq_length": 2048}, "iteration": 3000, "checkpoint": "abc"}
    metrics = {"word_perplexity": 17.25, "word_perplexity_stderr": 0.5}
    append_evaluations(folder, [Evaluation(task="wikitext", name="wikitext", metrics=metrics, **shared)])
    return folder


def test_a_page_shows_everything_and_loads_nothing(run):
    page = run_page(read_run(run))
    Balance(page)
    assert not re.search(r"https?://|src=|<link|@import|url\(", page)
    for text in (
        *("gpt &lt;1.3B&gt; &amp; co", "completed", "GPT with 1.3B parameters", "tensor 2 x pipeline 2 x data 2"),
        *(
            "8 x NVIDIA H100 80GB HBM3 on 2 hosts",
            "by tokens",
            "without the first 10%",
            "2 data sources",
            "wiki",
            "code",
        ),
        *("spike: loss 4.9120 in iterations 1701 to 1703", "spike: loss 5.1020 in iterations 2050 to 2052"),
        *("automatic rollback to iteration 2000", "restart"),
        *("130 iterations discarded", "skipping samples 131072 to 131583", "Gradient norm", "Learning rate"),
        *("lost to restarts", "communication and waiting", "between jobs", "17.25 ±0.500", "wikitext (window 2048)"),
        *("--data-path &#x27;a &lt;b&gt;&#x27;", "PyTorch", "2.11.0", "989 TFLOP/s per device in bf16", "1.29"),
    ):
        assert text in page, text


def test_the_time_of_a_run_is_accounted_for(run):
    timeline = account(read_run(run))
    parts = timeline.parts
    assert sum(parts.values()) == pytest.approx(timeline.wall)
    assert (timeline.jobs, timeline.lost_iterations) == (2, 190)
    expected = {"lost to restarts": 183.0, "start-up": 95.0, "evaluation": 54.0, "saves": 18.0, "between jobs": 5400.0}
    assert {name: parts[name] for name in expected} == pytest.approx(expected)
    assert parts["other"] == pytest.approx(0.0, abs=1e-3)
    training = parts["compute"] + parts["data"] + parts["optimizer"] + parts["communication and waiting"]
    assert training == pytest.approx(timeline.iterations)
    assert timeline.goodput == pytest.approx(timeline.iterations / (timeline.wall - 5400.0))
    assert timeline.device_seconds == pytest.approx(8 * timeline.job_seconds)


def test_time_between_jobs_whose_starts_were_discarded(tmp_path):
    run = RunFiles(tmp_path)
    run.start()
    run.iterations(1, 10)
    run.now += 1000.0  # no job runs; the start after it was removed
    run.discarded(10, 4, 50.0, starts=1)
    run.start(10, gap=200.0)
    run.iterations(11, 12)
    run.file.close()
    timeline = account(read_run(tmp_path))
    assert timeline.parts["between jobs"] == pytest.approx(1200.0)
    assert timeline.jobs == 3 and timeline.parts["lost to restarts"] == 50.0
    assert timeline.device_seconds == pytest.approx(8 * timeline.job_seconds)


def test_the_plan_is_drawn_beside_the_measured_speed(run, tmp_path):
    log = read_run(run)
    plan = make_plan(log, read_config(log))
    expected = step_time_of(config(), Hardware(device_of("NVIDIA H100 80GB HBM3"), 4), BATCH, SEQ)
    assert plan.seconds == pytest.approx(np.full(3000, expected.total)) and plan.step == expected
    assert sum(planned_parts(expected).values()) == pytest.approx(expected.total)
    page = run_page(log)
    planned = re.escape(duration(expected.total))
    assert re.search(rf"<td>iteration</td><td class='n'>0\.9\d* s</td><td class='n'>{planned}</td>", page)
    assert page.count("data-name='plan'") == 2
    log.start["device"] = "CPU"
    assert make_plan(log, read_config(log)) is None and "data-name='plan'" not in run_page(log)


def test_a_long_ramp_is_predicted_at_some_of_its_batch_sizes(tmp_path):
    files = RunFiles(tmp_path)
    files.start()
    for number in range(500):
        files.iterations(number + 1, number + 1, global_batch_size=16 + 8 * number)
    files.file.close()
    log = read_run(tmp_path)
    seconds = make_plan(log, read_config(log)).seconds
    known = np.isfinite(seconds)
    assert 100 <= known.sum() <= 200 and (np.diff(seconds[known]) > 0).all()


def test_energy_is_summed_over_jobs_and_nodes(tmp_path):
    head = "run_id,emissions,energy_consumed\n"
    (tmp_path / "emissions-000.csv").write_text(f"{head}a,0.1,1.0\na,0.2,2.0\nb,0.3,3.0\nc,")
    (tmp_path / "emissions-008.csv").write_text(f"{head}d,0.5,5.0\n")
    assert read_energy(str(tmp_path)) == Energy(10.0, 1.0, 2)
    assert read_energy("") is None and read_energy(str(tmp_path / "none")) is None


def test_files_of_earlier_versions_lack_times_and_facts(tmp_path):
    run = RunFiles(tmp_path)
    run.write("start", iteration=0, config={})
    run.iterations(1, 3, mfu="NaN", grad_norm="Infinity")
    run.write("save", iteration=3, seconds=2.0, size=10)
    run.file.close()
    page = run_page(read_run(tmp_path / "metrics.jsonl"))
    Balance(page)
    assert "No iteration was measured by part" in page and "unfinished" in page
    assert run_page(read_run(tmp_path)).startswith("<!doctype html>")


def test_a_long_run_keeps_extremes_in_a_small_page(tmp_path):
    run = RunFiles(tmp_path)
    run.start()
    run.iterations(1, 7000)
    run.iterations(7001, 7001, losses={"lm loss": 25.0})
    run.iterations(7002, 12_000)
    run.file.write(b'{"kind": "iteration", "iter')  # torn by a kill
    run.file.close()
    page = run_page(read_run(tmp_path))
    assert len(page) < 300_000
    low, high = map(float, re.search(r"data-y='([^']*)'", page)[1].split(","))
    assert high > 25.0 > low
    band = re.search(r"<polygon class='band c1' points='([^']*)'", page)[1]
    top = min(int(pair.split(",")[1]) for pair in band.split())
    assert high - (high - low) * top / 100_000 == pytest.approx(25.0, abs=1e-3)


@given(
    st.lists(st.floats(-1e300, 1e300) | st.just(math.nan) | st.just(math.inf), min_size=1, max_size=900),
    st.sampled_from(["smooth", "plain", "dashed", "points"]),
    st.booleans(),
)
def test_any_values_give_a_chart(values, style, robust):
    x = np.arange(1.0, len(values) + 1)
    chart = Chart("T", "", [line_of("a 'b' <c>", x, np.array(values), 1, style)], robust=robust)
    if chart.is_empty:
        assert not np.isfinite(values).any()
        return
    figure = draw(chart)
    Balance(figure)
    for points in re.findall(r"points='([^']*)'", figure):
        for pair in points.split():
            a, b = map(int, pair.split(","))
            assert 0 <= a <= 100_000 and -100_000 <= b <= 200_000


def test_many_restarts_are_ticks_above_the_curves(tmp_path):
    run = RunFiles(tmp_path)
    run.start()
    for number in range(40):
        run.iterations(number + 1, number + 1)
        run.start(number + 1, gap=10.0)
    run.validation(40)
    run.file.close()
    page = run_page(read_run(tmp_path))
    assert "restart (40)" in page and "<path class='mark restart' d='M0 0V5000'" in page
    assert "0V5000' data-text='restart at iteration 40'" in page and " 0V100000" not in page


def test_the_state_is_that_of_the_last_job(tmp_path):
    run = RunFiles(tmp_path)
    run.start()
    run.validation(500, name="a")
    run.validation(500, name="b", split="test")
    run.file.close()
    log = read_run(tmp_path)
    assert log.state() == "unfinished" and "<td>b</td>" in run_page(log), "a run that only evaluates"
    status = ExitStatus(status="time_limit", message="stopping before the <limit>")
    (tmp_path / "exit_status.json").write_bytes(status.encode())
    assert "stopped at the time limit</span>" in run_page(log) and "stopping before the &lt;limit&gt;" in run_page(log)
    for status, message, state in (
        ("exit_flag", "exiting program at iteration 15 (--exit-interval)", "stopped by --exit-interval"),
        ("rolled_back", "rolled back to iteration 15", "rolled back"),
        ("evaluated", "done", "evaluated"),
    ):
        (tmp_path / "exit_status.json").write_bytes(ExitStatus(status=status, message=message).encode())
        assert log.state() == state
    lock = FolderLock(tmp_path, process=this_process("n1"), command="train")
    (tmp_path / "exit_status.json").unlink()
    assert lock.try_acquire() and log.state() == "running"
    lock.release()


def test_the_command_writes_one_file_twice_without_torch(run, tmp_path):
    script = (
        "import sys; from megatron_lite.cli.main import main; code = main(sys.argv[1:]); "
        "sys.exit(code or 'torch' in sys.modules)"
    )
    target = tmp_path / "new" / "page.html"
    words = [sys.executable, "-c", script, "report", str(run), "--output", str(target)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"report written to {target} (" in done.stdout
    assert command.run([str(run / "metrics.jsonl")]) == command.run([str(run)]) == 0
    assert (run / "report.html").is_file() and target.is_file()


def test_cells_are_escaped_whatever_they_begin_with():
    page = table(("flag", "value"), [("--eod-token", "</s>"), (Markup("<code>--x</code>"), "<eod>")])
    assert "&lt;/s&gt;" in page and "&lt;eod&gt;" in page and "<code>--x</code>" in page


def test_a_damaged_line_is_left_out_with_a_warning(run, tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = (run / "metrics.jsonl").read_bytes().splitlines()
    path.write_bytes(b"\n".join([*lines[:2], b"\0\0\0", b"{", *lines[2:]]) + b"\n")
    log = read_run(tmp_path)
    assert [text for _, text in log.warnings if "is damaged in line" in text] == [
        f"{path} is damaged in line 3-4, which this report leaves out"
    ]


def test_unreadable_runs_name_what_to_give(tmp_path):
    with pytest.raises(DataError, match=r"none does not exist.*--save folder"):
        command.run([str(tmp_path / "none")])
    with pytest.raises(DataError, match=r"holds no metrics\.jsonl.*--metrics-file"):
        command.run([str(tmp_path)])
    run = RunFiles(tmp_path)
    run.start()
    run.file.close()
    with pytest.raises(DataError, match=r"contains no iteration.*Wait until the run has finished an iteration"):
        command.run([str(tmp_path)])
    (tmp_path / "metrics.jsonl").write_text("notes\nof mine\n")
    with pytest.raises(DataError, match="not a metrics file"):
        command.run([str(tmp_path)])


def test_a_run_whose_loss_is_nan_is_not_reported_with_its_last_finite_loss(run, tmp_path):
    files = RunFiles(tmp_path)
    files.start()
    files.iterations(1, 10)
    files.iterations(11, 11, losses={"lm loss": "Infinity"})
    files.iterations(12, 20)
    files.iterations(21, 40, losses={"lm loss": "NaN"})
    files.validation(20)
    files.validation(40, losses={"lm loss": "NaN"})
    files.file.close()
    log = read_run(tmp_path)
    page = run_page(log)
    assert "loss is Infinity in iteration 11" in page and "loss is NaN from iteration 21" in page
    figures = {label: (value, note) for label, value, note in key_figures(log, account(log))}
    assert figures["Training loss"] == ("NaN", "from iteration 21")
    low, high = map(float, re.search(r"data-x='([^']*)'", page)[1].split(","))
    assert low <= 1 and high == 40, "the axis reaches the last iteration"
    assert figures["Validation loss"][0] == "NaN" and figures["Validation loss"][1].endswith(" at 20")
    compared = comparison_page([read_run(run), log])
    assert re.search(r"Training loss at [^<]* tokens</td><td>[\d.]+</td><td>NaN</td>", compared)


def test_an_existing_file_of_another_kind_is_not_replaced(run, tmp_path, capsys):
    (tmp_path / "empty.html").touch()
    assert command.run([str(run), "--output", str(tmp_path / "empty.html")]) == 0
    shutil.copytree(run, tmp_path / "run")
    for name in ("metrics.jsonl", "rollbacks.jsonl"):
        path = tmp_path / "run" / name
        before = path.read_bytes()
        with pytest.raises(ConfigError, match=r"Refusing to replace --output .*Give another path with --output"):
            command.run([str(tmp_path / "run"), "--output", str(path)])
        assert path.read_bytes() == before
    for words in (["--output", ""], [""]):
        with pytest.raises(SystemExit):
            command.run([str(run), *words])
        assert "the path is empty" in capsys.readouterr().err


def test_unwritable_outputs_and_too_many_runs_are_refused(run, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"Cannot write --output .*page\.html"):
        command.run([str(run), "--output", str(tmp_path / "file" / "page.html")])
    with pytest.raises(ConfigError, match="Cannot compare 9 runs in one report"):
        command.run([str(run)] * 9)


def test_runs_are_compared_over_tokens_with_their_differing_settings(run, tmp_path, monkeypatch):
    other = tmp_path / run.name
    eventful_run(other, lr=3e-4, seed=2)
    monkeypatch.chdir(tmp_path)
    assert command.run([str(run), str(other)]) == 0
    page = (tmp_path / "comparison.html").read_text(encoding="utf-8")
    Balance(page)
    name = "gpt &lt;1.3B&gt; &amp; co"
    assert f"{tmp_path.name}/{name}" in page, "equal names show more of the path"
    assert "<code>--lr</code></td><td>0.0006</td><td>0.0003</td>" in page
    assert "Training loss at 393M tokens" in page and "by samples" in page and "wikitext (window 2048)" in page


def test_a_run_compared_with_itself_is_noted(run, tmp_path, capsys):
    (tmp_path / "link").symlink_to(run)
    output = tmp_path / "comparison.html"
    assert command.run([str(run), str(tmp_path / "link"), "--output", str(output)]) == 0
    assert "(1) and gpt <1.3B> & co/metrics.jsonl (2) are the same run: " in capsys.readouterr().out
    page = output.read_text(encoding="utf-8")
    assert "are the same run" in page and "No setting that changes what is learned differs" in page


PROBE = """<pre id='probe'></pre><script>
const area = document.querySelector('.area'), box = area.getBoundingClientRect(), root = document.documentElement;
area.dispatchEvent(new PointerEvent('pointermove', {clientX: box.left + box.width * 0.567, clientY: box.top + 9}));
document.getElementById('probe').textContent = JSON.stringify({
  tip: area.querySelector('.tip').innerText, page: getComputedStyle(document.body).backgroundColor,
  width: innerWidth, overflow: root.scrollWidth - root.clientWidth,
  figures: document.querySelectorAll('figure').length});
</script>"""


def browse(folder, page, *options):
    """Open a page in Chromium; return what the probe finds."""
    path = folder / "probe.html"
    path.write_text(page.replace("</body>", f"{PROBE}</body>"), encoding="utf-8")
    words = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    done = subprocess.run([*words, *options, path.as_uri()], capture_output=True, text=True, timeout=120)
    found = re.search(r"<pre id=.probe.>(.*?)</pre>", done.stdout, re.DOTALL)
    return json.loads(html.unescape(found[1])) if found else done.stderr


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_the_page_in_a_browser(run, tmp_path):
    page = run_page(read_run(run))
    dark = browse(tmp_path, page, "--dump-dom", "--window-size=1200,900", "--blink-settings=preferredColorScheme=0")
    assert re.match(r"iteration 1,(69|70)\d\ntraining 2\.\d{4}\nspike: loss 4.9120", dark["tip"])
    assert dark["page"] == "rgb(15, 18, 22)" and dark["overflow"] == 0 and dark["figures"] >= 8
    phone = browse(tmp_path, page, "--dump-dom", "--window-size=500,900", "--blink-settings=preferredColorScheme=1")
    assert phone["page"] == "rgb(246, 247, 249)" and phone["width"] == 500 and phone["overflow"] == 0
    picture = tmp_path / "page.png"
    browse(tmp_path, page, f"--screenshot={picture}", "--window-size=1200,2000")
    assert picture.stat().st_size > 50_000, "curves, tables and text"
