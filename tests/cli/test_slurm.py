"""Tests of `megatron-lite slurm submit`: what it prints, when it calls sbatch, and when it refuses to."""

import json
import os
from pathlib import Path

import pytest

from megatron_lite.cli.main import main
from megatron_lite.ops.watch_job import run_comment

JOB = """#!/bin/bash
#SBATCH --nodes=2 --ntasks-per-node=2 --gpus-per-node=2 --time=1:00:00 --signal=USR1@300
srun python pretrain_gpt.py --num-layers 4 --hidden-size 32 --num-attention-heads 4 --seq-length 32 \\
    --max-position-embeddings 32 --micro-batch-size 1 --global-batch-size ${1:-4} --train-iters 100 --lr 1e-3 \\
    --tokenizer-type NullTokenizer --vocab-size 100 --save run --save-interval 20 --mock-data \\
    --tensor-model-parallel-size 2
"""


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Install a program that takes the place of one of Slurm's."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")

    def install(name, text):
        path = tmp_path / "bin" / name
        path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
        path.chmod(0o755)

    return install


@pytest.fixture
def script(tmp_path, monkeypatch, program):
    """Write the job script; Slurm's controller does not answer."""
    monkeypatch.chdir(tmp_path)
    program("sinfo", "exit 1")
    (tmp_path / "job.slurm").write_text(JOB, encoding="utf-8")
    return "job.slurm"


# The comment holds a folder of the test; it is recorded in a file of its own.
_RECORD = """
line=
for word; do case "$word" in --comment=*) echo "$word" > "{folder}/comment" ;; *) line="$line $word" ;; esac; done
echo "${{line# }}" >> "{folder}/calls"
echo 7
echo "error: refused" >&2
exit {code}
"""


@pytest.fixture
def sbatch(script, tmp_path, program):
    """Install an sbatch that records its arguments, on a cluster with two partitions."""
    partitions = "echo 'short*|up|4:00:00|16'; echo 'long|up|infinite|2'; echo 'old|drain|infinite|64'"
    program("sinfo", f'case "$*" in *-N*) echo gpu001 gpu002 gpu003 gpu017 ;; *) {partitions} ;; esac')

    def install(code=0):
        program("sbatch", _RECORD.format(folder=tmp_path, code=code))

    return install


def test_a_dry_run_prints_the_plan_and_submits_nothing(script, sbatch, capfd, tmp_path):
    sbatch()
    assert main(["slurm", "submit", "--dry-run", script]) == 0
    out = capfd.readouterr().out
    assert "Ranks       4 = tensor 2 x pipeline 1 x data 2\n" in out and len(out.splitlines()) < 15
    assert "Time limit  01:00:00, saves and stops after 00:55:00; " in out
    assert out.rstrip().endswith("Not submitted (--dry-run): no problem was found")
    assert not (tmp_path / "calls").exists()
    assert main(["slurm", "submit", "--dry-run", "--verbose", script]) == 0
    assert "The same command, as parsed:" in capfd.readouterr().out


def test_a_job_is_submitted_with_its_options_and_arguments(script, sbatch, capfd, tmp_path):
    sbatch()
    assert main(["slurm", "submit", "--sbatch=--nodes=4 --time=2:00:00", script, "8"]) == 0
    assert "Submitted batch job 7" in capfd.readouterr().out
    assert (tmp_path / "calls").read_text(encoding="utf-8") == "--parsable --nodes=4 --time=2:00:00 job.slurm 8\n"
    assert (tmp_path / "comment").read_text(encoding="utf-8") == f"--comment={run_comment(tmp_path / 'run')}\n"
    (tmp_path / "comment").unlink()
    assert main(["slurm", "submit", "--sbatch=--comment=mine", script, "8"]) == 0
    assert (tmp_path / "comment").read_text(encoding="utf-8") == "--comment=mine\n"
    (tmp_path / "comment").unlink()
    text = Path(script).read_text(encoding="utf-8") + "echo $SLURM_ARRAY_TASK_ID\n"
    Path(script).write_text(text, encoding="utf-8")
    assert main(["slurm", "submit", "--sbatch=--array=0-2", script, "8"]) == 0
    assert not (tmp_path / "comment").exists(), "its tasks train different runs"
    sbatch(code=3)
    assert main(["slurm", "submit", script]) == 1
    assert "sbatch failed: refused" in capfd.readouterr().err


def test_a_job_that_cannot_work_is_refused_with_all_reasons(script, sbatch, capfd, tmp_path):
    sbatch()
    assert main(["slurm", "submit", "--sbatch=--gpus-per-node=1 --partition=fast", script, "4x"]) == 1
    printed = capfd.readouterr()
    assert "The command starts 4 ranks, but the job has 2 GPUs" in printed.err and "--global-batch-size" in printed.err
    assert "The cluster has no partition fast (--partition fast). Give one of long, old, short" in printed.err
    assert not (tmp_path / "calls").exists()


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ("--time=5:00:00", "--time 5:00:00 is above the limit of partition short, 04:00:00"),
        ("--partition=long --nodes=4", "The job requests 4 nodes, and partition long has 2"),
        ("--partition=old", "--partition old is down or inactive (sinfo -p old)"),
    ],
)
def test_a_job_that_its_partition_cannot_run_is_refused(script, sbatch, capfd, options, problem):
    sbatch()
    assert main(["slurm", "submit", f"--sbatch={options}", script, "8"]) == 1
    assert problem in capfd.readouterr().err


def test_missing_files_are_errors_on_the_cluster_only(script, program, capfd, tmp_path):
    text = JOB.replace("--mock-data", "--data-path data/text_document")
    (tmp_path / script).write_text(text, encoding="utf-8")
    assert main(["slurm", "submit", "--dry-run", script]) == 0
    out = capfd.readouterr().out
    assert 'Not here    The dataset "data/text_document" (--data-path) does not exist' in out
    assert "Slurm does not answer here; on the cluster each line `Not here` is an error" in out
    assert main(["slurm", "submit", script]) == 1
    assert "does not exist" in capfd.readouterr().err
    program("sinfo", "echo 'short*|up|4:00:00|16'")
    assert main(["slurm", "submit", "--dry-run", script]) == 1
    assert "does not exist" in capfd.readouterr().err


def test_site_settings_of_the_script_are_passed_to_sbatch(script, sbatch, tmp_path, capfd):
    sbatch()
    (tmp_path / "env.sh").write_text("export SBATCH_ACCOUNT=abc@gpu SBATCH_PARTITION=long\n", encoding="utf-8")
    (tmp_path / script).write_text(JOB.replace("srun", "source env.sh\nsrun"), encoding="utf-8")
    assert main(["slurm", "submit", script]) == 0
    assert "2 nodes x 2 GPUs = 4 GPUs, partition long, account abc@gpu" in capfd.readouterr().out
    assert main(["slurm", "submit", "--sbatch=--partition=short", script]) == 0
    first, second = (tmp_path / "calls").read_text(encoding="utf-8").splitlines()
    assert first == "--parsable --account=abc@gpu --partition=long job.slurm"
    assert second == "--parsable --account=abc@gpu --partition=long --partition=short job.slurm", "the last one counts"


def test_excluded_hosts_of_the_run_are_passed_to_sbatch(script, sbatch, tmp_path):
    sbatch()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "excluded_nodes.txt").write_text("gpu017\n", encoding="utf-8")
    assert main(["slurm", "submit", script]) == 0
    assert main(["slurm", "submit", "--sbatch=--exclude=gpu001", script]) == 0
    first, second = (tmp_path / "calls").read_text(encoding="utf-8").splitlines()
    assert first == "--parsable --exclude=gpu017 job.slurm"
    assert second == "--parsable --exclude=gpu001,gpu017 job.slurm"


def test_an_exclude_file_that_leaves_too_few_nodes_is_named(script, program, tmp_path, capfd):
    program("sinfo", 'case "$*" in *-N*) echo gpu001 gpu017 ;; *) echo "short*|up|4:00:00|2" ;; esac')
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "excluded_nodes.txt").write_text("gpu017\ngpu999\n", encoding="utf-8")
    assert main(["slurm", "submit", "--dry-run", script]) == 1
    text = capfd.readouterr().err
    assert "requests 2 nodes, and run/excluded_nodes.txt leaves 1 of 2 in partition short (excluded: gpu017)" in (
        text.replace(f"{tmp_path}/", "")
    )
    assert "doctor --forgive gpu017 --save" in text and "or give --nodes=1" in text


def test_a_job_of_another_command_is_submitted_with_the_checks_that_apply(script, sbatch, tmp_path, capfd):
    sbatch()
    text = "#!/bin/bash\n#SBATCH --array=3-9:2%2\nmegatron-lite preprocess --input part-$SLURM_ARRAY_TASK_ID.jsonl\n"
    (tmp_path / script).write_text(text, encoding="utf-8")
    assert main(["slurm", "submit", script]) == 1
    assert "--input part-3.jsonl does not exist" in capfd.readouterr().err
    (tmp_path / "part-3.jsonl").touch()
    assert main(["slurm", "submit", script]) == 0
    out = capfd.readouterr().out
    assert "Job         job.slurm: 1 node, 4 array tasks (checked as task 3)\n" in out
    assert "Runs        megatron-lite preprocess --input part-3.jsonl" in out
    assert main(["slurm", "submit", "--sbatch=--partition=fast", script]) == 1
    assert "The cluster has no partition fast" in capfd.readouterr().err
    assert main(["slurm", "submit", "--chain", script]) == 1
    assert "starts no training command. Submit it without --chain" in capfd.readouterr().err


def test_a_script_that_ends_with_an_error_is_refused(script, sbatch, tmp_path, capfd):
    sbatch()
    text = "#!/bin/bash\nshopt -s nullglob\nfiles=(*.jsonl)\n[ ${#files[@]} -gt 0 ] || { echo no files >&2; exit 2; }\n"
    (tmp_path / script).write_text(f"{text}megatron-lite preprocess --input *.jsonl\n", encoding="utf-8")
    assert main(["slurm", "submit", script]) == 1
    assert (
        'job.slurm ends itself with status 2 in line 4 with the message "no files". Give the argument'
        in capfd.readouterr().err
    )


def test_options_with_an_open_quote(script, capfd):
    assert main(["slurm", "submit", "--sbatch=--comment='x", script]) == 1
    assert "Cannot split --sbatch=--comment='x into options: no closing quotation" in capfd.readouterr().err


def test_a_chain_needs_a_folder(script, sbatch, tmp_path, capfd):
    sbatch()
    (tmp_path / script).write_text(JOB.replace("--save run --save-interval 20", ""), encoding="utf-8")
    assert main(["slurm", "submit", "--chain", script]) == 1
    assert "has no --save. Add --save FOLDER --load FOLDER" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("more", "options", "problem"),
    [
        ("", [], "The command has --save run and no --load: the second job of a chain could not resume"),
        ("--load base", [], "The command has --load base and --save run: each job of a chain would begin from --load"),
        ("--load ./run --finetune", [], "--finetune is given: each job of a chain would begin at the same iteration"),
        ("--load run", ["--sbatch=--array=1-3%1"], "job.slurm is a job array (--array), which cannot be chained"),
    ],
)
def test_a_chain_that_could_not_resume_is_refused_in_a_dry_run_too(script, capfd, tmp_path, more, options, problem):
    (tmp_path / script).write_text(JOB.replace("--save run", f"--save run {more}"), encoding="utf-8")
    for dry_run in (["--dry-run"], []):
        assert main(["slurm", "submit", *dry_run, "--chain", *options, script]) == 1
        assert problem in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_chain_of_several_runs_is_refused(script, tmp_path, capfd):
    line = JOB[JOB.index("srun") :].replace("--save run", "--save run --load run")
    (tmp_path / script).write_text(JOB[: JOB.index("srun")] + line + line.replace(" run", " other"), encoding="utf-8")
    assert main(["slurm", "submit", "--dry-run", "--chain", script]) == 1
    assert "The script trains several runs (--save run, other), and a chain continues one" in capfd.readouterr().err


def test_a_script_that_chooses_what_to_load_can_be_chained(script, tmp_path, capfd):
    choice = "[ -f run/latest_checkpointed_iteration.txt ] && L=run || L=base\nsrun"
    text = JOB.replace("srun", choice).replace("--save run", "--save run --load $L")
    (tmp_path / script).write_text(text, encoding="utf-8")
    assert main(["slurm", "submit", "--dry-run", "--chain", script]) == 0


def test_jobs_beside_an_active_chain_are_refused_in_a_dry_run_too(chain, script, sbatch, tmp_path, capfd):
    sbatch()
    (tmp_path / script).write_text(JOB.replace("--save run", "--save run --load run"), encoding="utf-8")
    for options in (["--dry-run", "--chain"], ["--chain"], ["--dry-run"], []):
        assert main(["slurm", "submit", *options, script]) == 1
        assert f"megatron-lite slurm stop {tmp_path / 'run'}" in capfd.readouterr().err
    assert not (tmp_path / "calls").exists()


def test_without_slurm_it_says_where_to_submit(script, capfd, monkeypatch):
    from megatron_lite.ops import slurm

    which = slurm.shutil.which
    monkeypatch.setattr(
        slurm.shutil, "which", lambda name, path=None: None if name == "sbatch" else which(name, path=path)
    )
    assert main(["slurm", "submit", script]) == 1
    assert "sbatch is not installed here" in capfd.readouterr().err


@pytest.fixture
def chain(tmp_path, monkeypatch):
    """A chain with two ended jobs; the queue of its jobs is set by the test."""
    from megatron_lite.ops import slurm
    from megatron_lite.ops.chain_script import write_scripts
    from megatron_lite.ops.chain_state import Chain, Outcome, Start, write_chain

    folder = tmp_path / "run"
    folder.mkdir()
    script = tmp_path / "job.slurm"
    script.write_text(JOB, encoding="utf-8")
    write_scripts(folder, script, [])
    outcomes = (
        Outcome("41", "time_limit", "exiting program after 60.0 minutes", 1200, "", "2026-11-26T20:00:00+00:00"),
        Outcome("41, restart 1", "error", "CUDA error on rank 3", 1200, "n7", "2026-11-26T21:00:00+00:00"),
    )
    chain = Chain(str(script), job=Start("42"), successor="43", outcomes=outcomes, excluded=("n7",))
    write_chain(folder, chain)
    queue = [
        slurm.QueuedJob("42", "RUNNING", "None", 1795734658.0, 1795738258.0, "n[1-2]"),
        slurm.QueuedJob("43", "PENDING", "Dependency"),
    ]
    monkeypatch.setattr(slurm, "queued_jobs", lambda jobs: [job for job in queue if job.job in jobs])
    return queue


def test_status_shows_ended_running_and_waiting_jobs(chain, capsys, tmp_path):
    assert main(["slurm", "status", str(tmp_path / "run")]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[:2] == [f"Chain of {tmp_path / 'run'}: active", "Excluded after failures: n7"]
    text = "\n".join(lines)
    assert "job state time saved host message" in text and "1,200" in text and "n[1-2]" in text
    assert "pending" in text and "no start estimate" in text and "running" in text

    chain[:] = [chain[1].__class__("43", "PENDING", "JobHeldUser", 1795734658.0)]
    (tmp_path / "job.slurm").write_text("#!/bin/bash\n", encoding="utf-8")
    assert main(["slurm", "status", str(tmp_path / "run")]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "has changed since the chain began; its jobs run the copy" in text
    assert "starts about" in text and "scontrol release 43" in text


def test_status_as_json(chain, capsys, tmp_path):
    assert main(["slurm", "status", "--json", str(tmp_path / "run")]) == 0
    status = json.loads(capsys.readouterr().out)
    assert (status["state"], status["failures"], status["script_changed"]) == ("active", 1, False)
    assert [job["job"] for job in status["queue"]] == ["42", "43"] and status["outcomes"][1]["host"] == "n7"


def test_a_chain_without_a_job_in_the_queue_is_interrupted(chain, capsys, tmp_path, monkeypatch):
    from megatron_lite.ops import slurm

    chain.clear()
    monkeypatch.setattr(slurm, "final_state", lambda job: None)
    assert main(["slurm", "status", str(tmp_path / "run")]) == 0
    assert "interrupted: none of its jobs is in the queue" in capsys.readouterr().out


def test_status_says_that_no_job_follows(chain, capsys, tmp_path):
    waiting = chain.pop()
    assert main(["slurm", "status", str(tmp_path / "run")]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "active; no job follows job 42: job 43, which waited for its end, is not in the queue" in text
    chain.append(waiting)
    assert main(["slurm", "status", str(tmp_path / "run")]) == 0
    assert "no job follows" not in capsys.readouterr().out


def test_the_commands_for_jobs_are_not_offered_to_users(capsys):
    with pytest.raises(SystemExit):
        main(["slurm", "--help"])
    assert "{submit,status,stop}" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["slurm", "halt"])
    assert "(choose from 'submit', 'status', 'stop')" in capsys.readouterr().err.replace(
        "choose from submit, status, stop", "choose from 'submit', 'status', 'stop'"
    )


def test_a_run_without_a_chain_names_watch_and_scancel(tmp_path, capsys):
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("7\n", encoding="utf-8")
    for command in ("status", "stop"):
        assert main(["slurm", command, str(tmp_path)]) == 1
        text = capsys.readouterr().err
        assert "its jobs were submitted without --chain" in text
        assert f"`megatron-lite watch {tmp_path}`, end a job with `scancel JOB`" in text


def test_status_without_slurm_shows_the_ended_jobs(chain, capsys, tmp_path, monkeypatch):
    from megatron_lite.errors import ConfigError
    from megatron_lite.ops import slurm

    def refuse(jobs):
        raise ConfigError("squeue is not installed here", fix="")

    monkeypatch.setattr(slurm, "queued_jobs", refuse)
    assert main(["slurm", "status", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert (
        "active; last started: job 42; next: job 43" in out and "The queue is unknown: squeue is not installed" in out
    )
    assert "CUDA error" in out


def test_the_commands_of_a_job_are_refused_outside_of_one(chain, capsys, tmp_path):
    assert main(["slurm", "begin", str(tmp_path / "run")]) == 1
    assert "SLURM_JOB_ID is not set: this is not a Slurm job" in capsys.readouterr().err


def test_the_next_job_inherits_no_variables_of_this_one(chain, tmp_path, monkeypatch):
    from megatron_lite.ops import chain as module
    from megatron_lite.ops.chain_state import Start, read_chain

    seen = []

    def begin_job(folder, start):
        seen.append((start, sorted(name for name in os.environ if name.startswith("SLURM_"))))
        return read_chain(folder), ""

    monkeypatch.setattr(module, "begin_job", begin_job)
    for name, value in (("JOB_ID", "42"), ("RESTART_COUNT", "1"), ("NTASKS", "8"), ("CONF", "slurm.conf")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert main(["slurm", "begin", str(tmp_path / "run")]) == 0
    assert seen == [(Start("42", 1), ["SLURM_CONF"])]
