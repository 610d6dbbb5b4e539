"""Tests of batch scripts: resources from #SBATCH lines, the training command of constructions in public job scripts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_lite.errors import ConfigError
from megatron_lite.ops.job import read_job
from megatron_lite.ops.resources import parse_time, read_resources

SHAPE = "--num-layers 4 --hidden-size 32 --num-attention-heads 4 --seq-length 32 --max-position-embeddings 32"

NESTED_LAUNCHER = """#!/bin/bash
#SBATCH --nodes=16
#SBATCH --ntasks-per-node=1          # one launcher for each node
#SBATCH --gres=gpu:4                 # number of gpus
#SBATCH --time 20:00:00
set -x -e
source $WORK/start-prod
cd $WORK/code
ADDRESS=`perl -le '$_=$ENV{"SLURM_JOB_NODELIST"}; s/,.*//; print'`
TESTING=1
if [[ ${TESTING} == 1 ]]; then
    DATA=$WORK/small_text_document
else
    DATA=$WORK/large_text_document

fi
if   [[ ${ROUND:-2} == 1 ]]; then ITERATIONS=100    INTERVAL=10
elif [[ ${ROUND:-2} == 2 ]]; then ITERATIONS=1000   INTERVAL=18
else echo "invalid"
fi
TP=4
SHAPE=" \\
    --num-layers 4 --hidden-size 32 --num-attention-heads 4 \\
    --seq-length 32 --max-position-embeddings 32 \\
    "
ARGS=" \\
    --micro-batch-size 2 --train-iters $ITERATIONS --save-interval $INTERVAL \\
    --pp-partition-method 'type:transformer|embedding' \\
    $SHAPE \\
    "
config_json="./ds_config.$SLURM_JOBID.json"
cat <<EOT > $config_json
{
  "train_micro_batch_size_per_gpu": 2,
  "zero_optimization": {
    "stage": $((TP / 4))
  }
}
EOT
export LAUNCHER="python -u -m torch.distributed.launch \\
    --nproc_per_node 4 \\
    --nnodes $SLURM_NNODES \\
    --master_addr $ADDRESS \\
    "
export CMD=" \\
    `pwd`/pretrain_gpt.py \\
    --tensor-model-parallel-size $TP \\
    $ARGS \\
    --data-path $DATA \\
    --deepspeed_config ${config_json} \\
    "
echo $CMD
clear; LINE
"""


def read(tmp_path, text, *arguments, options=(), **environment):
    path = tmp_path / "job.slurm"
    path.write_text(text, encoding="utf-8")
    return read_job(path, environment=environment, options=options, arguments=arguments)


@pytest.mark.parametrize(
    "line",
    [
        "srun --jobid $SLURM_JOBID bash -c '$LAUNCHER --node_rank $SLURM_PROCID $CMD' 2>&1 | tee log.$SLURM_JOBID",
        'srun --wait=60 bash -c "$LAUNCHER --node_rank \\$SLURM_PROCID $CMD" 2>&1 | tee -a log',
        "srun $LAUNCHER --node_rank 0 $CMD > log 2>&1 &\nwait",
    ],
)
def test_nested_launchers_are_understood(tmp_path, line):
    job = read(tmp_path, NESTED_LAUNCHER.replace("LINE", line), WORK="/work")
    flags = " ".join(job.command.flags)
    assert flags.startswith("--tensor-model-parallel-size 4 --micro-batch-size 2 --train-iters 1000 --save-interval 18")
    assert "--pp-partition-method type:transformer|embedding --num-layers 4" in flags or "'type:" in flags
    assert flags.endswith("--data-path /work/small_text_document --deepspeed_config ./ds_config.SLURM_JOBID.json")
    assert '"stage": 1' in job.evaluation.files["/work/code/ds_config.SLURM_JOBID.json"]
    assert (job.world_size, job.num_gpus, job.num_nodes, str(job.folder)) == (64, 64, 16, "/work/code")
    assert job.resources.time_limit == 20 * 3600


def test_one_task_for_each_gpu_and_arguments_in_an_array(tmp_path):
    text = f"""#!/bin/bash
#SBATCH -N 2 --ntasks-per-node=8 --gpus-per-node=a100:8
#SBATCH -t 1-12 -J gpt -p long,short
#SBATCH --signal=B:USR1@600
TP=$1
ARGS=(
    --tensor-model-parallel-size "$TP"   # within a node
    {SHAPE}
    --micro-batch-size 1
)
ARGS+=(--train-iters 10)
srun --kill-on-bad-exit=1 python pretrain_gpt.py "${{ARGS[@]}}" --save "$SAVE/$SLURM_JOB_NAME"
"""
    job = read(tmp_path, text, "8", options=["--nodes=4"], SAVE="/runs")
    assert job.command.flags[:2] == ("--tensor-model-parallel-size", "8")
    assert job.command.flags[-4:] == ("--train-iters", "10", "--save", "/runs/gpt")
    assert (job.world_size, job.num_gpus, job.resources.time_limit) == (32, 32, 36 * 3600)
    assert job.resources.signal == ("USR1", 600) and job.resources.options["partition"] == "long,short"


def test_components_of_a_heterogeneous_job_add_up():
    text = "#!/bin/bash\n#SBATCH --nodes=1 --gpus-per-node=8\n#SBATCH hetjob\n#SBATCH --nodes=2 --gpus-per-node=4\n"
    first, second = read_resources(text)
    assert (first.nodes, first.gpus_per_node, second.nodes, second.gpus_per_node) == (1, 8, 2, 4)


@pytest.mark.parametrize(
    ("lines", "nodes", "tasks", "gpus"),
    [
        ("", 1, 1, None),
        ("#SBATCH --ntasks=16 --ntasks-per-node=8 --gpus-per-task=1", 2, 8, 8),
        ("#SBATCH --nodes=2-4 --gpus=8", 2, 1, 4),
        ("#SBATCH --nodes 2 --gres=gpu:v100:4,nvme:1 --ntasks-per-gpu=1", 2, 4, 4),
        ("#SBATCH --gres gpu --exclusive", 1, 1, 1),
        ("#SBATCH --gpus-per-node=0 --ntasks-per-node=2", 1, 2, None),
        ("# comment\n\n#SBATCH --nodes=3\necho\n#SBATCH --nodes=5", 3, 1, None),
    ],
)
def test_resources(lines, nodes, tasks, gpus):
    (resources,) = read_resources(f"#!/bin/bash\n{lines}\n")
    assert (resources.nodes, resources.tasks_per_node, resources.gpus_per_node) == (nodes, tasks, gpus)


@given(st.integers(0, 30), st.integers(0, 23), st.integers(0, 59), st.integers(0, 59))
def test_times_as_slurm_writes_them(days, hours, minutes, seconds):
    total = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    assert parse_time(f"{days}-{hours}:{minutes}:{seconds}") == total
    assert parse_time(f"{hours}:{minutes}:{seconds}") == total - days * 86400
    assert parse_time(f"{days}-{hours}") == (days * 24 + hours) * 3600
    assert parse_time(f"{minutes}:{seconds}") == minutes * 60 + seconds
    assert parse_time(f"{minutes}") == minutes * 60


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("echo hello\nmodule load x\nsbatch next.slurm", "starts no training command: it starts sbatch"),
        ("", "starts no training command: it starts no program"),
        ("source ./absent\n$LAUNCH", "absent, which the script sources, does not exist"),
        (
            "N=$(python count.py)\nsrun python pretrain_gpt.py --num-layers $N",
            r"depend on the output of programs \(--num-layers: python count.py\)",
        ),
        ("#SBATCH --nodes=many\nsrun python pretrain_gpt.py --fp16", "--nodes many is no positive number"),
        ("#SBATCH --time=soon\nsrun python pretrain_gpt.py --fp16", "--time soon is no time limit"),
        ("srun python pretrain_gpt.py '--fp16", "is no valid bash script"),
    ],
)
def test_scripts_that_cannot_work(tmp_path, text, match):
    with pytest.raises(ConfigError, match=match):
        assert read(tmp_path, text).resources.time_limit


def test_a_script_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match="Cannot read the job script"):
        read_job(tmp_path / "absent.slurm", environment={})


@pytest.mark.parametrize(
    ("options", "launcher", "flags", "ranks"),
    [
        ("--nodes=2 --ntasks-per-node=1 --gres=gpu:4", "srun", "", 8),
        ("--nodes=2 --ntasks-per-node=1 --gres=gpu:4", "srun -N2 --ntasks-per-node=1", "", 8),
        ("--nodes=2 --ntasks-per-node=1 --gres=gpu:4", "srun -n 1", "", 4),
        ("--nodes=2 --ntasks-per-node=1", "srun -N2 --ntasks-per-node=1 --gpus-per-node=4", "", 8),
        ("--nodes=2 --ntasks-per-node=4 --gres=gpu:4", "srun", "", 8),
        ("--nodes=2 --ntasks-per-node=1 --gres=gpu:4", "srun", "--device cpu", 2),
        ("--nodes=2 --ntasks-per-node=1", "srun", "--ranks-per-task 3", 6),
        ("--nodes=1 --ntasks-per-node=1 --gres=gpu:4", "", "", 1),
        ("--nodes=1 --ntasks-per-node=1 --gres=gpu:4", "", "--ranks-per-task 4", 4),
        ("--nodes=2 --ntasks-per-node=1 --gres=gpu:4", "torchrun --nnodes 2 --nproc-per-node 4", "", 8),
    ],
)
def test_ranks_that_a_task_starts_are_counted(options, launcher, flags, ranks, tmp_path):
    """One task a node under srun starts a rank for each GPU; without srun a process is one rank."""
    path = tmp_path / "job.slurm"
    program = "pretrain_gpt.py" if "torchrun" in launcher else "python pretrain_gpt.py"
    path.write_text(f"#!/bin/bash\n#SBATCH {options}\n{launcher} {program} {SHAPE} {flags}\n", encoding="utf-8")
    assert read_job(path, environment={}).world_size == ranks
