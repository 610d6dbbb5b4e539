"""Tests of partitions from recorded sinfo output; the errors of a job are in tests/cli/test_slurm.py."""

from megatron_lite.ops import partition as module
from megatron_lite.ops.job import read_job
from megatron_lite.ops.partition import Partition, parse_partitions, partition_problems, read_partitions

SINFO = """gpu_p13*|up|20:00:00|246
gpu_p13*|up|20:00:00|15
gpu_p5|up|4-04:00:00|52
prepost|down|infinite|4
odd|up|n/a|1
"""


def test_partitions_of_sinfo():
    assert parse_partitions(SINFO) == {
        "gpu_p13": Partition(261, 72_000, is_default=True, is_up=True),
        "gpu_p5": Partition(52, 360_000, is_default=False, is_up=True),
        "prepost": Partition(4, None, is_default=False, is_up=False),
        "odd": Partition(1, None, is_default=False, is_up=True),
    }


def test_the_widest_of_several_partitions_counts(tmp_path):
    path = tmp_path / "job.slurm"
    path.write_text(
        "#!/bin/bash\n#SBATCH --partition=gpu_p13,gpu_p5 --time=50:00:00 --nodes=100\n"
        "srun python pretrain_gpt.py --fp16\n",
        encoding="utf-8",
    )
    partitions = parse_partitions(SINFO)
    assert list(partition_problems(read_job(path, environment={}), partitions)) == []
    (problem,) = partition_problems(read_job(path, environment={}, options=["--partition=gpu_p13"]), partitions)
    assert "--time 50:00:00 is above the limit of partition gpu_p13, 20:00:00" in problem.problem
    (problem,) = partition_problems(read_job(path, environment={}, options=["--time=1000:00:00"]), partitions)
    assert problem.fix.startswith("Give --time=4-04:00:00 or less")


def test_a_job_without_a_partition(tmp_path):
    path = tmp_path / "job.slurm"
    path.write_text("#!/bin/bash\nsrun python pretrain_gpt.py --fp16\n", encoding="utf-8")
    job = read_job(path, environment={})
    assert list(partition_problems(job, parse_partitions(SINFO))) == []
    (problem,) = partition_problems(job, {"a": Partition(1, None, is_default=False, is_up=True)})
    assert str(problem).startswith("The job names no partition, and the cluster has no default partition. Give")


def test_without_an_answer_there_are_no_partitions(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert read_partitions() is None
    program = tmp_path / "sinfo"
    program.write_text("#!/bin/sh\nexit 1\n", encoding="utf-8")
    program.chmod(0o755)
    assert read_partitions() is None
    program.write_text("#!/bin/sh\nwhile :; do :; done\n", encoding="utf-8")
    monkeypatch.setattr(module, "TIMEOUT", 0.05)
    assert read_partitions() is None
