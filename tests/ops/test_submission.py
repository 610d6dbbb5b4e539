"""Tests of the checks before a job is queued, each with a job that fails it."""

import os
import shlex

import pytest

from megatron_lite.errors import ConfigError
from megatron_lite.ops import submission as module
from megatron_lite.ops.exclude import EXCLUDE_NAME
from megatron_lite.ops.job import read_job
from megatron_lite.ops.quota import Space
from megatron_lite.ops.resources import without_option
from megatron_lite.ops.submission import check_job
from megatron_lite.runs.metrics_file import encode

HEADER = "#!/bin/bash\n#SBATCH --nodes=2 --ntasks-per-node=2 --gpus-per-node=2 --time=1:00:00 --signal=USR1@300\n"
UNSIGNALLED = HEADER.replace(" --signal=USR1@300", "")
FLAGS = (
    "--num-layers 4 --hidden-size 32 --num-attention-heads 4 --seq-length 32 --max-position-embeddings 32 "
    "--micro-batch-size 1 --global-batch-size 4 --train-iters 100 --lr 1e-3 --mock-data --tokenizer-type NullTokenizer "
    "--vocab-size 100 --save-interval 20"
)


@pytest.fixture
def check(tmp_path):
    def check(more="", header=HEADER, flags=FLAGS, save=None, step_seconds=None, environment=()):
        path = tmp_path / "job.slurm"
        save = str(tmp_path / "run") if save is None else save
        saved = f"--save {shlex.quote(save)}" if save else ""
        path.write_text(f"{header}srun python pretrain_gpt.py {flags} {saved} {more}\n", encoding="utf-8")
        return check_job(read_job(path, environment=dict(environment)), step_seconds=step_seconds)

    return check


def texts(submission):
    return [str(problem) for problem in submission.problems]


def local(submission):
    return [str(problem) for problem in submission.local_problems]


def test_a_job_without_a_fault(check):
    found = check("--tensor-model-parallel-size 2")
    assert texts(found) == [] == local(found) == found.warnings
    facts = dict(found.facts)
    assert facts["Job"] == "job.slurm: 2 nodes x 2 GPUs = 4 GPUs"
    assert facts["Ranks"] == "4 = tensor 2 x pipeline 1 x data 2"
    assert facts["Time limit"].startswith("01:00:00, saves and stops after 00:55:00; 00:00:10 for a save (assumed for")
    assert facts["Run"] == "100 iterations of batch 4, 400 samples, 12,800 tokens"


def test_all_wrong_flags_and_missing_files_are_named(check):
    found = check(
        "--tensor-model-parallel-size 3 --clip-grad minus --frobnicate 1", flags=FLAGS.replace("--mock-data", "")
    )
    assert len(found.problems) >= 2 and any("--frobnicate" in text for text in texts(found))
    found = check("--data-path /nowhere/data", flags=FLAGS.replace("--mock-data", ""))
    assert texts(found) == [] and any("/nowhere/data" in text for text in local(found))


def test_a_layout_that_does_not_fit_the_allocation(check):
    assert any(
        "--tensor-model-parallel-size 3" in text and "4" in text
        for text in texts(check("--tensor-model-parallel-size 3"))
    )
    header = HEADER.replace("--gpus-per-node=2", "--gpus-per-node=1")
    (problem,) = texts(check(header=header))
    assert "starts 4 ranks, but the job has 2 GPUs (2 nodes with 1 GPU each)" in problem
    found = check(header=HEADER.replace("--gpus-per-node=2", "--gpus-per-node=4"))
    assert found.problems == [] and "4 of the job's 8 GPUs are not used" in found.warnings


def test_a_time_limit_that_ends_before_the_run_can_save(check, tmp_path):
    (problem,) = texts(check("--exit-duration-in-mins 60"))
    assert "--exit-duration-in-mins 60 is not below the time limit of 60 minutes" in problem
    unstopped = "--no-exit-before-job-end"
    assert any("nothing stops the run" in warning for warning in check(unstopped, header=UNSIGNALLED).warnings)
    (problem,) = texts(check(unstopped, header=UNSIGNALLED, step_seconds=400.0))
    assert "about 9 iterations of 400 s fit into 01:00:00 (--time), and --save-interval is 20" in problem
    assert texts(check(unstopped, step_seconds=400.0)) == [], "the signal makes it save"
    assert texts(check(header=UNSIGNALLED, step_seconds=400.0)) == [], "it stops before Slurm's limit"
    (problem,) = texts(check(step_seconds=4000.0))
    assert "The job ends before its first save: about 0 iterations of 4,000 s" in problem
    (tmp_path / "run").mkdir()
    lines = [encode({"kind": "iteration", "iteration": i, "seconds": 400.0}) for i in range(3)]
    (tmp_path / "run" / "metrics.jsonl").write_bytes(b"".join(lines))
    found = check(unstopped, header=UNSIGNALLED)
    assert "first save" in texts(found)[0] and "(measured)" in dict(found.facts)["Step"]


def test_a_time_limit_shorter_than_a_save(check, tmp_path):
    flags = FLAGS.replace("--hidden-size 32", "--hidden-size 8192").replace("--num-layers 4", "--num-layers 60")
    (problem,) = texts(check(flags=flags, header=HEADER.replace("1:00:00", "40")))
    assert problem.startswith(
        "The time limit of 00:40:00 (--time) is shorter than a save: 00:48:30, assumed for 540 GiB"
    )
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_bytes(encode({"kind": "save", "iteration": 20, "seconds": 2000.0}))
    found = check("--no-exit-before-job-end", flags=flags)
    assert texts(found) == [] and "00:50:00 for a save (1.5 times the slowest" in dict(found.facts)["Time limit"]
    assert any("the last save has 00:05:00 before the time limit, and takes 00:50:00" in w for w in found.warnings)
    (problem,) = texts(check("--job-end-margin-in-secs 700", flags=flags))
    assert problem.startswith(
        "No time is left for training: the time limit of 01:00:00 (--time) is needed for the save"
    )


def test_the_step_time_is_estimated_for_a_known_gpu(check):
    header = UNSIGNALLED.replace("--gpus-per-node=2", "--gpus-per-node=a100:2")
    flags = FLAGS.replace("--hidden-size 32", "--hidden-size 8192").replace("-size 4 ", "-size 512000 ", 1)
    found = check("--no-exit-before-job-end", header=header, flags=flags)
    assert "rough estimate for A100, as by `megatron-lite plan`" in dict(found.facts)["Step"]
    assert any("by the rough estimate the job ends before its first save" in warning for warning in found.warnings)
    assert texts(found) == [], "an estimate is no reason to refuse a job"


def test_a_disk_that_is_full(check, monkeypatch):
    monkeypatch.setattr(module, "free_space", lambda folder: Space(3 * 10**6, 10**6))
    found = check()
    assert not found.local_problems
    assert "5 checkpoints take" in found.warnings[0] and "--keep-last N" in found.warnings[0]
    assert check("--keep-last 1").warnings == [], "at most two at a time"
    monkeypatch.setattr(module, "free_space", lambda folder: Space(10**5, 10**6, "left of the user's quota"))
    assert "A checkpoint takes" in local(check())[0] and "left of the user's quota" in local(check())[0]
    monkeypatch.setattr(module, "free_space", lambda folder: Space(10**12, 3))
    assert "has room for 3 (the limit of the file system)" in local(check())[0]
    monkeypatch.setattr(module, "free_space", lambda folder: Space(10**12, 20))
    assert "The checkpoints have 35 files" in check().warnings[0]


def test_the_embedding_counts_in_the_size_of_a_checkpoint(check):
    found = check(flags=FLAGS.replace("--vocab-size 100", "--vocab-size 30_000_000"))
    assert "5 checkpoints of 10.7 GiB" in dict(found.facts)["Disk"]


def test_a_run_that_is_complete_or_has_no_folder(check, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "completed_iteration.txt").write_text("100\n")
    assert "is complete: it reached iteration 100" in texts(check())[0]
    by_epochs = FLAGS.replace("--train-iters 100", "--epochs 3 --lr-decay-style constant")
    by_epochs = by_epochs.replace("--mock-data", "--data-path x")
    epochs = check(flags=by_epochs, step_seconds=2.0)  # the job counts their iterations when it opens the data
    assert not any("is complete" in text for text in texts(epochs))
    facts = dict(epochs.facts)
    assert facts["Run"] == "3 epochs of batch 4; the job counts their iterations"
    assert facts["Step"].endswith("about 1,650 iterations in one job")
    assert facts["Saves"].startswith("every 20 to the end") and " for each checkpoint; " in facts["Disk"]
    assert any("there is no --save" in warning for warning in check(save="").warnings)


def test_a_folder_that_cannot_be_written(check, tmp_path, monkeypatch):
    assert "--save /proc/run cannot be written" in local(check(save="/proc/run"))[0] or os.access("/proc", os.W_OK)
    (tmp_path / "file").touch()
    (problem,) = local(check(save=str(tmp_path / "file" / "run")))
    assert f"cannot be created: {tmp_path / 'file'} is a file" in problem
    may = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path and may(path, mode))
    assert f"cannot be written: no permission for {tmp_path}" in local(check())[0]


def test_relative_paths_belong_to_the_folder_of_the_script(check, tmp_path, monkeypatch):
    (tmp_path / "work" / "run").mkdir(parents=True)
    (tmp_path / "work" / "run" / "completed_iteration.txt").write_text("100\n")
    monkeypatch.chdir(tmp_path)
    assert "is complete" in texts(check(header=HEADER + "cd work\n", save="run"))[0]
    assert "is complete" in texts(check(header=HEADER.replace("--time", "--chdir=work --time"), save="run"))[0]
    assert texts(check(save="run")) == []
    assert str(tmp_path) == os.getcwd()  # noqa: PTH109


def test_variables_without_a_value_are_named(check):
    (warning,) = check("--tensorboard-dir x$ROOT").warnings
    assert warning.startswith("without a value, so expanded to nothing: $ROOT.") and "not exported" in warning
    (problem,) = local(check("--tensorboard-dir x$ROOT", header=HEADER + "set -eu\n"))
    assert "job.slurm uses $ROOT without a value (line 4). `set -u` ends it there" in problem
    assert check("--tensorboard-dir x$ROOT", environment={"ROOT": "y"}).warnings == []
    assert check("--tensorboard-dir x$$-$HOSTNAME-$SLURM_JOB_NODELIST").warnings == [], "bash and Slurm set them"


def test_arguments_that_are_not_given_are_named(check):
    used = "job.slurm uses its arguments $1, which are not given"
    (warning, *_) = check("--tensorboard-dir x$1 --lr ${2:-1e-3}").warnings
    assert f"{used}, so expanded to nothing. Give them after its name: " in warning
    (problem,) = local(check("--tensorboard-dir x$1", header=HEADER + "set -u\n"))
    assert f"{used}. `set -u` ends it there. Give them" in problem


def test_a_damaged_exclude_file_is_one_of_the_reasons(check, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / EXCLUDE_NAME).write_bytes(b"\xff\xfe")
    assert any(EXCLUDE_NAME in problem for problem in local(check()))


def test_sourced_files_must_exist(check, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (problem,) = local(check(header=HEADER + "source conf/env.sh\n"))
    assert f"sources conf/env.sh, which does not exist. The script starts in {tmp_path}" in problem
    (problem,) = local(check(header=HEADER + "source /nowhere/env.sh\n"))
    assert problem.endswith("Create the file, or source one that exists")


def test_a_command_without_a_launcher(tmp_path):
    path = tmp_path / "job.slurm"
    for start, refused in (("python -u", True), ("srun python", False), ("mpirun python", False), ("torchrun", False)):
        path.write_text(f"{HEADER}{start} pretrain_gpt.py {FLAGS}\n", encoding="utf-8")
        problems = [text for text in texts(check_job(read_job(path, environment={}))) if "starts the training" in text]
        assert len(problems) == refused, start
    path.write_text(f"#!/bin/bash\npython pretrain_gpt.py {FLAGS}\n", encoding="utf-8")
    assert texts(check_job(read_job(path, environment={}))) == []


def test_scripts_that_sbatch_refuses(check, tmp_path):
    (problem,) = texts(check(header=HEADER.removeprefix("#!/bin/bash\n")))
    assert "has no interpreter line" in problem and problem.endswith("Begin it with #!/bin/bash")
    path = tmp_path / "dos.slurm"
    path.write_bytes(b"#!/bin/bash\r\nmegatron-lite merge\r\n")
    (problem,) = texts(check_job(read_job(path, environment={})))
    assert "has the line ends of Windows" in problem and problem.endswith(rf"sed -i 's/\r$//' {path}")


def test_an_array_of_the_same_training_command(check):
    array = HEADER.replace("--time", "--array=1-4 --time")
    (problem,) = texts(check(header=array))
    assert problem.startswith("The 4 tasks of the array (--array=1-4) start the same training command at the same time")
    assert texts(check(header=array.replace("1-4", "1-4%1"))) == []
    assert texts(check("--seed $SLURM_ARRAY_TASK_ID", header=array)) == []


def test_paths_computed_from_the_script_are_reported(check, tmp_path):
    (tmp_path / "env.sh").touch()
    found = check(header=HEADER + 'source "$(dirname "$0")/env.sh"\n')
    assert found.local_problems == [] and "spool folder" in found.warnings[0]
    assert check(header=HEADER + "# dirname $0\n").warnings == []


def test_files_that_the_script_writes_are_read(check):
    header = HEADER + 'cat <<EOT > ds.json\n{"train_micro_batch_size_per_gpu": 7}\nEOT\n'
    assert any("7" in text for text in texts(check("--deepspeed --deepspeed_config ds.json", header=header)))


def test_hosts_in_the_exclude_file_of_the_run(check, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / EXCLUDE_NAME).write_text("gpu[017-018]\n", encoding="utf-8")
    found = check()
    assert found.excluded == ("gpu017", "gpu018") and dict(found.facts)["Excluded"] == "gpu017, gpu018"


def test_a_complete_task_of_an_array_is_named_with_the_other_tasks(check, tmp_path):
    (tmp_path / "run0").mkdir()
    (tmp_path / "run0" / "completed_iteration.txt").write_text("100\n")
    array = HEADER.replace("--time", "--array=0-3,5%2 --time")
    (problem,) = texts(check(save="", more=f"--save {tmp_path}/run$SLURM_ARRAY_TASK_ID", header=array))
    assert problem.startswith("Task 0 of the array: The run in --save ") and "--sbatch=--array=1-3,5%2. " in problem


def test_torchrun_with_a_rank_for_each_gpu(tmp_path):
    path = tmp_path / "job.slurm"
    for value, header, expected in (("gpu", HEADER, "4"), ("auto", HEADER, "4"), ("cpu", HEADER, None)):
        text = f"{header}srun torchrun --nnodes=2 --nproc_per_node={value} pretrain_gpt.py {FLAGS}\n"
        path.write_text(text.replace("--ntasks-per-node=2", "--ntasks-per-node=1"), encoding="utf-8")
        if expected is not None:
            assert dict(check_job(read_job(path, environment={})).facts)["Ranks"].startswith(expected)
            path.write_text(path.read_text().replace("--gpus-per-node=2", ""), encoding="utf-8")
        with pytest.raises(ConfigError, match=rf"--nproc-per-node {value} starts a rank for each .*--world-size N"):
            read_job(path, environment={})
        path.write_text(path.read_text().replace("--lr 1e-3", "--lr 1e-3 --world-size 8"), encoding="utf-8")
        assert read_job(path, environment={}).command is not None


def test_an_option_is_removed_in_either_spelling():
    assert without_option(["--exclude=a", "-x", "b", "-xc", "--exclude", "d", "--nodes=2"], "exclude") == ["--nodes=2"]


def test_missing_files_are_named_by_the_flag_that_was_given(check):
    flags = FLAGS.replace("--tokenizer-type NullTokenizer --vocab-size 100", "")
    (problem,) = local(check("--tokenizer-type HFTokenizer --tokenizer-name-or-path /nowhere/t.json", flags=flags))
    assert problem.startswith("--tokenizer-name-or-path /nowhere/t.json does not exist")


def test_all_training_commands_of_a_script_are_checked(tmp_path):
    path = tmp_path / "job.slurm"
    loop = f"for i in 1 2 3; do srun python pretrain_gpt.py {FLAGS} --save {tmp_path}/run$i --seed $i; done\n"
    path.write_text(HEADER + loop, encoding="utf-8")
    found = check_job(read_job(path, environment={}))
    assert texts(found) == [] and dict(found.facts)["Commands"].startswith("3, all checked; the plan is that")
    (tmp_path / "run2").mkdir()
    (tmp_path / "run2" / "completed_iteration.txt").write_text("100\n")
    found = check_job(read_job(path, environment={}))
    assert texts(found) == [] and any("run2 is complete" in warning for warning in found.warnings)
    bad = f"srun python pretrain_gpt.py {FLAGS} --save {tmp_path}/last --tensor-model-parallel-size 3\n"
    path.write_text(HEADER + loop + bad, encoding="utf-8")
    problems = texts(check_job(read_job(path, environment={})))
    assert all(problem.startswith("Training command 4 of ") for problem in problems)
    assert any("--tensor-model-parallel-size 3" in problem for problem in problems)
    path.write_text(HEADER + bad.replace("-size 3", "-size 2") * 2, encoding="utf-8")
    assert "Commands" not in dict(check_job(read_job(path, environment={})).facts), "the same command twice"
