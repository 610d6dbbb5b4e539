"""Model card of an export: architecture, data, schedule, loss curve, evaluation, command line."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_lite.config.arguments import to_argv
from megatron_lite.config.counts import parameter_count
from megatron_lite.config.data import DataConfig, DataSource
from megatron_lite.config.model import ModelConfig
from megatron_lite.config.record import from_record
from megatron_lite.config.run import RunConfig
from megatron_lite.config.sharing import describe_sharing
from megatron_lite.data.format.indexed_dataset import IndexedDataset
from megatron_lite.errors import DataError, MegatronLiteError
from megatron_lite.formatting import format_parameters
from megatron_lite.interop.verify import Verification
from megatron_lite.metrics.curve import read_curve
from megatron_lite.metrics.curve_svg import draw_svg
from megatron_lite.runs.evaluations import Evaluation
from megatron_lite.runs.manifest import Manifest
from megatron_lite.system_errors import reason, remedy

CARD = "README.md"
PICTURE = "loss.svg"


@dataclass(frozen=True)
class CardFacts:
    """Contents of a model card.

    Attributes:
        name: title of the model.
        architecture: class of transformers.
        model: the model.
        manifest: the checkpoint's.
        metrics: the run's metrics.jsonl; it need not exist.
        evaluations: results of `megatron-lite evaluate` on the checkpoint.
        seq_length: tokens of a sequence.
        dtype: of the weights.
    """

    name: str
    architecture: str
    model: ModelConfig
    manifest: Manifest
    metrics: Path
    evaluations: Sequence[Evaluation]
    seq_length: int
    dtype: str


def write_card(folder: Path, facts: CardFacts, verification: Verification | None) -> None:
    """Write README.md, and loss.svg if the run's losses are known.

    Raises:
        OSError: no room, no permission.
    """
    picture = _curve(facts)
    if picture:
        (folder / PICTURE).write_text(picture, encoding="utf-8")
    lines = [*_front_matter(), *_body(folder, facts, verification, has_curve=bool(picture))]
    (folder / CARD).write_text("\n".join(lines) + "\n", encoding="utf-8")


def read_evaluation(path: Path) -> list[Evaluation]:
    """Return the results that `megatron-lite evaluate --json` printed for one checkpoint.

    Raises:
        DataError: the file holds something else.
    """
    try:
        return [_evaluation_of(record) for record in json.loads(path.read_text(encoding="utf-8"))["results"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"Cannot read --evaluation {path}: {reason(error)}"
            if isinstance(error, OSError)
            else f"--evaluation {path} is not the output of `megatron-lite evaluate --json`",
            fix=remedy(error, path, instead="give another file")
            if isinstance(error, OSError)
            else "Write that output to a file (megatron-lite evaluate … --json > evaluation.json), and give the file",
        ) from error


def _evaluation_of(record: Mapping[str, Any]) -> Evaluation:
    metrics = {name: value for name, value in record.items() if isinstance(value, float)}
    settings = {
        name: record[name] for name in ("seq_length", "stride", "num_fewshot", "limit", "weights") if name in record
    }
    return Evaluation(task=str(record["task"]), name=str(record["name"]), settings=settings, metrics=metrics)


def _front_matter() -> Iterator[str]:
    yield from ("---", "library_name: transformers", "pipeline_tag: text-generation")
    yield from ("tags:", "- megatron-lite", "# license: fill in before publishing", "---", "")


def _body(folder: Path, facts: CardFacts, verification: Verification | None, *, has_curve: bool) -> Iterator[str]:
    model, record = facts.model, facts.manifest.provenance.config
    parameters = parameter_count(model, model.vocab_size)
    yield f"# {facts.name}"
    yield ""
    yield (
        f"A language model with {parameters:,} parameters ({format_parameters(parameters)}), trained with "
        f"megatron_lite and exported as `{facts.architecture}`. License: to be filled in."
    )
    if code := sorted(path.name for path in folder.glob("*.py")):
        yield from (
            "",
            f"transformers lacks this class: load it with `trust_remote_code=True`, which executes {code[0]}.",
        )
    yield from ("", "## Model", "")
    yield from _table(_model_rows(facts))
    if verification is not None:
        yield from ("", f"Checked at export: {_without_folders(str(verification).rstrip(')'))}).")
    yield from _data(facts, from_record(DataConfig, record["data"]) if "data" in record else DataConfig())
    yield from _training(facts, record)
    if has_curve:
        yield from ("", "## Loss", "", f"![loss curve]({PICTURE})")
    yield from _evaluation(facts)
    yield from _command(record)


def _model_rows(facts: CardFacts) -> dict[str, str]:
    model = facts.model
    groups = f", {model.num_query_groups} key/value heads" * (model.num_query_groups != model.num_attention_heads)
    return {
        "layers": f"{model.num_layers}{describe_sharing(model)}",
        "hidden size": f"{model.hidden_size}"
        + (f" (embedding {model.embedding_size})" if model.embedding_size else ""),
        "attention": f"{model.num_attention_heads} heads of {model.head_dim} channels{groups}",
        "MLP": f"{model.ffn_hidden_size}, {model.activation}",
        "positions": f"{model.position_embedding}, trained on sequences of {facts.seq_length} tokens",
        "norm": f"{model.normalization}, epsilon {model.norm_epsilon:g}",
        "vocabulary": f"{model.vocab_size:,} tokens, {'tied' if model.tied_embeddings else 'untied'} head",
        "weights": facts.dtype,
        "iteration": f"{facts.manifest.iteration:,}",
    }


def _data(facts: CardFacts, data: DataConfig) -> Iterator[str]:
    groups = (*data.train_groups,)
    sources = (*data.sources, *(source for group in groups for source in group.sources))
    fingerprints = facts.manifest.provenance.fingerprints
    if not sources and not fingerprints:
        return
    yield from ("", "## Data", "")
    if sources:
        yield from ("| source | weight | size |", "|---|---|---|")
        for source in sources:
            weight = "by size" if source.weight is None else f"{source.weight:g}"
            yield f"| {Path(source.path).name} | {weight} | {_size(source)} |"
        yield ""
    yield from _table({name: f"`{_without_folders(value)}`" for name, value in fingerprints.items()})


def _size(source: DataSource) -> str:
    try:
        dataset = IndexedDataset(source.path)
    except MegatronLiteError:  # moved since the run
        return "not known"
    return f"{dataset.num_documents:,} documents, {dataset.num_tokens:,} tokens"


def _training(facts: CardFacts, record: Mapping[str, Any]) -> Iterator[str]:
    progress = facts.manifest.scalars.get("progress", {})
    rows = {
        "samples": f"{progress.get('consumed_train_samples', 0):,}",
        "tokens": f"{progress.get('consumed_train_tokens', 0):,}",
    }
    if "lr" in record and "optimizer" in record and "batch" in record:
        lr, optimizer, batch = record["lr"], record["optimizer"], record["batch"]
        warmup = f"{lr['warmup_iters']:,} iterations"
        if lr["warmup_samples"]:
            warmup = f"{lr['warmup_samples']:,} samples"
        rows |= {
            "learning rate": f"{lr['lr']:g} to {lr['min_lr']:g}, {lr['style']}",
            "warm-up": warmup,
            "optimizer": f"{optimizer['kind']}, weight decay {optimizer['weight_decay']:g}",
            "gradient clipping": f"{optimizer['clip_grad']:g}",
            "batch": f"{batch['global_batch_size']:,} sequences",
        }
    if not progress.get("consumed_train_samples") and "lr" not in record:
        return
    if "precision" in record:
        rows["precision"] = str(record["precision"]["dtype"])
    yield from ("", "## Training", "")
    yield from _table(rows)


def _curve(facts: CardFacts) -> str:
    """Return the picture of the run's losses up to the checkpoint; empty: they are not known."""
    try:
        return draw_svg(read_curve(facts.metrics))
    except MegatronLiteError:
        return ""


def _evaluation(facts: CardFacts) -> Iterator[str]:
    rows: dict[tuple[str, str], str] = {}
    for one in facts.evaluations:
        for name, value in one.metrics.items():
            if isinstance(value, float) and not name.endswith("_stderr"):
                error = one.metrics.get(f"{name}_stderr")
                rows[_without_folders(one.title), name] = _figure(value) + (f" ± {error:.4f}" if error else "")
    try:
        validation = read_curve(facts.metrics).validation
    except MegatronLiteError:
        validation = {}
    for name, points in validation.items():
        reached = [loss for iteration, loss in points if iteration <= facts.manifest.iteration]
        if reached:
            rows[name, "loss"] = _figure(reached[-1])
    if not rows:
        return
    yield from ("", "## Evaluation", "", "| text or task | metric | value |", "|---|---|---|")
    yield from (f"| {title} | {metric.replace('_', ' ')} | {value} |" for (title, metric), value in rows.items())


def _figure(value: float) -> str:
    return f"{value:.4f}"


def _command(record: Mapping[str, Any]) -> Iterator[str]:
    try:
        words = to_argv(from_record(RunConfig, record))
    except (MegatronLiteError, KeyError, TypeError):  # an imported model, or another version's run
        return
    command = shlex.join(_without_folders(word) for word in words)
    yield from ("", "## Command", "", "```", f"pretrain_gpt.py {command}", "```")


def _without_folders(text: str) -> str:
    """Return a text whose absolute paths are names only: where files lie on a machine is nobody's business."""
    return re.sub(r"(?<!\S)/\S*?([^/\s]+)/?(?=\s|$)", r"\1", text)


def _table(rows: Mapping[str, str]) -> Iterator[str]:
    yield from ("| | |", "|---|---|")
    yield from (f"| {name} | {value} |" for name, value in rows.items())
