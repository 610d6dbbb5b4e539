"""Command-line options that are not config fields themselves; config/resolve.py derives fields from them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class CommandOptions:
    """Options whose meaning depends on other options, on a file, or on who calls."""

    preset: str = ""
    """--preset: flags of a published model's shape; see presets.py."""
    zero_stage: int | None = None
    """--zero-stage: 1 is the distributed optimizer, 0 is not, 2 and 3 are refused."""
    deepspeed: bool = False
    deepspeed_config: str = ""
    accumulation_steps: int = 0
    """--gas: micro-batches of one replica in an iteration; 0: by the global batch."""
    step_batch_size_schedule: str = ""
    """As written: its thresholds are tokens, which need the sequence length."""
    save_interval: int = 0
    group_query_attention: bool = False
    erf_gelu: bool = False
    """--no-bias-gelu-fusion: Megatron's fused GELU is the tanh approximation, the unfused one is exact."""
    no_position_embedding: bool = False
    virtual_stages: int = 0
    """--num-virtual-stages-per-pipeline-rank."""
    per_token_loss: bool = False
    data_args_path: str = ""
    train_groups_path: str = ""
    valid_groups_path: str = ""
    test_groups_path: str = ""
