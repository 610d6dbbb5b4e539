"""Comparison of a checkpoint's config, schedule and fingerprints with those of the resuming run."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from megatron_lite.config.optimizer import LrConfig
from megatron_lite.config.run import RunConfig
from megatron_lite.errors import CheckpointError
from megatron_lite.runs.manifest import Manifest, Provenance
from megatron_lite.schedules.data_order import DataSegment, extend_history, history_of_config
from megatron_lite.schedules.progress import Progress

_ABSENT = "nothing"
_OVERRIDE, _USE = "--override-opt_param-scheduler", "--use-checkpoint-opt_param-scheduler"
_WEIGHT_DECAY = ("weight_decay", "start_weight_decay", "end_weight_decay", "weight_decay_style")
# Of the model's fields, those that change neither the function that the weights compute nor their names and shapes.
_MAY_CHANGE = frozenset(
    {
        "hidden_dropout",
        "attention_dropout",
        "init_std",
        "scaled_init",
        "padded_vocab_size",
        "make_vocab_size_divisible_by",
        "rotary_scaling",
        "fp32_residual",
    }
)
# Rows of the learned position table, where there is one.
_TABLE = frozenset({"max_position_embeddings"})


@dataclass(frozen=True)
class Difference:
    """One value that is not what it was: where it stands (`lr.min_lr`), what was saved, what holds now."""

    path: str
    saved: Any
    current: Any

    def __str__(self) -> str:
        return f"{self.path}: {_show(self.saved)} in the checkpoint, {_show(self.current)} now"


def config_as_json(config: RunConfig) -> dict[str, Any]:
    """The config as a manifest holds it: dicts, lists, numbers and strings."""
    plain: dict[str, Any] = json.loads(json.dumps(asdict(config)))
    return plain


def compare_configs(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[Difference]:
    """Every value that differs between two configs as config_as_json gives them, in the order of their names."""
    return list(_compare(saved, current, ""))


def describe(differences: Sequence[Difference]) -> str:
    """The differences, one indented line each; empty if there are none."""
    return "\n".join(f"  {difference}" for difference in differences)


def check_model(saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Refuses to load weights into a model that would compute something else with them.

    Args:
        saved: the checkpoint's config, as config_as_json gives it; one without a model section is let pass.
        current: this run's.

    Raises:
        CheckpointError: fields of the model differ, all of them named.
    """
    if "model" not in saved:
        return
    found = compare_configs({"model": saved["model"]}, {"model": current["model"]})
    may_change = _MAY_CHANGE | (_TABLE if saved["model"].get("position_embedding") != "learned" else set())
    # A field that one of the two programs does not know says nothing about the run.
    broken = [d for d in found if d.path.split(".")[1] not in may_change and _ABSENT not in (d.saved, d.current)]
    if broken:
        raise CheckpointError(
            "The model must be the one that was saved",
            found="\n" + describe(broken) + "\n",
            fix="Give the options that it was saved with",
        )


def read_history(provenance: Provenance, config: RunConfig) -> tuple[DataSegment, ...]:
    """Return what the run that wrote a checkpoint had read; `config` stands in for what an old one does not hold."""
    if provenance.data_history:
        return provenance.data_history
    prints = {name: value for name, value in provenance.fingerprints.items() if _kind(name) == "data"}
    return tuple(replace(segment, fingerprints=prints) for segment in history_of_config(provenance.config, config))


def continue_history(
    manifest: Manifest | None, config: RunConfig, fingerprints: Mapping[str, str] | None = None
) -> tuple[DataSegment, ...]:
    """Return what a run reads, by segment; the last segment is what it reads from now on.

    Args:
        manifest: the checkpoint that the run goes on from; None: it begins.
        config: the run's.
        fingerprints: of the data.
    """
    if manifest is None:
        return extend_history((), config, fingerprints=fingerprints)
    progress = Progress.from_dict(manifest.scalars["progress"])
    return extend_history(read_history(manifest.provenance, config), config, progress, fingerprints)


def check_fingerprints(
    saved: Mapping[str, str], current: Mapping[str, str], accepted: Collection[str] = (), *, data_effect: str = ""
) -> list[Difference]:
    """Refuses to go on with another tokenizer, other data or other code than the run began with.

    Args:
        saved: the checkpoint's, by what they are of: the first word is `tokenizer`, `data` or `code`. What follows
            ` of ` in a value is the name of what has the fingerprint, and may change.
        current: this run's. A kind that only one of the two has is not compared.
        accepted: the kinds that may differ (--accept-changed).
        data_effect: what other data mean for the samples that are still to be read, for the error.

    Returns:
        The differences that were accepted, to be printed.

    Raises:
        CheckpointError: others differ, all of them named with both values.
    """
    changed = fingerprint_differences(saved, current)
    refused = [difference for difference in changed if _kind(difference.path) not in accepted]
    if refused:
        effect = f"  {data_effect}\n" if data_effect and changes_data(refused) else ""
        raise CheckpointError(
            "A resumed run goes on with the tokenizer, data and code that it began with",
            found="\n" + describe(refused) + "\n" + effect,
            fix="Give the ones it began with, or accept the change with --accept-changed "
            + " ".join(sorted({_kind(difference.path) for difference in changed})),
        )
    return changed


def fingerprint_differences(saved: Mapping[str, str], current: Mapping[str, str]) -> list[Difference]:
    """Return what differs between two sets of fingerprints; a kind that only one of the two has is not compared."""
    kinds = {_kind(name) for name in saved} & {_kind(name) for name in current}
    return [
        Difference(name, saved.get(name, _ABSENT), current.get(name, _ABSENT))
        for name in sorted(saved.keys() | current.keys(), key=_by_number)
        if _kind(name) in kinds and _identity(saved.get(name)) != _identity(current.get(name))
    ]


def changes_data(differences: Sequence[Difference]) -> bool:
    """Whether fingerprints of data or of their order are among the differences."""
    return any(_kind(difference.path) == "data" for difference in differences)


def _kind(name: str) -> str:
    return name.partition(" ")[0]


def _identity(value: str | None) -> str | None:
    return value if value is None else value.partition(" of ")[0]


def _by_number(name: str) -> list[tuple[int, str]]:
    return [(int(word) if word.isdecimal() else 0, word) for word in name.split()]


def schedule_differences(saved: RunConfig, current: RunConfig) -> list[Difference]:
    """Where two runs' learning rate or weight decay follow other curves.

    What a flag leaves to the run's length is compared as the length it stands for, so that a longer run is seen to
    stretch a decay; fields without effect under the style in use are passed over.
    """
    return list(_compare(_schedule(saved), _schedule(current), ""))


def resume_schedule(
    saved: RunConfig, current: RunConfig, *, override: bool, use_checkpoint: bool
) -> tuple[RunConfig, list[Difference]]:
    """The config to go on with, as far as the learning-rate and weight-decay schedules are concerned.

    Megatron's rule: every value must be the saved one, unless the command line is told to win (`override`) or the
    checkpoint is (`use_checkpoint`).

    Args:
        saved: the checkpoint's config.
        current: the command line's.
        override: --override-opt_param-scheduler.
        use_checkpoint: --use-checkpoint-opt_param-scheduler.

    Returns:
        The config, and the differences that were settled, to be printed.

    Raises:
        CheckpointError: the schedules differ and no flag says which wins, or both flags are given.
    """
    if override and use_checkpoint:
        raise CheckpointError(
            "Either the command line's schedule wins or the checkpoint's",
            found=f"{_OVERRIDE} and {_USE} are both given",
            fix="Leave one of them out",
        )
    differences = schedule_differences(saved, current)
    if not differences or override:
        return current, differences
    if not use_checkpoint:
        raise CheckpointError(
            "The learning-rate and weight-decay schedule must go on as it was saved",
            found="\n" + describe(differences) + "\n",
            fix=f"Add {_OVERRIDE} to take the command line's (a decay then stretches to the new length), or {_USE} to "
            "take the checkpoint's (the run goes on at the rate where its decay ends)",
        )
    lr = replace(
        saved.lr,
        decay_iters=saved.lr.decay_iters or saved.training.train_iters,
        decay_samples=saved.lr.decay_samples or saved.training.train_samples,
    )
    optimizer = replace(current.optimizer, **{name: getattr(saved.optimizer, name) for name in _WEIGHT_DECAY})
    return replace(current, lr=lr, optimizer=optimizer), differences


def schedule_config(saved: Mapping[str, Any], current: RunConfig) -> RunConfig:
    """`current` with the schedule that a manifest's config holds, as `saved` of the functions above.

    Fields that the manifest does not hold (an older program wrote it) keep this run's value.
    """
    training = {key: saved["training"][key] for key in ("train_iters", "train_samples") if key in saved["training"]}
    known = {field.name for field in fields(LrConfig)}
    return replace(
        current,
        lr=replace(current.lr, **{key: value for key, value in saved["lr"].items() if key in known}),
        optimizer=replace(
            current.optimizer, **{key: saved["optimizer"][key] for key in _WEIGHT_DECAY if key in saved["optimizer"]}
        ),
        training=replace(current.training, **training),
    )


def _schedule(config: RunConfig) -> dict[str, Any]:
    lr, optimizer, training = config.lr, config.optimizer, config.training
    values = asdict(lr)
    values["decay_iters"] = lr.decay_iters or training.train_iters
    values["decay_samples"] = lr.decay_samples or training.train_samples
    idle = [name for name in values if name.startswith("wsd_")] if lr.style != "WSD" else []
    if lr.style == "constant":
        idle.append("min_lr")
        if lr.warmup_fraction is None:
            idle += ["decay_iters", "decay_samples", "decay_tokens"]
    decay = {"weight_decay_style": optimizer.weight_decay_style}
    if optimizer.weight_decay_style == "constant":
        values_of_decay: dict[str, Any] = {"weight_decay": optimizer.weight_decay}
    else:
        start, end = optimizer.start_weight_decay, optimizer.end_weight_decay
        values_of_decay = {
            "start_weight_decay": optimizer.weight_decay if start is None else start,
            "end_weight_decay": optimizer.weight_decay if end is None else end,
            "length": training.train_samples or training.train_iters,
        }
    return {
        "lr": {name: value for name, value in values.items() if name not in idle},
        "optimizer": {**decay, **values_of_decay},
    }


def _compare(saved: Any, current: Any, path: str) -> Iterator[Difference]:
    if isinstance(saved, Mapping) and isinstance(current, Mapping):
        for name in sorted(saved.keys() | current.keys()):
            below = f"{path}.{name}" if path else name
            yield from _compare(saved.get(name, _ABSENT), current.get(name, _ABSENT), below)
    elif saved != current:
        yield Difference(path, saved, current)


def _show(value: Any) -> str:
    return value if value == _ABSENT else json.dumps(value)
