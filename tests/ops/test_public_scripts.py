"""Tests of constructions of public job scripts (BigScience tr1, tr11, others): command, variables, world size."""

import json
from itertools import pairwise

import pytest

from megatron_lite.ops.job import read_job
from megatron_lite.ops.submission import check_job

SHAPE = "--num-layers 8 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --max-position-embeddings 32"
TOKENIZER = "--tokenizer-type NullTokenizer --vocab-size 99"
BASIC = f"{SHAPE} --micro-batch-size 1 --train-iters 10 --lr 1e-3 --mock-data {TOKENIZER}"

ONE_LAUNCHER_PER_NODE = r"""#!/bin/bash
#SBATCH --job-name=gpt-test
#SBATCH --constraint=v100-32g
#SBATCH --nodes=64
#SBATCH --ntasks-per-node=1          # one launcher
#SBATCH --cpus-per-task=40
#SBATCH --hint=nomultithread
#SBATCH --gres=gpu:4
#SBATCH --time 20:00:00
#SBATCH --output=%x-%j.out
#SBATCH --account=abc@v100

source $PROJECT_WORK/code/start-environment

set -x -e

echo "START TIME: $(date)"

DATA_OUTPUT_PATH=$PROJECT_SCRATCH/checkpoints/test
CHECKPOINT_PATH=$DATA_OUTPUT_PATH/checkpoints
LOGS_PATH=$DATA_OUTPUT_PATH/logs
REPOSITORY=$PROJECT_WORK/code/Megatron/
VOCAB_FILE=$REPOSITORY/data/vocab.json
mkdir -p $LOGS_PATH
cd $REPOSITORY

MASTER_ADDR=$(scontrol show hostnames $SLURM_JOB_NODELIST | head -n 1)
MASTER_PORT=6000

GPUS_PER_NODE=4
NNODES=64    # switch to 128
TP_SIZE=4    # size of a node
PP_SIZE=8
#DP_SIZE=$NNODES*$GPUS_PER_NODE/($PP_SIZE*$TP_SIZE)
DP_SIZE="$NNODES*GPUS_PER_NODE/(PP_SIZE*TP_SIZE)"

MICRO_BATCH_SIZE=1
GLOBAL_BATCH_SIZE=$((MICRO_BATCH_SIZE * 16 * DP_SIZE))
NHIDDEN=$((1024*4)); FFN_HIDDEN_SIZE=$(($NHIDDEN * 4))

if   [[ ${ROUND} == 1 ]]; then TRAIN_ITER=100    SAVE_INTERVAL=10
elif [[ ${ROUND} == 2 ]]; then TRAIN_ITER=1000   SAVE_INTERVAL=18
elif [[ ${ROUND} == 3 ]]; then TRAIN_ITER=300000 SAVE_INTERVAL=1500
else echo "invalid ROUND: $ROUND"
fi

if [[ ${EXIT_EARLY} == 1 ]]; then EXIT_OPTS="--exit-interval 2"
else EXIT_OPTS=""
fi

OPTIMIZER_ARGS=" \
    --optimizer adam \
    --adam-eps 1e-8 \
    --lr 1e-4 \
    --lr-warmup-samples 216_320 \
    --clip-grad 1.0 \
    "

GPT_ARGS=" \
    --num-layers 40 \
    --hidden-size $NHIDDEN \
    --ffn_hidden_size $FFN_HIDDEN_SIZE \
    --num-attention-heads 32 \
    --seq-length 2048 \
    --max-position-embeddings 2048 \
    --micro-batch-size $MICRO_BATCH_SIZE \
    --rampup-batch-size 16 16 5_000_000 \
    --global-batch-size $GLOBAL_BATCH_SIZE \
    --train-samples 300_000_000 \
    --vocab-file $VOCAB_FILE \
    --fp16 \
    --checkpoint-activations \
    --seed 42
    $OPTIMIZER_ARGS \
    $EXIT_OPTS \
    "

SAVE_INTERVAL
OUTPUT_ARGS=" \
    --log-interval 10 \
    --save-interval $SAVE_INTERVAL \
    "

ZERO_STAGE=1

config_json="./ds_config.$SLURM_JOBID.json"

cat <<EOT > $config_json
{
  "train_micro_batch_size_per_gpu": $MICRO_BATCH_SIZE,
  "train_batch_size": $GLOBAL_BATCH_SIZE,
  "zero_optimization": {
    "stage": $ZERO_STAGE
  },
  "fp16": {
    "enabled": true,
    "loss_scale": 0
  }
}
EOT

DEEPSPEED_ARGS=" \
    --deepspeed \
    --deepspeed_config ${config_json} \
    --zero-stage ${ZERO_STAGE} \
    "

export LAUNCHER="python -u -m torch.distributed.launch \
    --nproc_per_node $GPUS_PER_NODE \
    --nnodes $NNODES \
    --master_addr $MASTER_ADDR \
    --master_port $MASTER_PORT \
    "

#    /usr/bin/env PYTHONPATH="." `pwd`/pretrain_gpt.py \
export CMD=" \
    `pwd`/pretrain_gpt.py \
    --tensor-model-parallel-size $TP_SIZE \
    --pipeline-model-parallel-size $PP_SIZE \
    $GPT_ARGS \
    $OUTPUT_ARGS \
    --save $CHECKPOINT_PATH \
    --load $CHECKPOINT_PATH \
     $DEEPSPEED_ARGS \
    "

# if   [[ ${MYENV} == me ]];    then
#     rm -rf $PROJECT_SCRATCH/checkpoints/*
# fi

echo $CMD

# to debug - add echo (it exits and prints what it would have launched)
LINE
#2>&1 | tee -a $LOGS_PATH/main_log.txt

echo "END TIME: $(date)"

#
"""

LINES = (
    "clear; srun --jobid $SLURM_JOBID bash -c '$LAUNCHER --node_rank $SLURM_PROCID $CMD' 2>&1 | tee log.$SLURM_JOBID",
    'clear; srun --jobid $SLURM_JOB_ID bash -c "$LAUNCHER --node_rank \\$SLURM_PROCID $CMD" 2>&1 | tee -a $LOGS_PATH/x',
    "srun --jobid $SLURM_JOBID bash -c '$LAUNCHER --node_rank $SLURM_PROCID $CMD'",
    'SRUN_ARGS=" \\\n    --wait=60 \\\n    --kill-on-bad-exit=1 \\\n    "\n'
    'srun $SRUN_ARGS bash -c "$LAUNCHER --node_rank \\$SLURM_PROCID $CMD" 2>&1 | tee -a log &\nwait',
)


@pytest.fixture
def read(tmp_path):
    def read(text, *arguments, options=(), **environment):
        path = tmp_path / "job.slurm"
        path.write_text(text, encoding="utf-8")
        return read_job(path, environment=environment, options=options, arguments=arguments)

    return read


def values(job):
    """Return the flags of a job with their first value."""
    flags = [*job.command.flags, "--end"]
    return {
        flag: "" if following.startswith("--") else following
        for flag, following in pairwise(flags)
        if flag.startswith("--")
    }


@pytest.mark.parametrize("line", LINES)
def test_one_launcher_per_node_with_nested_arguments(read, line):
    # In the text of bash -c "…" the line end after --seed 42 would end the command, in bash as well.
    text = ONE_LAUNCHER_PER_NODE.replace("LINE", line).replace(
        "--seed 42\n", "--seed 42\n" if "'" in line else "--seed 42 "
    )
    job = read(text, PROJECT_WORK="/work", PROJECT_SCRATCH="/scratch", ROUND="2")
    given = values(job)
    assert (job.world_size, job.num_gpus, job.num_nodes) == (256, 256, 64)
    assert given["--hidden-size"] == "4096" and given["--ffn_hidden_size"] == "16384"
    assert given["--save-interval"] == "18" and given["--global-batch-size"] == "128", "16 x 64 * 4 / (8 * 4)"
    assert given["--seed"] == "42" and given["--lr"] == "1e-4", "a line end within quotes separates arguments"
    assert given["--save"] == given["--load"] == "/scratch/checkpoints/test/checkpoints"
    assert given["--vocab-file"] == "/work/code/Megatron//data/vocab.json" and "--exit-interval" not in given
    config = json.loads(job.evaluation.files["/work/code/Megatron/ds_config.SLURM_JOBID.json"])
    assert config["train_batch_size"] == 128 and config["zero_optimization"] == {"stage": 1}
    assert list(job.evaluation.missing_sources) == ["/work/code/start-environment"]
    assert values(read(text, ROUND="3", EXIT_EARLY="1"))["--exit-interval"] == "2"


def test_flags_after_a_line_end_are_reported(read):
    text = ONE_LAUNCHER_PER_NODE.replace("LINE", LINES[1])
    job = read(text, ROUND="1")
    assert "--lr" not in values(job)
    (warning,) = [warning for warning in check_job(job).warnings if "--optimizer" in warning]
    assert "the flag --optimizer is taken for a program, since a line end before it ends the command" in warning


BUILT_INPUTS = f"""#!/bin/bash
#SBATCH --nodes=48
#SBATCH --ntasks-per-node=1
#SBATCH --gres=gpu:8
#SBATCH --time=100:00:00
set -e
variant=main
REPO=$PWD/repo
mkdir -p $REPO/logs/$variant
TRAIN_DATA_PATH=$PWD/train-splits.txt
LOAD_RATIOS_SCRIPT=load_ratios.py
python $LOAD_RATIOS_SCRIPT --dataset-ratios-path ratios.json --split train --output-file $TRAIN_DATA_PATH
# srun --jobid $SLURM_JOB_ID bash -c 'python -c "import torch, socket; print(socket.gethostname())"'
MASTER_ADDR=$(scontrol show hostnames $SLURM_JOB_NODELIST | head -n 1)
MASTER_PORT=6000
GPUS_PER_NODE=8
NNODES=$SLURM_NNODES
EXIT_OPTS=" \\
    --exit-duration-in-mins 5990 \\
    "
GPT_ARGS=" \\
    --pp-partition-method 'type:transformer|embedding' \\
    {SHAPE} \\
    --micro-batch-size 2 --rampup-batch-size 192 16 9_765_625 --global-batch-size 2048 --train-samples 220_000_000 \\
    --lr 6e-5 {TOKENIZER} \\
    $EXIT_OPTS \\
    "
export LAUNCHER="python -u -m torch.distributed.run \\
    --nproc_per_node $GPUS_PER_NODE \\
    --nnodes $NNODES \\
    --rdzv_endpoint $MASTER_ADDR:$MASTER_PORT \\
    --rdzv_backend c10d \\
    --max_restarts 0 \\
    --tee 3 \\
    "
export CMD=" \\
    `pwd`/pretrain_gpt.py \\
    --tensor-model-parallel-size 4 \\
    --pipeline-model-parallel-size 2 \\
    $GPT_ARGS \\
    --train-weighted-split-paths-path $TRAIN_DATA_PATH \\
    --bf16 \\
    "
export CUDA_LAUNCH_BLOCKING=1
clear; srun --wait=60 --jobid $SLURM_JOB_ID bash -c "$LAUNCHER --node_rank \\$SLURM_PROCID $CMD" 2>&1 | tee -a log.txt
echo "END TIME: $(date)"
"""


def test_inputs_that_an_earlier_program_of_the_script_writes(read, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    job = read(BUILT_INPUTS)
    assert (job.world_size, job.num_gpus, job.resources.time_limit) == (384, 384, 360_000)
    assert values(job)["--pp-partition-method"] == "type:transformer|embedding"
    found = check_job(job)
    assert not found.problems and not found.local_problems
    assert any("`python load_ratios.py` may write it before training" in warning for warning in found.warnings)
    without = "\n".join(line for line in BUILT_INPUTS.splitlines() if "--output-file" not in line)
    assert any("train-splits.txt" in str(error) for error in check_job(read(without)).local_problems)


SMALLER = {
    "conditions on the world size": (
        """#SBATCH --nodes=4 --gpus-per-node=8 --ntasks-per-node=8
WORLD=$((SLURM_NNODES * 8))
if [ $WORLD -ge 32 ]; then TP=4; elif [ "$WORLD" -ge 16 ]; then TP=2; else TP=1; fi
srun python pretrain_gpt.py BASIC --tensor-model-parallel-size $TP""",
        {"--tensor-model-parallel-size": "4"},
        32,
    ),
    "one model of several for each array task": (
        """#SBATCH --array=1-2 --nodes=2 --gres=gpu:4 --ntasks-per-node=1
NAMES=(125m 350m 760m)
declare -A LRS=([125m]=6e-4 [350m]=3e-4 [760m]=2.5e-4)
NAME=${NAMES[$SLURM_ARRAY_TASK_ID]}
case $NAME in 125m) HEADS=4 ;; 350m|760m) HEADS=8 ;; esac
srun torchrun --nproc_per_node=4 --nnodes=$SLURM_JOB_NUM_NODES --rdzv_id=$SLURM_ARRAY_JOB_ID pretrain_gpt.py \\
    BASIC --num-attention-heads $HEADS --lr ${LRS[$NAME]} --save out/$NAME --save-interval 5""",
        {"--num-attention-heads": "8", "--lr": "3e-4", "--save": "out/350m"},
        8,
    ),
    "addresses computed from hosts": (
        """#SBATCH --nodes=2 --gpus-per-node=4 --ntasks-per-node=1
hosts=(`scontrol show hostnames $SLURM_JOB_NODELIST`)
export MASTER_ADDR=${hosts[0]}
export MASTER_PORT=$(expr 10000 + $(echo -n $SLURM_JOBID | tail -c 4))
ip=$(srun --nodes=1 --ntasks=1 -w "$MASTER_ADDR" hostname --ip-address | sed 's/ .*//')
short=$(hostname -s | cut -d. -f1)
sed -i "s/HOST/$short/" template.conf
srun torchrun --nnodes 2 --nproc_per_node 4 --rdzv_endpoint $ip:$MASTER_PORT pretrain_gpt.py BASIC --seed 7""",
        {"--seed": "7"},
        8,
    ),
    "a hostfile and deepspeed": (
        """#SBATCH --nodes=3 --gres=gpu:2
for node in $(scontrol show hostnames); do echo "$node slots=2" >> hostfile; done
export DLTS_HOSTFILE=$PWD/hostfile
deepspeed --hostfile hostfile --num_nodes $SLURM_NNODES --num_gpus 2 pretrain_gpt.py BASIC --seed 8""",
        {"--seed": "8"},
        6,
    ),
    "a function, exported arguments and a here-document": (
        """#SBATCH --nodes=2 --ntasks-per-node=2
launch() { local name=$1; shift; srun --label "$@" > "$name.log" 2>&1; }
read -r -d '' EXTRA <<'EOF'
--seed 9
EOF
export ARGS="BASIC $EXTRA"
launch first python -u pretrain_gpt.py $ARGS --num-workers ${WORKERS:-2}""",
        {"--seed": "9", "--num-workers": "2"},
        4,
    ),
    "a script of the job's own that is run by each task": (
        """#SBATCH --nodes=2 --ntasks-per-node=4
cat > run.sh <<EOF
#!/bin/bash
export RANK=\\$SLURM_PROCID
exec python pretrain_gpt.py BASIC --seed 11 "\\$@"
EOF
chmod +x run.sh
srun bash run.sh --num-workers 3""",
        {"--seed": "11", "--num-workers": "3"},
        8,
    ),
    "options of srun and a container": (
        """#SBATCH --nodes=8 --gpus-per-node=8
srun -N 2 --ntasks-per-node=8 singularity exec --nv image.sif python pretrain_gpt.py BASIC --seed 12""",
        {"--seed": "12"},
        16,
    ),
}


@pytest.mark.parametrize("name", SMALLER)
def test_constructions_of_job_scripts(read, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text, expected, world_size = SMALLER[name]
    job = read(f"#!/bin/bash\n{text.replace('BASIC', BASIC)}\n")
    assert {flag: value for flag, value in values(job).items() if flag in expected} == expected
    assert job.world_size == world_size
    assert not check_job(job).problems
