"""Virtual flags: command-line options without a config field of their own, and the fields computed from them."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_lite.config.flag import Flag, Format, option

GROUPS_FILE = "File that holds the groups of --{}-weighted-split-paths: one line, each group in double quotes."


@dataclass(frozen=True, kw_only=True)
class CommandOptions:
    """Options whose meaning depends on other options, on a file, or on the caller."""

    preset: str = option(
        "",
        Flag(
            "--preset",
            "Shape of a published model: stands for the flags that `megatron-lite explain --preset NAME` prints; "
            "flags given beside it override them.",
            metavar="NAME",
            group="Model",
        ),
    )
    group_query_attention: bool = option(
        False,
        Flag(
            "--group-query-attention",
            "Grouped-query attention; one group if --num-query-groups is not given.",
            sets=True,
            group="Model",
        ),
    )
    erf_gelu: bool = option(
        False,
        Flag(
            "--no-bias-gelu-fusion",
            "Exact GELU instead of the tanh approximation, which Megatron's fused kernel computes.",
            sets=True,
            group="Model",
        ),
    )
    no_position_embedding: bool = option(
        False,
        Flag(
            "--no-position-embedding",
            "No learned position table: no effect with rotary or ALiBi positions, else no positions at all.",
            sets=True,
            group="Model",
        ),
    )
    accumulation_steps: int = option(
        0,
        Flag(
            "--gas",
            "Gradient accumulation steps, as Megatron 1.1 with DeepSpeed: the global batch is micro-batch x steps "
            "x data-parallel size.",
            aliases=("--gradient-accumulation-steps",),
            group="Batch",
            least=1,
        ),
    )
    step_batch_size_schedule: str = option(
        "",
        Flag(
            "--step-batch-size-schedule",
            'Global batch by consumed tokens, as "0:16 2.4B:320 4.8B:624".',
            format=Format(metavar="TOKENS:BATCH …", example="0:16 2.4B:320 4.8B:624", read=" ".join),
            group="Batch",
        ),
    )
    virtual_stages: int = option(
        0,
        Flag(
            "--num-virtual-stages-per-pipeline-rank",
            "Model chunks of a rank, instead of --num-layers-per-virtual-pipeline-stage.",
            least=1,
            most=10_000,
            group="Parallelism",
        ),
    )
    deepspeed: bool = option(
        False,
        Flag(
            "--deepspeed",
            "Read flags as DeepSpeed does, and its JSON. ZeRO stages 2 and 3 and offloading run by DeepSpeed, stages 0 "
            "and 1 by the native engine (--engine).",
            sets=True,
            group="DeepSpeed",
        ),
    )
    deepspeed_config: str = option(
        "",
        Flag(
            "--deepspeed-config",
            "DeepSpeed's JSON: source of precision, loss scale, clipping, ZeRO stage and curriculum.",
            metavar="FILE",
            group="DeepSpeed",
        ),
    )
    zero_stage: int | None = option(
        None,
        Flag(
            "--zero-stage",
            "1 is --use-distributed-optimizer, 0 is without; 2 and 3 need --deepspeed.",
            group="DeepSpeed",
            most=3,
        ),
    )
    data_args_path: str = option(
        "", Flag("--data-args-path", "File that holds the arguments of --data-path.", metavar="FILE", group="Data")
    )
    train_groups_path: str = option(
        "", Flag("--train-weighted-split-paths-path", GROUPS_FILE.format("train"), metavar="FILE", group="Data")
    )
    valid_groups_path: str = option(
        "", Flag("--valid-weighted-split-paths-path", GROUPS_FILE.format("valid"), metavar="FILE", group="Data")
    )
    test_groups_path: str = option(
        "", Flag("--test-weighted-split-paths-path", GROUPS_FILE.format("test"), metavar="FILE", group="Data")
    )
    save_interval: int = option(
        0,
        Flag(
            "--save-interval",
            "Iterations between checkpoints; after the last range of --save-schedule, if both are given.",
            aliases=("--persistent-save-interval",),
            least=1,
            group="Checkpoints",
        ),
    )
    ranks_per_task: int = option(
        0,
        Flag(
            "--ranks-per-task",
            "Ranks that each task of srun or mpirun starts itself (0: if srun starts one task a node, one for each "
            "visible GPU, else one); on a single machine it replaces the launcher.",
            most=4096,
            group="Parallelism",
        ),
    )
