"""Run progress dataclass: iteration, consumed samples and consumed tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields


@dataclass(frozen=True)
class Progress:
    """Counts since the start of the run; `iteration` is the number of finished iterations.

    An iteration is *applied* if its optimizer step took place. An iteration skipped for an fp16 overflow or by
    --skip-train-iteration-range consumes its samples without being applied. The learning rate depends on applied
    progress only, as in Megatron-LM.
    """

    iteration: int = 0
    consumed_train_samples: int = 0
    consumed_valid_samples: int = 0
    consumed_train_tokens: int = 0
    skipped_iterations: int = 0
    applied_iterations: int = 0
    applied_samples: int = 0
    applied_tokens: int = 0
    validation_due: int = 0
    """1: the job stopped before the validation after this iteration was finished; the next job starts with it."""

    def advance(self, samples: int, tokens: int, applied: bool) -> Progress:
        """Return the progress after another iteration of `samples` samples with `tokens` tokens in total."""
        return Progress(
            iteration=self.iteration + 1,
            consumed_train_samples=self.consumed_train_samples + samples,
            consumed_valid_samples=self.consumed_valid_samples,
            consumed_train_tokens=self.consumed_train_tokens + tokens,
            skipped_iterations=self.skipped_iterations + (not applied),
            applied_iterations=self.applied_iterations + applied,
            applied_samples=self.applied_samples + samples * applied,
            applied_tokens=self.applied_tokens + tokens * applied,
        )

    def to_dict(self) -> dict[str, int]:
        """Return the counts by name, as stored in checkpoints."""
        return asdict(self)

    @classmethod
    def from_dict(cls, counts: Mapping[str, int]) -> Progress:
        """Return the progress of to_dict's result; other names are ignored.

        Megatron's checkpoints hold no applied counts. All iterations but the skipped ones are taken as applied.
        """
        known = {field.name: int(counts[field.name]) for field in fields(cls) if field.name in counts}
        known.setdefault("applied_iterations", known.get("iteration", 0) - known.get("skipped_iterations", 0))
        known.setdefault("applied_samples", known.get("consumed_train_samples", 0))
        known.setdefault("applied_tokens", known.get("consumed_train_tokens", 0))
        return cls(**known)
