"""Decoding loop: batched generation for prompts of different lengths.

Letters: b prompts, t tokens fed at once, V vocabulary (V' with its padding), tp the group's size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megatron_lite.config.model import ModelConfig
from megatron_lite.errors import ConfigError, TrainingError
from megatron_lite.generation.sampling import Sampling, choose
from megatron_lite.model.batch import MicroBatch
from megatron_lite.model.gpt import GPTStage
from megatron_lite.model.kv_cache import KVCache

OnToken = Callable[[int, int], None]
"""Called with (row, token) as soon as a row's next token is known; the end-of-document token is not told."""


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
    """Continues every prompt, as it would be continued alone.

    All rows move in step from the shortest prompt's end on; a row whose prompt goes on is fed its own next token in
    place of a chosen one. So no row is padded and no position or mask differs from a prompt that runs alone. Each row
    draws from a generator of its own.

    Args:
        stage: the whole model on one pipeline stage; every tp rank calls this alike.
        prompts: ids, at least one each.
        max_new_tokens: tokens added to each prompt at most.
        sampling: how tokens are chosen.
        seeds: one per prompt.
        eod: the token that ends a text, which is left out of the result; None: none does.
        on_token: told every new token at once.

    Returns:
        The new tokens of every prompt.

    Raises:
        ConfigError: a prompt is empty, has an id that the model lacks, or the model has not that many positions.
        TrainingError: the model gives numbers that are not finite.
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
                "The model's logits must be finite",
                found="NaN or infinity after the prompt",
                fix="Take an earlier checkpoint with --load-iteration: this one's weights are broken",
            )
        while fed := rows.take(logits, cache.length, sampling, stage.config.vocab_size):
            logits = _next_logits(stage, fed, cache)
        return rows.new
    finally:
        stage.train(was_training)


class _Rows:
    """What has become of each prompt so far."""

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
        self._going = set(range(len(prompts)))
        self.new: list[list[int]] = [[] for _ in prompts]

    def take(self, logits: Tensor, at: int, sampling: Sampling, vocab_size: int) -> list[list[int]]:
        """Choose the tokens at position `at` from logits [b, V'], and say what to feed there; nothing: all is done."""
        choosing = sorted(row for row in self._going if at >= len(self._prompts[row]))
        chosen = self._choose(logits, choosing, sampling, vocab_size)
        for row, token in chosen.items():
            if token == self._eod:
                self._going.discard(row)
                continue
            self.new[row].append(token)
            if self._on_token is not None:
                self._on_token(row, token)
            if len(self.new[row]) == self._max_new_tokens:
                self._going.discard(row)
        if not self._going:
            return []
        # A row that has ended is fed anything: nothing of it is looked at any more.
        return [[chosen.get(row, prompt[at] if at < len(prompt) else 0)] for row, prompt in enumerate(self._prompts)]

    def _choose(self, logits: Tensor, rows: list[int], sampling: Sampling, vocab_size: int) -> dict[int, int]:
        """Next tokens by row. Only these rows draw, so that a row's draws do not depend on its neighbours' lengths."""
        if not rows:
            return {}
        # Drawn on the CPU: the same seed then chooses the same tokens on any device.
        uniform = torch.cat([torch.rand(1, generator=self._generators[row], dtype=torch.float64) for row in rows])
        picked = logits if len(rows) == len(self._prompts) else logits[rows]
        return dict(zip(rows, choose(picked, sampling, vocab_size, uniform.to(logits.device)).tolist(), strict=True))


def check_prompts(prompts: Sequence[Sequence[int]], max_new_tokens: int, model: ModelConfig) -> None:
    """Refuse prompts that the model cannot continue.

    Raises:
        ConfigError: see generate.
    """
    for number, prompt in enumerate(prompts, 1):
        if not prompt:
            raise ConfigError(
                "A prompt must have at least one token",
                found=f"prompt {number} of {len(prompts)} has none",
                fix="Give it some text; the end-of-document token starts a text from nothing",
            )
        if max(prompt) >= model.vocab_size or min(prompt) < 0:
            raise ConfigError(
                "A prompt's tokens must be in the model's vocabulary",
                found=f"prompt {number} has ids from {min(prompt)} to {max(prompt)}, the model has {model.vocab_size}",
                fix="Use the tokenizer that the model was trained with",
            )
    longest = max(len(prompt) for prompt in prompts)
    if model.position_embedding == "learned" and longest + max_new_tokens > model.max_position_embeddings:
        raise ConfigError(
            "A prompt and its continuation must fit the model's learned positions",
            found=f"{longest} tokens of prompt and --max-new-tokens {max_new_tokens}, "
            f"the model has {model.max_position_embeddings} positions",
            fix=f"Lower --max-new-tokens to {max(0, model.max_position_embeddings - longest)} or shorten the prompt",
        )


@torch.inference_mode()
def _next_logits(stage: GPTStage, fed: list[list[int]], cache: KVCache) -> Tensor:
    """Feeds tokens [b, t]; the logits of what follows, [b, V'] over all tp ranks."""
    tokens = torch.tensor(fed, dtype=torch.int64, device=stage.sharding.backend.device)
    last = stage(None, MicroBatch(tokens=tokens, labels=tokens), cache)[-1]
    tp = stage.sharding.tp
    return last if tp.size == 1 else tp.all_gather(last.t().contiguous()).t()
