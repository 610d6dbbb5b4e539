"""Decoding loop: batched generation for prompts of different lengths.

Letters: b prompts, t tokens per forward pass, V vocabulary (V' with padding).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megatron_lite.config.model import ModelConfig
from megatron_lite.errors import ConfigError, TrainingError
from megatron_lite.generation.sampling import Sampling, choose
from megatron_lite.model.attention import KVCache
from megatron_lite.model.batch import MicroBatch
from megatron_lite.model.gpt import GPTStage

OnToken = Callable[[int, int], None]
"""Called with (row, token) for each new token, except the end-of-document token."""


def generate(
    stage: GPTStage,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    seeds: Sequence[int],
    eod: int | None,
    on_token: OnToken | None = None,
) -> list[list[int]]:
    """Generate a continuation of every prompt, equal to that of the prompt alone.

    All rows advance together from the end of the shortest prompt; a row with a longer prompt takes the next token of
    its prompt instead of a sampled one. Thus no row is padded, and positions and masks equal those of a single prompt.
    Each row has its own random generator.

    Args:
        stage: the whole model as one pipeline stage; every tp rank calls with the same arguments.
        prompts: token ids, at least one per prompt.
        max_new_tokens: maximum number of new tokens per prompt.
        sampling: sampling parameters.
        seeds: seed of each prompt.
        eod: end-of-document token, which ends a row and is not returned; None: rows end at max_new_tokens.
        on_token: called with each new token.

    Returns:
        The new tokens of every prompt.

    Raises:
        ConfigError: a prompt is empty, has an id outside the vocabulary, or exceeds the learned positions.
        TrainingError: the logits are not finite.
    """
    if not prompts or max_new_tokens <= 0:
        return [[] for _ in prompts]
    check_prompts(prompts, max_new_tokens, stage.config)
    rows = _Rows(prompts, seeds, max_new_tokens, eod, on_token)
    shortest = min(len(prompt) for prompt in prompts)
    was_training = stage.training
    stage.eval()
    try:
        cache = stage.new_cache(len(prompts), max(len(prompt) for prompt in prompts) + max_new_tokens)
        fed = [list(prompt[:shortest]) for prompt in prompts]
        logits = _next_logits(stage, fed, cache)
        if not torch.isfinite(logits).all():
            raise TrainingError(
                "The model computed NaN or infinite logits for the prompts: the weights of this checkpoint contain "
                "NaN or "
                "infinity, or overflow",
                fix="Load an earlier checkpoint with --load-iteration",
            )
        while fed := rows.take(logits, cache.length, sampling, stage.config.vocab_size):
            logits = _next_logits(stage, fed, cache)
        return rows.new
    finally:
        stage.train(was_training)


class _Rows:
    """State of the rows: new tokens, random generators, unfinished rows."""

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        max_new_tokens: int,
        eod: int | None,
        on_token: OnToken | None,
    ) -> None:
        assert len(seeds) == len(prompts), (len(seeds), len(prompts))
        self._prompts = prompts
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._max_new_tokens = max_new_tokens
        self._eod = eod
        self._on_token = on_token
        self._unfinished = set(range(len(prompts)))
        self.new: list[list[int]] = [[] for _ in prompts]

    def take(self, logits: Tensor, at: int, sampling: Sampling, vocab_size: int) -> list[list[int]]:
        """Choose the tokens at position `at` from logits [b, V']; return the next inputs [b, 1], [] at the end."""
        choosing = sorted(row for row in self._unfinished if at >= len(self._prompts[row]))
        chosen = self._choose(logits, choosing, sampling, vocab_size)
        for row, token in chosen.items():
            if token == self._eod:
                self._unfinished.discard(row)
                continue
            self.new[row].append(token)
            if self._on_token is not None:
                self._on_token(row, token)
            if len(self.new[row]) == self._max_new_tokens:
                self._unfinished.discard(row)
        if not self._unfinished:
            return []
        # The input of a finished row is arbitrary, since its outputs are ignored.
        return [[chosen.get(row, prompt[at] if at < len(prompt) else 0)] for row, prompt in enumerate(self._prompts)]

    def _choose(self, logits: Tensor, rows: list[int], sampling: Sampling, vocab_size: int) -> dict[int, int]:
        """Return next tokens by row. Only `rows` draw, so the draws of a row do not depend on the length of others."""
        if not rows:
            return {}
        # Random numbers from the CPU: a seed gives the same tokens on any device.
        uniform = torch.cat([torch.rand(1, generator=self._generators[row], dtype=torch.float64) for row in rows])
        picked = logits if len(rows) == len(self._prompts) else logits[rows]
        return dict(zip(rows, choose(picked, sampling, vocab_size, uniform.to(logits.device)).tolist(), strict=True))


def check_prompts(prompts: Sequence[Sequence[int]], max_new_tokens: int, model: ModelConfig) -> None:
    """Check the prompts against vocabulary and positions of the model.

    Raises:
        ConfigError: see generate.
    """
    for number, prompt in enumerate(prompts, 1):
        if not prompt:
            raise ConfigError(
                f"Prompt {number} of {len(prompts)} has no tokens",
                fix="Write text in the prompt",
            )
        if max(prompt) >= model.vocab_size or min(prompt) < 0:
            raise ConfigError(
                f"Prompt {number} has token ids from {min(prompt)} to {max(prompt)}, but the model's vocabulary has "
                f"{model.vocab_size:,} entries",
                fix="Give the tokenizer with which the model was trained (--tokenizer-type, --tokenizer-model)",
            )
    longest = max(len(prompt) for prompt in prompts)
    if model.position_embedding == "learned" and longest + max_new_tokens > model.max_position_embeddings:
        raise ConfigError(
            f"A prompt of {longest} tokens and --max-new-tokens {max_new_tokens} need more than the model's "
            f"{model.max_position_embeddings} learned positions",
            fix=f"Use --max-new-tokens {model.max_position_embeddings - longest} or less, or a shorter prompt"
            if longest < model.max_position_embeddings
            else f"Use a prompt of fewer than {model.max_position_embeddings} tokens",
        )


@torch.inference_mode()
def _next_logits(stage: GPTStage, fed: list[list[int]], cache: KVCache) -> Tensor:
    """Run a forward pass for tokens [b, t]; return the logits of the next token, [b, V'], gathered over tp."""
    tokens = torch.tensor(fed, dtype=torch.int64, device=stage.sharding.backend.device)
    last = stage.logits(None, MicroBatch(tokens=tokens, labels=tokens), cache)[-1]
    tp = stage.sharding.tp
    return last if tp.size == 1 else tp.all_gather(last.t().contiguous()).t()
