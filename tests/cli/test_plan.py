"""Tests of `megatron-lite plan`: the answer, JSON, exit codes, options, and all errors at once."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from support.job_commands import BIG_RAMP, CURRICULUM, MULTILINGUAL, SMALL, without

from megatron_lite.cli.main import main
from megatron_lite.cli.plan import read_request
from megatron_lite.config.arguments import parse_run
from megatron_lite.config.vocabulary import with_vocabulary
from megatron_lite.planner.calibration import calibrate, run_of
from megatron_lite.planner.hardware import Hardware, accelerator, hardware
from megatron_lite.planner.step_time import step_time_of
from megatron_lite.runs.catalog import set_latest
from megatron_lite.runs.metrics_file import encode


def plan(capsys, *argv):
    """Return exit code, output and error text of the command."""
    code = main(["plan", *map(str, argv)])
    return code, *capsys.readouterr()


def record_of(capsys, *argv):
    code, out, err = plan(capsys, "--json", *argv)
    assert code == 0, err
    return json.loads(out)


def test_the_answer_comes_first(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = plan(capsys, *BIG_RAMP, "--world-size", "256", "--gpu", "v100", "--gpus-per-node", "4")
    lines = out.splitlines()
    assert code == 0
    assert "days" in lines[0] and "GPU hours: 13B on 256 x v100-32gb (64 nodes of 4)" in lines[0]
    assert lines[1].startswith("fits (") and lines[1].endswith("warnings")
    assert all(line.startswith("! ") for line in lines[2:5])
    for part in (
        "12,853,386,240 parameters",
        "311,541 iterations, 299,999,568 samples, 614,399,115,264 tokens",
        "256 ranks = tensor 2 x pipeline 4 x data 32",
        "(Narayanan et al. 2021)",
        "208 checkpoints of 168 GiB",
        "(Daly 2006)",
        "23,457-311,541",
        "2, 4, 8, 16, 32: every batch of the ramp-up is equal for all replicas",
        "pipeline bubble",
    ):
        assert part in out, part
    assert all(len(line) <= 80 for line in out[out.index("Time") : out.index("Notes")].splitlines()), "tables fit"


def test_json(capsys):
    found = record_of(capsys, *MULTILINGUAL, "--world-size", "384", "--gpu", "h200", "--carbon-intensity", "57")
    assert found["answer"]["fits"] and found["answer"]["within_budget"] is None
    assert found["time"]["iterations"] == 115_311 and found["model"]["name"] == "176B"
    assert sum(found["time"]["seconds"].values()) == pytest.approx(found["time"]["total_seconds"])
    final = found["time"]["stages"][-1]
    assert sum(final["parts"].values()) == pytest.approx(final["step_seconds"])
    assert found["assumptions"]["watts"] == 700 and found["assumptions"]["price"] is None
    assert 0.2 < found["time"]["mfu"] < found["time"]["hfu"] < 0.8
    assert found["disk"]["checkpoint"] == 14 * found["model"]["exact"]
    assert found["cost"]["tons_of_co2"] == pytest.approx(found["cost"]["megawatt_hours"] * 0.057)
    assert found["machine"]["device"]["name"] == "h200" and found["machine"]["nodes"] == 48


@pytest.mark.parametrize("argv", [SMALL, CURRICULUM])
def test_other_runs(argv, capsys):
    found = record_of(capsys, *argv)
    assert found["goodput"]["between_saves_seconds"] is None
    assert any("writes no checkpoint" in warning for warning in found["warnings"])
    code, out, _ = plan(capsys, *argv)
    assert code == 0 and "not in the total, since nothing is saved" in out


def test_the_rest_of_a_resumed_run(capsys, tmp_path):
    argv = [*SMALL, "--save", tmp_path, "--load", tmp_path, "--save-interval", "10"]
    assert record_of(capsys, *argv)["answer"]["done_iterations"] == 0
    set_latest(tmp_path, 60)
    answer = record_of(capsys, *argv)["answer"]
    assert answer["done_iterations"] == 60 and answer["remaining_days"] == pytest.approx(0.4 * answer["days"])
    _, out, _ = plan(capsys, *argv)
    assert out.splitlines()[1].endswith(" of them left after iteration 60")
    assert record_of(capsys, *argv, "--finetune")["answer"]["done_iterations"] == 0


def test_a_run_that_does_not_fit_fails_with_flags_that_fit(capsys):
    argv = [*SMALL, "--num-layers", "24", "--hidden-size", "4096", "--num-attention-heads", "32", "--bf16"]
    argv += ["--seq-length", "2048", "--max-position-embeddings", "2048", "--world-size", "8", "--gpu", "a100-40gb"]
    code, out, _ = plan(capsys, *argv)
    assert code == 1
    assert "DOES NOT FIT" in out.splitlines()[1]
    warning = out.splitlines()[2]
    assert warning.startswith("! The run does not fit: pipeline rank 0 needs ") and "It fits with " in warning
    remedy = warning.partition("It fits with ")[2].partition(" (")[0].split()
    code, out, _ = plan(capsys, *argv, *remedy)
    assert code == 0 and out.splitlines()[1].startswith("fits ("), remedy


def test_a_model_that_fits_nowhere(capsys):
    argv = [*SMALL, "--hidden-size", "65536", "--num-attention-heads", "64", "--bf16", "--gpu", "v100-16gb"]
    code, out, _ = plan(capsys, *argv)
    assert code == 1 and "no small change makes it fit" in out


def test_a_run_over_the_budget_fails(capsys):
    argv = [*BIG_RAMP, "--world-size", "256", "--gpu", "a100"]
    code, out, _ = plan(capsys, *argv, "--budget-hours", "1000")
    assert code == 1 and "OVER THE BUDGET" in out and "exceed --budget-hours 1,000" in out
    code, out, _ = plan(capsys, *argv, "--budget-hours", "1e7")
    assert code == 0 and "within the budget" in out


def test_everything_that_is_wrong_is_reported_at_once(capsys):
    code, out, err = plan(
        capsys, *without(SMALL, "--lr"), "--gpu", "a1000", "--pue", "0", "--num-layers", "x", "--budget-hours"
    )
    assert code == 1 and not out
    assert "4 errors" in err
    assert "--gpu a1000 is unknown. Use --gpu a1" in err
    assert "Cannot read --pue '0'. Give --pue a number from 1 to 10" in err
    assert "--budget-hours has no value" in err
    assert "--num-layers" in err


@pytest.mark.parametrize("value", ["nan", "inf", "-1", "0", "x", "", "9" * 5000, "²"])
def test_numbers(value, capsys):
    for option in ("--gpus-per-node", "--network-gbit", "--budget-hours", "--node-mttf-hours", "--pue"):
        code, out, err = plan(capsys, *SMALL, f"{option}={value}")
        assert code == 1 and not out and err.count(option) == 2 and len(err) < 500


EXTREMES = {"--write-gbytes": "0.001", "--node-mttf-hours": "0.001", "--restart-minutes": "1e4", "--job-hours": "0.01"}


@pytest.mark.parametrize("options", [{name: EXTREMES[name]} for name in EXTREMES] + [EXTREMES])
def test_extreme_options_give_finite_plans(options, capsys):
    argv = [*SMALL, "--train-iters", "1000000", "--save", "x", "--save-interval", "10", "--world-size", "4"]
    argv += [word for pair in options.items() for word in pair]
    code, out, _ = plan(capsys, *argv, "--json")
    record = json.loads(out, parse_constant=lambda name: pytest.fail(name))
    assert record["answer"]["days"] < 1e6 and code == (0 if record["answer"]["can_finish"] else 1)
    _, out, _ = plan(capsys, *argv)
    assert max(map(len, out.splitlines())) < 400 and " nan" not in out and " inf" not in out


def test_a_run_that_cannot_finish(capsys):
    saving = ["--train-iters", "10000000", "--save", "x", "--save-interval", "1000000"]
    code, out, _ = plan(capsys, *SMALL, *saving, "--node-mttf-hours", "0.01")
    assert code == 1 and out.splitlines()[1].startswith("CANNOT FINISH, fits (")
    assert "The run cannot finish: with 1 node it fails every 36 s, and saves are " in out.splitlines()[2]
    assert "not in the total, since the run cannot finish" in out
    code, out, _ = plan(capsys, *SMALL, "--train-iters", "10000000", "--job-hours", "2")
    assert code == 1 and "nothing is saved, and each job starts at iteration 0. Add --save FOLDER" in out
    code, out, _ = plan(capsys, *SMALL, *saving, "--job-hours", "0.5")
    assert code == 0 and "which takes 25% of the time. Use longer jobs" in out


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no full device")
@pytest.mark.parametrize("more", [[], ["--json"]])
def test_output_that_cannot_be_written(more):
    command = [sys.executable, "-m", "megatron_lite", "plan", *SMALL, *more]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1 and "Cannot write to standard output: No space left on device. " in done.stderr
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert done.returncode == 0 and not done.stderr, "a closed pipe is not a run that does not fit"


def test_a_run_without_length_or_training(capsys):
    code, _, err = plan(capsys, *without(SMALL, "--train-iters"), "--skip-train")
    assert code == 1 and "Remove --skip-train to plan the training" in err
    code, _, err = plan(capsys, *without(SMALL, "--train-iters"), "--train-samples", "3")
    assert code == 1 and "--train-samples 3 is less than a global batch" in err
    code, _, err = plan(capsys, *without(SMALL, "--train-iters"), "--epochs", "2", "--data-path", "none")
    assert code == 1 and "Give --train-samples N instead of --epochs" in err


def test_options_of_a_launcher_stay_its_own():
    launcher = ["srun", "--gpus-per-node", "4", "--nodes=8", "python", "pretrain_gpt.py"]
    found = read_request(["--gpu", "a100", *launcher, *SMALL, "--gpus-per-node=8", "--json"])
    assert found.values == {"--gpu": "a100", "--gpus-per-node": 8} and found.as_json
    assert found.words == [*launcher, *SMALL]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("--gpu h100 a100", "--gpu takes one value, but a100 follows. Remove a100"),
        ("--search 3", "--search takes no value, but 3 follows. Remove 3"),
        ("--json yes", "--json takes no value, but yes follows. Remove yes"),
        ("--gpu-wats 3", "Unknown option --gpu-wats of plan. Write --gpu-watts"),
        ("--gpu_watts=0", "Cannot read --gpu-watts '0'. Give --gpu-watts a number from 1 to 100,000"),
        ("--serach", "Unknown option --serach of plan. Write --search"),
        ("--price 3", "Unknown option --price of plan. Write --gpu-hour-price"),
        ("--gpu h100 --gpu a100", "--gpu is given twice. Remove one --gpu"),
    ],
)
def test_misspelled_options(words, text, capsys):
    code, out, err = plan(capsys, *SMALL, *words.split())
    assert (code, out, err) == (1, "", f"ConfigError: {text}\n")


@pytest.mark.parametrize("words", ["--search 3", "--json yes"])
def test_values_of_switches_before_the_command(words, capsys):
    name, value = words.split()
    code, out, err = plan(capsys, name, value, *SMALL)
    assert (code, out, err) == (1, "", f"ConfigError: {name} takes no value, but {value} follows. Remove {value}\n")


def test_the_number_of_ranks_before_the_launcher():
    launcher = ["torchrun", "--nproc-per-node", "8", "pretrain_gpt.py"]
    assert read_request(["--world-size", "16", *launcher, *SMALL]).words == [*launcher, *SMALL, "--world-size", "16"]
    assert read_request(["--world-size=16", *launcher, *SMALL]).words == [*launcher, *SMALL, "--world-size=16"]


def test_the_launcher_gives_the_number_of_ranks(capsys):
    found = record_of(capsys, "--gpu", "a100", "torchrun", "--nproc-per-node", "8", "--nnodes", "2", "pretrain_gpt.py",
                      *SMALL)  # fmt: skip
    assert found["layout"]["world_size"] == 16 and found["machine"]["nodes"] == 2


def test_help_lists_every_option(capsys):
    from megatron_lite.cli.plan import OPTIONS

    code, out, _ = plan(capsys, "--help")
    assert code == 0 and not [option for option in OPTIONS if f"  {option} " not in out]


def test_neither_torch_nor_numpy_is_imported():
    code = (
        "import sys; from megatron_lite.cli.main import main; "
        f"main(['plan', *{SMALL!r}]); print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def slow_machine(slowdown):
    """Return a CPU on which every kernel takes `slowdown` times as long as by the table."""
    device = accelerator("cpu")
    default = hardware("cpu").efficiency
    rates = {name: getattr(default, name) / slowdown for name in ("matmul", "attention", "memory", "optimizer")}
    kernels = replace(device, kernel_seconds=slowdown * device.kernel_seconds)
    return Hardware(kernels, 1, replace(default, **rates))


def metrics_of(path, config, machine, timers):
    """Write the metrics file that a run of a config has on a machine."""
    step = step_time_of(config, machine, 8, 32)
    parts = {"optimizer": step.optimizer, "forward-backward": step.total - step.optimizer}
    records = [{"kind": "start", "device": "cpu", "config": asdict(config)}]
    for iteration in range(1, 12):
        seconds = 9.0 if iteration == 1 else step.total
        record = {"kind": "iteration", "iteration": iteration, "seconds": seconds, "global_batch_size": 8}
        records.append(record | {"seq_length": 32} | ({"timers": parts} if timers else {}))
    path.write_bytes(b"".join(map(encode, records)))


@pytest.mark.parametrize("timers", [False, True])
def test_calibration_recovers_the_machine(timers, tmp_path):
    config = with_vocabulary(parse_run(SMALL).config, 1000)
    machine = slow_machine(3.0)
    if timers:
        machine = replace(machine, efficiency=replace(machine.efficiency, optimizer=machine.efficiency.optimizer / 4))
    metrics_of(tmp_path / "metrics.jsonl", config, machine, timers)
    measured, device, measurements = run_of(tmp_path / "metrics.jsonl")
    assert measured == config and device == "cpu"
    found = calibrate(measured, hardware("cpu"), measurements)
    assert found.iterations == 8, "the first three are left out"
    assert found.after == pytest.approx(found.measured, rel=1e-3)
    larger = with_vocabulary(parse_run([*SMALL, "--num-layers", "8", "--hidden-size", "128"]).config, 1000)
    expected = step_time_of(larger, machine, 8, 32)
    predicted = step_time_of(larger, found.machine, 8, 32)
    assert predicted.total == pytest.approx(expected.total, rel=0.05)
    assert predicted.optimizer == pytest.approx(expected.optimizer, rel=0.05)


def test_a_plan_by_a_measured_run(tmp_path, capsys):
    config = with_vocabulary(parse_run(SMALL).config, 1000)
    metrics_of(tmp_path / "metrics.jsonl", config, slow_machine(2.0), timers=True)
    found = record_of(capsys, *SMALL, "--calibrate", tmp_path / "metrics.jsonl")
    assert found["machine"]["device"]["name"] == "cpu", "the device of the measured run"
    assert found["calibration"]["predicted_after"] == pytest.approx(found["calibration"]["measured_seconds"], rel=1e-3)
    assert not any("placeholders" in warning for warning in found["warnings"])
    _, out, _ = plan(capsys, *SMALL, "--calibrate", tmp_path / "metrics.jsonl")
    assert "Calibrated  on 8 iterations of" in out


@pytest.mark.parametrize(
    ("flags", "device", "warning"),
    [
        ("--device cpu", "cpu", "The speeds of a CPU are placeholders, and times are not predicted. Give --calibrate"),
        ("--device cpu --gpu a100", "a100-80gb", "The command trains on --device cpu, and the plan is for a100-80gb. "),
        ("--device tpu", "tpu-v4", "its time is that of the native engine"),
        ("--device cuda --gpu cpu", "cpu", "The command trains on --device cuda, and the plan is for cpu. "),
    ],
)
def test_the_device_of_the_command(flags, device, warning, capsys):
    found = record_of(capsys, *SMALL, *flags.split())
    assert found["machine"]["device"]["name"] == device
    assert any(warning in line for line in found["warnings"])


def test_unusable_metrics_files(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    code, _, err = plan(capsys, *SMALL, "--calibrate", path)
    assert code == 1 and "metrics.jsonl" in err
    path.write_bytes(encode({"kind": "message", "text": "x"}))
    code, _, err = plan(capsys, *SMALL, "--calibrate", path)
    assert code == 1 and "has no record of a run's start" in err
    path.write_bytes(encode({"kind": "start"}) + encode({"kind": "iteration"}))
    code, _, err = plan(capsys, *SMALL, "--calibrate", path)
    assert code == 1 and "metrics.jsonl has a damaged line 1: config is not that of a run. Give a copy" in err
    sound = {"kind": "iteration", "seconds": 1.0, "global_batch_size": 8, "seq_length": 32}
    for damage, shown in (
        ({"seconds": "NaN"}, "seconds should be a number above 0"),
        ({"global_batch_size": 0, "seq_length": "x"}, "global_batch_size and seq_length should be numbers above 0"),
        ({"timers": {"optimizer": None}}, "timers should be numbers above 0"),
    ):
        path.write_bytes(b"".join(map(encode, [{"kind": "start", "config": {}}, *[sound] * 3, sound | damage])))
        code, _, err = plan(capsys, *SMALL, "--calibrate", path)
        assert code == 1 and f"has a damaged line 5: {shown}" in err
    path.write_bytes(encode({"kind": "start", "config": {}}))
    code, _, err = plan(capsys, *SMALL, "--calibrate", path)
    assert code == 1 and "has no iteration after the first 3" in err
