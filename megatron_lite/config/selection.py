"""Parameter selection by name: frozen parameters (--freeze) and learning-rate factors (--lr-factors)."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from megatron_lite.config.parameters import parameter_shapes
from megatron_lite.config.run import RunConfig
from megatron_lite.config.tuning import TuningConfig
from megatron_lite.errors import ConfigError

_SHOWN = 6


@dataclass(frozen=True)
class Selection:
    """Parameters of a run that are frozen or have a learning-rate factor, by global name.

    Attributes:
        frozen: names of the parameters that are not trained.
        factors: factor of the learning rate by name; 1 for all others.
        num_frozen: elements of the frozen parameters.
        num_elements: elements of all parameters.
    """

    frozen: frozenset[str] = frozenset()
    factors: Mapping[str, float] = field(default_factory=dict)
    num_frozen: int = 0
    num_elements: int = 0


def select_parameters(config: RunConfig) -> Selection:
    """Match the patterns of --freeze and --lr-factors with the names of the model's parameters.

    A pattern is searched in the name, as by re.search. The first pattern of --lr-factors that matches counts.

    Args:
        config: the run, with the vocabulary size.

    Raises:
        ConfigError: a pattern matches no parameter, or every parameter is frozen.
    """
    options = config.tuning
    if not options.freeze and not options.lr_factors:
        return Selection()
    sizes = {name: math.prod(shape) for name, shape in parameter_shapes(config.model).items()}
    for flag, patterns in (("--freeze", options.freeze), ("--lr-factors", [p for p, _ in options.lr_factors])):
        for pattern in patterns:
            if not any(re.search(pattern, name) for name in sizes):
                raise _no_match(flag, pattern, list(sizes))
    frozen = frozenset(name for name in sizes if any(re.search(pattern, name) for pattern in options.freeze))
    if len(frozen) == len(sizes):
        raise ConfigError(
            f"--freeze {' '.join(options.freeze)} freezes all {len(sizes)} parameters of the model: nothing would be "
            "trained",
            fix="Remove a pattern of --freeze so that some parameters are trained, or add --skip-train to evaluate "
            "only",
        )
    factors = {name: factor for name in sizes if (factor := _factor(options, name)) != 1.0}
    return Selection(frozen, factors, sum(sizes[name] for name in frozen), sum(sizes.values()))


def _factor(options: TuningConfig, name: str) -> float:
    return next((factor for pattern, factor in options.lr_factors if re.search(pattern, name)), 1.0)


def _no_match(flag: str, pattern: str, names: Sequence[str]) -> ConfigError:
    # Of the names of all layers, the first layer's stand for the others.
    known = list(dict.fromkeys(re.sub(r"layers\.\d+\.", "layers.0.", name) for name in names))
    near = difflib.get_close_matches(pattern, known, n=_SHOWN, cutoff=0.3) or known[:_SHOWN]
    return ConfigError(
        f"The pattern {pattern!r} of {flag} matches no parameter of the model",
        fix=f"Give a regular expression that occurs in the names, such as those of {', '.join(near)}",
    )
