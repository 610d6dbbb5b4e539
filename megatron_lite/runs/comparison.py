"""Resume compatibility check: errors and warnings for differences between checkpoint and current run."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from megatron_lite.config.learning_rate import LrConfig
from megatron_lite.config.run import RunConfig
from megatron_lite.config.table import field_metadata, flags_by_field
from megatron_lite.errors import CheckpointError
from megatron_lite.runs.manifest import Manifest, Provenance
from megatron_lite.schedules.data_order import DataSegment, extend_history, history_of_config
from megatron_lite.schedules.progress import Progress

_ABSENT = "not stored"
_FILES_SHOWN = 10
"""Changed source files that a warning lists."""
_OVERRIDE, _USE = "--override-opt-param-scheduler", "--use-checkpoint-opt-param-scheduler"
_WEIGHT_DECAY = ("weight_decay", "start_weight_decay", "end_weight_decay", "weight_decay_style")
# Rows of the learned position table, where there is one.
_TABLE = frozenset({"max_position_embeddings"})


@dataclass(frozen=True)
class Difference:
    """A value that differs from the checkpoint's: its path (`lr.min_lr`), the saved value and the current one."""

    path: str
    saved: Any
    current: Any

    @property
    def is_comparable(self) -> bool:
        """Whether both configs have the field, which may exist in one of two versions of the program only."""
        return _ABSENT not in (self.saved, self.current)

    def __str__(self) -> str:
        return f"{flag_of(self.path)}: {_show(self.saved)} in the checkpoint, {_show(self.current)} now"


def config_as_json(config: RunConfig) -> dict[str, Any]:
    """Return the config as stored in a manifest: dicts, lists, numbers and strings."""
    plain: dict[str, Any] = json.loads(json.dumps(asdict(config)))
    return plain


def compare_configs(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[Difference]:
    """Return every value that differs between two configs from config_as_json, in the order of their names."""
    return list(_compare(saved, current, ""))


def describe(differences: Sequence[Difference]) -> str:
    """Return the differences as text, one indented line each; empty if there are none."""
    return "\n".join(f"  {difference}" for difference in differences)


def check_model(saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Refuse to load weights into a model that computes another function of them.

    Args:
        saved: the checkpoint's config, from config_as_json; one without a model section passes.
        current: this run's.

    Raises:
        CheckpointError: fields of the model differ, all of them named.
    """
    if "model" not in saved:
        return
    found = compare_configs({"model": saved["model"]}, {"model": current["model"]})
    may_change = {name for section, name in field_metadata("may_change") if section == "model"}
    may_change |= _TABLE if saved["model"].get("position_embedding") != "learned" else set()
    broken = [d for d in found if d.path.split(".")[1] not in may_change and d.is_comparable]
    if broken:
        raise CheckpointError(
            f"The model of this command is not that of the checkpoint:\n{describe(broken)}\n",
            fix="Give these flags the values of the checkpoint",
        )


def check_optimizer(saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Refuse to load the state of an optimizer into another one.

    Args:
        saved: the checkpoint's config, from config_as_json.
        current: this run's.

    Raises:
        CheckpointError: the kinds differ, and do not have the same moments.
    """
    was, now = (config.get("optimizer", {}).get("kind", "adam") for config in (saved, current))
    if was != now and {was, now} != {"adam", "adamw8bit"}:
        raise CheckpointError(
            f"The checkpoint has the state of --optimizer {was}, and this run has --optimizer {now}",
            fix=f"Use --optimizer {was}, or add --no-load-optim to begin the state of {now} at the weights",
        )


def read_history(provenance: Provenance, config: RunConfig) -> tuple[DataSegment, ...]:
    """Return the data segments of the run that wrote a checkpoint; for old ones, derived with the help of `config`."""
    if provenance.data_history:
        return provenance.data_history
    prints = {name: value for name, value in provenance.fingerprints.items() if _kind(name) == "data"}
    return tuple(replace(segment, fingerprints=prints) for segment in history_of_config(provenance.config, config))


def continue_history(
    manifest: Manifest | None, config: RunConfig, fingerprints: Mapping[str, str] | None = None
) -> tuple[DataSegment, ...]:
    """Return the data segments of a run; the last one is read from now on.

    Args:
        manifest: the checkpoint from which the run resumes; None: it begins.
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
    """Refuse to resume with another tokenizer or other data than the run began with.

    Args:
        saved: the checkpoint's, by name; the first word is the kind: `tokenizer`, `data` or `code`. In a value, text
            after ` of ` names what has the fingerprint, and may change.
        current: this run's. A kind that only one of the two has is not compared.
        accepted: the kinds that may differ (--accept-changed). Code may always differ: see code_change.
        data_effect: effect of other data on the samples still to be read, for the error.

    Returns:
        The accepted differences, to be printed.

    Raises:
        CheckpointError: others differ; all are named with both values.
    """
    changed = [found for found in fingerprint_differences(saved, current) if _kind(found.path) != "code"]
    refused = [difference for difference in changed if _kind(difference.path) not in accepted]
    if refused:
        effect = f"  {data_effect}\n" if data_effect and changes_data(refused) else ""
        kinds = sorted({_kind(difference.path) for difference in refused})
        accept = sorted({_kind(difference.path) for difference in changed})
        raise CheckpointError(
            f"The {' and '.join(kinds)} of this command differ{'' if len(kinds) > 1 or kinds == ['data'] else 's'} "
            "from those with "
            f"which the checkpoint was trained:\n{describe(refused)}\n{effect}",
            fix=f"{_give_back(refused)}, or accept the change with --accept-changed {' '.join(accept)}",
        )
    return changed


def _give_back(refused: Sequence[Difference]) -> str:
    """Return the instruction to give the checkpoint's tokenizer and data, with differing settings of the order."""
    settings: list[str] = []
    for difference in refused:
        saved, current = (text.partition(" of ")[2].split(", ") for text in (difference.saved, difference.current))
        settings += [part for part in saved if part.startswith(("seed", "--")) and part not in current]
    kinds = sorted({_kind(difference.path) for difference in refused})
    return f"Use the {' and '.join(kinds)} of the checkpoint" + (f" ({', '.join(settings)})" if settings else "")


def code_change(saved: Provenance, current: Provenance) -> str | None:
    """Return a warning if the program's source code differs from that which wrote a checkpoint; None: it is the same.

    A warning and no error: a hotfix must not end a chain of jobs.
    """
    differences = fingerprint_differences(
        *({name: text for name, text in run.fingerprints.items() if _kind(name) == "code"} for run in (saved, current))
    )
    if not differences:
        return None
    names = saved.sources.keys() | current.sources.keys()
    files = sorted(name for name in names if saved.sources.get(name) != current.sources.get(name))
    more = f" and {len(files) - _FILES_SHOWN} more" if len(files) > _FILES_SHOWN else ""
    changed = f" Changed files: {', '.join(files[:_FILES_SHOWN])}{more}." if saved.sources else ""
    was, now = (text.partition(" of ")[2] or text for text in (differences[0].saved, differences[0].current))
    return f"the code has changed since the checkpoint was saved, from {was} to {now}.{changed}"


def fingerprint_differences(saved: Mapping[str, str], current: Mapping[str, str]) -> list[Difference]:
    """Return what differs between two sets of fingerprints; a kind that only one of the two has is not compared."""
    kinds = {_kind(name) for name in saved} & {_kind(name) for name in current}
    return [
        Difference(name, saved.get(name, _ABSENT), current.get(name, _ABSENT))
        for name in sorted(saved.keys() | current.keys(), key=_by_number)
        if _kind(name) in kinds and _identity(saved.get(name)) != _identity(current.get(name))
    ]


def changes_data(differences: Sequence[Difference]) -> bool:
    """Return whether fingerprints of data or of their order are among the differences."""
    return any(_kind(difference.path) == "data" for difference in differences)


def _kind(name: str) -> str:
    return name.partition(" ")[0]


def _identity(value: str | None) -> str | None:
    return value if value is None else value.partition(" of ")[0]


def _by_number(name: str) -> list[tuple[int, str]]:
    return [(int(word) if word.isdecimal() else 0, word) for word in name.split()]


def schedule_differences(saved: RunConfig, current: RunConfig) -> list[Difference]:
    """Return the differences of two runs' learning-rate and weight-decay schedules.

    A decay over the run's length is compared by that length, because a longer run stretches it; fields without effect
    under the current style are ignored.
    """
    return list(_compare(_schedule(saved), _schedule(current), ""))


def resume_schedule(
    saved: RunConfig, current: RunConfig, *, override: bool, use_checkpoint: bool
) -> tuple[RunConfig, list[Difference]]:
    """Return the config with the learning-rate and weight-decay schedules with which to resume.

    Megatron's rule: every value must equal the saved one, unless a flag gives precedence to the command line
    (`override`) or to the checkpoint (`use_checkpoint`).

    Args:
        saved: the checkpoint's config.
        current: the command line's.
        override: --override-opt-param-scheduler.
        use_checkpoint: --use-checkpoint-opt-param-scheduler.

    Returns:
        The config, and the resolved differences, to be printed.

    Raises:
        CheckpointError: the schedules differ and no flag gives precedence, or both flags are given.
    """
    if override and use_checkpoint:
        raise CheckpointError(
            f"{_OVERRIDE} and {_USE} contradict each other",
            fix="Remove the first to use the checkpoint's schedule, or the second to use the command line's",
        )
    differences = schedule_differences(saved, current)
    if not differences or override:
        return current, differences
    if not use_checkpoint:
        raise CheckpointError(
            f"The learning-rate or weight-decay schedule of this command differs from the checkpoint's:\n"
            f"{describe(differences)}\n",
            fix=f"Add {_OVERRIDE} to use the command line's schedule (a decay is stretched to its new length), or "
            f"{_USE} to use the "
            "checkpoint's (after its last iteration, the learning rate stays at its final value)",
        )
    lr = replace(
        saved.lr,
        decay_iters=saved.lr.decay_iters or saved.training.train_iters,
        decay_samples=saved.lr.decay_samples or saved.training.train_samples,
    )
    optimizer = replace(current.optimizer, **{name: getattr(saved.optimizer, name) for name in _WEIGHT_DECAY})
    return replace(current, lr=lr, optimizer=optimizer), differences


def schedule_config(saved: Mapping[str, Any], current: RunConfig) -> RunConfig:
    """Return `current` with the schedule of a manifest's config, as `saved` for the functions above.

    Fields that the manifest lacks (an older version wrote it) keep this run's value.
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


def flag_of(path: str) -> str:
    """Return the flag of a config field; the path of one without a flag, and of what is not in the config."""
    section, _, field = path.partition(".")
    declared = flags_by_field().get((section, field), ())
    return next((flag.name for flag in declared if flag.takes_value), declared[0].name if declared else path)


def _show(value: Any) -> str:
    return value if isinstance(value, str) else "not given" if value is None else json.dumps(value)
