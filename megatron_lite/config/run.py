"""RunConfig: the complete frozen configuration of a run, one section per subject."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_lite.config.batch import BatchConfig
from megatron_lite.config.checkpoint import CheckpointConfig
from megatron_lite.config.command import CommandOptions
from megatron_lite.config.data import DataConfig
from megatron_lite.config.deepspeed import DeepSpeedConfig
from megatron_lite.config.fp8 import Fp8Config
from megatron_lite.config.learning_rate import LrConfig
from megatron_lite.config.metrics import MetricsConfig
from megatron_lite.config.model import ModelConfig
from megatron_lite.config.optimizer import OptimizerConfig, PrecisionConfig, RecomputeConfig
from megatron_lite.config.parallel import ParallelConfig
from megatron_lite.config.profiling import ProfileConfig
from megatron_lite.config.runtime import RuntimeConfig
from megatron_lite.config.tokenizer import TokenizerConfig
from megatron_lite.config.training import TrainingConfig
from megatron_lite.config.tuning import TuningConfig


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that is set before a run starts. Nothing in it changes during the run."""

    model: ModelConfig
    batch: BatchConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    tuning: TuningConfig = field(default_factory=TuningConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    lr: LrConfig = field(default_factory=LrConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    fp8: Fp8Config = field(default_factory=Fp8Config)
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)

    @property
    def per_token_loss(self) -> bool:
        """True if the loss is averaged over unmasked tokens, not over samples: answers have different lengths."""
        return self.training.per_token_loss or self.tuning.answer_loss

    @property
    def epoch_samples(self) -> int:
        """Samples of one of --epochs; 0: there are none, or they were not counted yet (data/serving/epochs.py)."""
        return self.training.train_samples // self.tuning.epochs if self.tuning.epochs else 0

    @property
    def awaits_epochs(self) -> bool:
        """True if the length is that of --epochs, and the data are not open yet: all iteration numbers are 0."""
        return bool(self.tuning.epochs) and not self.epoch_samples

    @property
    def stops_at_nan(self) -> bool:
        """True if a loss or gradient that is not finite ends the run; fp16 lowers the loss scale instead."""
        return self.optimizer.check_for_nan and self.precision.dtype != "fp16"


@dataclass(frozen=True, kw_only=True)
class CommandLine(RunConfig):
    """A RunConfig with the command-line options from which some of its fields are derived."""

    command: CommandOptions = field(default_factory=CommandOptions)
