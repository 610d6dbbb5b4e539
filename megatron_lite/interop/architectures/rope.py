"""Rotary settings of config.json: transformers 5's rope_parameters and transformers 4's separate keys."""

from __future__ import annotations

from typing import Any

from megatron_lite.config.model import ModelConfig
from megatron_lite.interop.architectures.keys import DOWNLOAD, ConfigKeys

_KNOWN = ("rope_type", "type", "rope_theta", "factor", "partial_rotary_factor", "original_max_position_embeddings")


def read_rope(keys: ConfigKeys, *, theta: str = "rope_theta", share: str = "", percent: float = 1.0) -> dict[str, Any]:
    """Return the rotary fields of ModelConfig.

    Args:
        keys: the config.
        theta: transformers 4's key of the base.
        share: transformers 4's key of the rotated share of a head; empty: the architecture rotates all of it.
        percent: the share, where the config states none.

    Raises:
        CheckpointError: positions are scaled in another way than linearly.
    """
    new, old = keys.take("rope_parameters", default={}), keys.take("rope_scaling", default={})
    base, rotated = keys.take(theta, default=None), keys.take(share, default=None) if share else None
    for name, value in (("rope_parameters", new), ("rope_scaling", old)):
        unknown = [key for key in value if key not in _KNOWN and value[key] is not None]
        kind = _kind(value)
        if kind not in ("default", "linear"):
            raise keys.unsupported(
                name,
                value,
                f"rope_type {kind} is not implemented, so the outputs of this model would be wrong, also without the "
                "setting",
                fix="Import a model with rope_type default or linear",
            )
        if unknown:
            raise keys.unsupported(name, value, f"{', '.join(unknown)} is not implemented")
    scaling = new or old
    linear = _kind(scaling) == "linear"
    if new and old and (_kind(new), new.get("factor")) != (_kind(old), old.get("factor")):
        raise keys.unsupported("rope_scaling", old, f"rope_parameters is {new!r}", fix=DOWNLOAD)
    found = _one(keys, "partial_rotary_factor", new, old, rotated, percent)
    if not share and found != 1.0:
        raise keys.unsupported("partial_rotary_factor", found, "this architecture rotates whole heads")
    return {
        "position_embedding": "rotary",
        "rotary_base": _one(keys, "rope_theta", new, old, base, 10000.0),
        "rotary_percent": found,
        "rotary_scaling": float(scaling.get("factor") or 1.0) if linear else 1.0,
    }


def _kind(rope: dict[str, Any]) -> str:
    return str(rope.get("rope_type", rope.get("type", "default")))


def _one(keys: ConfigKeys, name: str, new: dict[str, Any], old: dict[str, Any], apart: Any, default: float) -> float:
    """Return a value that may stand in three places, which must agree."""
    given = {float(value) for value in (new.get(name), old.get(name), apart) if value is not None}
    if len(given) > 1:
        raise keys.unsupported(name, sorted(given), "the config states several values", fix=DOWNLOAD)
    return given.pop() if given else default


def write_rope(model: ModelConfig, *, theta: str = "rope_theta", share: str = "") -> dict[str, Any]:
    """Return the keys of both spellings, so that transformers 4 and 5 read the same."""
    rope: dict[str, Any] = {"rope_theta": model.rotary_base, "rope_type": "default"}
    old: dict[str, Any] | None = None
    if model.rotary_scaling != 1.0:
        rope |= {"rope_type": "linear", "factor": model.rotary_scaling}
        old = {"rope_type": "linear", "type": "linear", "factor": model.rotary_scaling}
    shares = {share: model.rotary_percent} if share else {}
    if share:
        rope["partial_rotary_factor"] = model.rotary_percent
    return {"rope_parameters": rope, theta: model.rotary_base, "rope_scaling": old, **shares}
