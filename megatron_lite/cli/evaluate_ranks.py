"""Coordination of ranks in an evaluation: rank 0 reads and prints, the others wait for it and join forward passes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from megatron_lite.backend.agreement import run_on_all_ranks
from megatron_lite.backend.base import Backend
from megatron_lite.config.layout import AXES, partitions
from megatron_lite.config.parallel import ParallelConfig
from megatron_lite.config.runtime import RuntimeConfig
from megatron_lite.errors import MegatronLiteError
from megatron_lite.evaluation.harness import Generation
from megatron_lite.evaluation.scoring import OnTokens, Score, Scorer, Span
from megatron_lite.generation.generate import generate
from megatron_lite.generation.requests import Context, Request
from megatron_lite.generation.restore import TrainedModel, load_weights, naming_checkpoint, restore_model
from megatron_lite.generation.sampling import Sampling

SEED = 1234
"""Seed of the first prompt; that of the others is counted up."""


class ModelRanks:
    """Model of a run's checkpoints over all ranks of the job.

    Rank 0 calls load, score and generate, each of which runs on all ranks, and finally close. The other ranks call
    serve. All errors of these methods are raised by every rank.

    Args:
        backend: of this rank.
        runtime: device and threads.
        parallel: layout.
        tokenizer: fields of TokenizerConfig that replace the manifest's.
        batch_size: spans or prompts per batch.
        averaged: load the moving averages of the weights.
    """

    def __init__(
        self,
        backend: Backend,
        runtime: RuntimeConfig,
        parallel: ParallelConfig,
        tokenizer: Mapping[str, Any],
        batch_size: int,
        *,
        averaged: bool = False,
    ) -> None:
        self._backend = backend
        self._runtime = runtime
        self._parallel = parallel
        self._tokenizer = tokenizer
        self._batch_size = batch_size
        self._averaged = averaged
        self._world = backend.new_group("world", partitions(AXES, parallel))
        self._model: TrainedModel | None = None

    @property
    def model(self) -> TrainedModel:
        """Return the model of the checkpoint that was loaded last."""
        assert self._model is not None, "load comes first"
        return self._model

    def load(self, checkpoint: Path) -> TrainedModel:
        """Load a checkpoint; the model is built at the first call.

        Raises:
            MegatronLiteError: as restore_model and load_weights.
        """
        self._send("_load", checkpoint)
        self._load(checkpoint)
        return self.model

    def score(self, spans: Sequence[Span], on_tokens: OnTokens | None = None) -> list[Score]:
        """Score spans; see Scorer.score."""
        self._send("_score", spans)
        return self._score(spans, on_tokens)

    def generate(self, prompts: Sequence[Sequence[int]], generation: Generation) -> list[str]:
        """Continue prompts; replicas continue different ones.

        Raises:
            ConfigError: a prompt and its continuation exceed the context.
            TrainingError: the logits are not finite.
        """
        self._send("_generate", prompts, generation)
        return self._generate(prompts, generation)

    def serve(self) -> None:
        """Run the calls of rank 0 until it closes."""
        while (call := self._world.all_gather_object(None)[0]) is not None:
            name, arguments = call
            with suppress(MegatronLiteError):  # rank 0 raises it too, and decides whether the job ends
                getattr(self, name)(*arguments)

    def close(self) -> None:
        """End the other ranks."""
        self._world.all_gather_object(None)

    def _send(self, name: str, *arguments: Any) -> None:
        self._world.all_gather_object((name, arguments))

    def _load(self, checkpoint: Path) -> None:
        if self._model is not None:
            self._model = load_weights(self._model, checkpoint)
            return
        self._model = restore_model(
            str(checkpoint),
            0,
            self._runtime,
            parallel=self._parallel,
            backend=self._backend,
            tokenizer=self._tokenizer,
            averaged=self._averaged,
        )

    def _score(self, spans: Sequence[Span], on_tokens: OnTokens | None = None) -> list[Score]:
        with naming_checkpoint(self.model.path):
            return Scorer(self.model.stage, self.model.mesh, self._batch_size).score(spans, on_tokens)

    def _generate(self, prompts: Sequence[Sequence[int]], generation: Generation) -> list[str]:
        # A failure of one replica is raised on all: the others do not wait for its texts.
        own = run_on_all_ranks(self._world, lambda: self._generate_own(prompts, generation))
        texts = {number: text for part in self._world.all_gather_object(own) for number, text in part.items()}
        return [texts[number] for number in range(len(prompts))]

    def _generate_own(self, prompts: Sequence[Sequence[int]], generation: Generation) -> dict[int, str]:
        """Return the continuations of this replica's prompts, by the prompts' numbers."""
        model, dp, stop = self.model, self.model.mesh.dp, generation.stop
        numbers = sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))[dp.rank :: dp.size]
        sampling = Sampling(temperature=generation.temperature, top_k=generation.top_k, top_p=generation.top_p)
        requests = [
            Request(
                prompt=prompts[number],
                max_new_tokens=generation.max_new_tokens,
                sampling=sampling,
                seed=SEED + number,
            )
            for number in numbers
        ]
        new: list[list[int]] = [[] for _ in requests]

        def ends(request: int, token: int) -> bool:
            new[request].append(token)
            return any(term in model.tokenizer.decode(new[request]) for term in stop)

        texts = generate(
            model.stage,
            requests,
            context=Context(generation.seq_length),
            eod=model.tokenizer.eod,
            pp=model.mesh.pp,
            batch_size=self._batch_size,
            on_token=ends,
        )
        with naming_checkpoint(model.path):
            return {numbers[index]: _before(model.tokenizer.decode(text.tokens), stop) for index, text in texts}


def _before(text: str, stop: Sequence[str]) -> str:
    """Return the text before the first stop string."""
    return text[: min((place for term in stop if (place := text.find(term)) >= 0), default=len(text))]
