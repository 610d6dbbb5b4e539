"""Command lines as job scripts write them: what is read is what the trainer would get, with the launcher's ranks."""

import shlex

import pytest
from support.job_commands import FAMOUS, SMALL

from megatron_lite.config.arguments import parse_command, parse_run
from megatron_lite.config.launcher import ranks_per_task, read_command
from megatron_lite.errors import ConfigError

# (what stands before the flags, with {} for the flags where they stand inside; the ranks that it says)
SHAPES = [
    ("", None),
    ("pretrain_gpt.py", None),
    ("./pretrain_gpt.py", None),
    ("python pretrain_gpt.py", None),
    ("$ python3 -u Megatron-LM/pretrain_gpt.py", None),
    ("torchrun --nproc-per-node 8 pretrain_gpt.py", 8),
    ("torchrun --nproc_per_node=8 --nnodes=2 --rdzv-id 1 --rdzv-backend=c10d ${dir}/../pretrain_gpt.py", 16),
    ("/opt/bin/torchrun --nnodes 2 --nproc-per-node 4 --node_rank $SLURM_PROCID /a/b/train_gpt.py", 8),
    ("torchrun --nproc_per_node=8 --no_python python pretrain_gpt.py", 8),
    ("torchrun pretrain_gpt.py", 1),
    ("python -u -m torch.distributed.launch --nproc_per_node 4 --nnodes 16 --master_port 6000 pretrain_gpt.py", 64),
    ("python -m torch.distributed.run --nproc_per_node 4 --tee 3 --max_restarts 0 `pwd`/pretrain_gpt.py", 4),
    ("python -m torch.distributed.run --nproc_per_node 2 -m pretrain_gpt", 2),
    ("deepspeed --num_gpus 4 pretrain_gpt.py", 4),
    ("deepspeed --num_nodes 2 --num_gpus 8 --hostfile hosts ../../pretrain_gpt.py", 16),
    ("deepspeed --hostfile=hosts --num_gpus 8 pretrain_gpt2.py", None),
    ("deepspeed --include localhost:0,1,2 pretrain_gpt.py", 3),
    ("deepspeed --include a:0,1@b:0 pretrain_gpt.py", 3),
    ("deepspeed --include a@b:0 pretrain_gpt.py", None),
    ("deepspeed --bind_cores_to_rank --num_nodes 1 --num_gpus 1 pretrain_gpt.py", 1),
    ("accelerate launch --num_processes 8 --num_machines 2 --mixed_precision bf16 pretrain_gpt.py", 8),
    ("mpirun -np 8 -H a:4,b:4 -x PATH python pretrain_gpt.py", 8),
    ("mpiexec -n 4 python -u pretrain_gpt.py", 4),
    ("srun python pretrain_gpt.py", None),
    ("srun -n 16 --label python pretrain_gpt.py", 16),
    ("srun --ntasks=16 python pretrain_gpt.py", 16),
    ("srun -N2 --ntasks-per-node=8 --gpus-per-task 1 python pretrain_gpt.py", 16),
    ("srun -N2 --ntasks-per-node=1 --gpus-per-node=a100:4 python pretrain_gpt.py", 8),
    ("srun -N 2 -n 2 --gres=gpu:4 python pretrain_gpt.py", 8),
    ("srun -n 1 --gpus-per-task 4 python pretrain_gpt.py", 4),
    ("srun -n 4 --gpus-per-node 4 python pretrain_gpt.py", 4),
    ("srun -N2 --ntasks-per-node=1 --gres=gpu:4 torchrun --nnodes 2 --nproc-per-node 4 pretrain_gpt.py", 8),
    ("srun --jobid 7 -N 2 torchrun --nnodes 2 --nproc-per-node 4 pretrain_gpt.py", 8),
    ("srun --mpi=pmix singularity run -B /a:/b:rw x.sif torchrun --nnodes 2 --nproc-per-node=8 pretrain_gpt.py", 16),
    ("CUDA_VISIBLE_DEVICES=0,1 OMP_NUM_THREADS=4 torchrun --nproc-per-node 2 pretrain_gpt.py", 2),
    ("env NCCL_DEBUG=INFO nohup time numactl --cpunodebind 0 python pretrain_gpt.py", None),
    ("nsys profile -w true -t cuda,nvtx -o out torchrun --nproc_per_node 4 pretrain_gpt.py", 4),
    ("bind.sh --cpu=ccx.sh python -u pretrain_gpt.py", None),
    ("python launch.py --nproc_per_node 8 --log_dir logs pretrain_gpt.py", None),
    ("megatron-lite train", None),
]  # fmt: skip
QUOTED = [
    ("torchrun --nproc-per-node 8 pretrain_gpt.py {} 2>&1 | tee log.txt", 8),
    ("$ torchrun --nproc-per-node 8 pretrain_gpt.py {} > log.txt 2> errors.txt &", 8),
    ("nohup torchrun --nproc-per-node 8 pretrain_gpt.py {} &>> log/run.log", 8),
    ("cd /code/Megatron-LM; python -u pretrain_gpt.py {}", None),
    ("cd /code && torchrun --nproc-per-node 4 pretrain_gpt.py {} && python tools/plot.py --input log.txt", 4),
    ("python tools/preprocess_data.py --input x.json && torchrun --nproc-per-node 4 pretrain_gpt.py {}", 4),
    ("export OMP_NUM_THREADS=1\ntorchrun --nproc-per-node 4 \\\n  pretrain_gpt.py \\\n  {} \\\n", 4),
    ("torchrun --nproc-per-node 4 pretrain_gpt.py\n  {}\n", 4),
]
NESTED = [
    ("bash -c {}", None),
    ("srun -n 2 --jobid $SLURM_JOBID bash -lc {} 2>&1 | tee -a main_log.txt", None),
    ("ssh node1 {}", None),
]


def check(argv, flags, world):
    command = read_command(argv)
    assert list(command.flags) == flags
    assert command.world_size == world


@pytest.mark.parametrize("name", FAMOUS)
@pytest.mark.parametrize(("shape", "world"), SHAPES)
def test_arguments_before_the_script_are_dropped(shape, world, name):
    flags = FAMOUS[name][0]
    check([*shape.split(), *flags], flags, world)
    check([f"{shape} {shlex.join(flags)}".strip()], flags, world)


@pytest.mark.parametrize("name", FAMOUS)
@pytest.mark.parametrize(("shape", "world"), QUOTED)
def test_a_command_in_quotes_or_in_a_file(shape, world, name, tmp_path):
    flags = FAMOUS[name][0]
    text = shape.format(shlex.join(flags))
    check([text], flags, world)
    file = tmp_path / "command.sh"
    file.write_text(f"#!/bin/bash\n# starts the run\n{text}\n", encoding="utf-8")
    check([f"@{file}"], flags, world)


@pytest.mark.parametrize(("shape", "_"), NESTED)
def test_nested_commands(shape, _):
    flags = FAMOUS["multilingual"][0]
    inner = f"torchrun --nproc_per_node 4 --nnodes 2 --node_rank \\$SLURM_PROCID pretrain_gpt.py {shlex.join(flags)}"
    command = shape.format(shlex.quote(inner))
    check([command], flags, 8)
    check(shlex.split(command), flags, 8)


def test_spaces_and_signs_within_values_are_kept():
    flags = [*SMALL, "--split", "969, 30, 1", "--pp-partition-method", "type:transformer|embedding", "--save", "a;b"]
    check(["python", "pretrain_gpt.py", *flags], flags, None)
    check([shlex.join(["python", "pretrain_gpt.py", *flags])], flags, None)


def test_world_size_flag_overrides_the_launcher():
    launch = ["torchrun", "--nproc-per-node", "8", "pretrain_gpt.py", *SMALL]
    assert parse_command(launch).config.parallel.world_size == 8
    assert parse_command([*launch, "--world_size=4"]).config.parallel.world_size == 4
    assert parse_command(["python", "pretrain_gpt.py", *SMALL]).config == parse_run(SMALL).config


@pytest.mark.parametrize("inner", ["cd /tmp && exec python", "cd /tmp; python", "export A=1\npython", "python"])
def test_a_launcher_before_several_commands_counts(inner):
    check(["srun", "--ntasks=4", "bash", "-lc", shlex.quote(f"{inner} pretrain_gpt.py --bf16")[1:-1]], ["--bf16"], 4)
    check([f"srun -n 4 bash -c '{inner} pretrain_gpt.py --bf16' 2>&1 | tee log"], ["--bf16"], 4)


def test_an_argument_file_may_hold_flags_only(tmp_path):
    (tmp_path / "flags.txt").write_text("--num-layers 4  # few\n--bf16")
    check([f"@{tmp_path / 'flags.txt'}", "--lr", "1"], ["--num-layers", "4", "--bf16", "--lr", "1"], None)
    check(["--lr", "1", "@no-such-file"], ["--lr", "1", "@no-such-file"], None)


ERRORS = {
    "torchrun --nproc_per_node 8 pretrain_gpt.py $GPT_ARGS --save ${OUT}/a ${DATA_ARGS[@]}": (
        "which are not expanded here: $GPT_ARGS, ${OUT}, ${DATA_ARGS[@]}. Write their values instead"
    ),
    "python pretrain_gpt.py --save `pwd`/x": "which are not expanded here: `pwd`/x",
    "python pretrain_gpt.py --seed $(date)": "which are not expanded here: $(date)",
    "srun bash -c '$LAUNCHER --node_rank 0 $CMD'": "write the value of $LAUNCHER and $CMD",
    "deepspeed --num_gpus 8 train --num-layers 4": "does not begin with a flag. Give the flags alone",
    "train --num-layers 4": "names no Python script",
    "torchrun --nproc_per_node $GPUS pretrain_gpt.py --bf16": "--nproc-per-node $GPUS. Write a number",
    "torchrun --nnodes=1:4 --nproc_per_node=8 pretrain_gpt.py --bf16": "--nnodes 1:4. Write a number",
    "torchrun --nproc-per-node gpu pretrain_gpt.py --bf16": "--nproc-per-node gpu starts a rank for each GPU of a node",
    "python pretrain_gpt.py --save 'x": "is not closed in line 1, python pretrain_gpt.py --save 'x. Close",
}


@pytest.mark.parametrize("command", ERRORS)
def test_unreadable_commands(command):
    with pytest.raises(ConfigError) as caught:
        read_command([command])
    assert ERRORS[command] in str(caught.value)


def test_empty_command_line():
    check([], [], None)


@pytest.mark.parametrize(
    ("flags", "tasks_per_node", "num_gpus", "ranks"),
    [
        ("", 1, 8, 8),
        ("--device cuda", 1, 4, 4),
        ("", 8, 8, 1),
        ("", 1, 0, 1),
        ("--device cpu", 1, 8, 1),
        ("", 0, 8, 1),
        ("--ranks-per-task 2", 1, 8, 2),
        ("--ranks-per-task 2 --device cpu", 4, 0, 2),
        ("--ranks-per-task=3", 0, 0, 3),
        ("--ranks-per-task 1", 1, 8, 1),
    ],
)
def test_ranks_that_a_task_starts(flags, tasks_per_node, num_gpus, ranks):
    """The only task of a node starts a rank for each GPU, unless a flag gives their number; 0 tasks: not under srun."""
    assert ranks_per_task(flags.split(), tasks_per_node=tasks_per_node, num_gpus=num_gpus) == ranks
