"""Model-size check of job names: warns if a name such as "104B" contradicts the parameter count."""

from __future__ import annotations

import re

from megatron_lite.config.counts import parameter_count
from megatron_lite.config.run import RunConfig
from megatron_lite.formatting import format_parameters

SIZE = re.compile(r"(?<![A-Za-z0-9.])(\d+)(?:\.(\d+))?([BM])(\d*)(?![A-Za-z0-9])")
"""104B, 1.3B, 1B3 (1.3 billion), 350M; capital letters only, as names of models have them."""
TOLERANCE = 1.2
GPT2_ENTRIES = 50257


def claimed_sizes(text: str) -> list[tuple[str, float]]:
    """Return the model sizes in a path or name, as (as written, parameters).

    >>> claimed_sizes("checkpoints/tr8-104B-wide"), claimed_sizes("tr3-1B3-baseline")
    ([('104B', 104000000000.0)], [('1B3', 1300000000.0)])
    """
    claims = []
    for match in SIZE.finditer(text):
        whole, point, letter, after = match.groups()
        if point and after:
            continue
        claims.append((match.group(), float(f"{whole}.{point or after or 0}") * (1e9 if letter == "B" else 1e6)))
    return claims


def name_warnings(config: RunConfig) -> list[str]:
    """Return a warning for each size in folder names that the parameter count contradicts."""
    model = config.model
    rows = model.vocab_size or model.padded_vocab_size or GPT2_ENTRIES
    total, body = parameter_count(model, rows), parameter_count(model, 0)
    folders = {
        "--save": config.checkpoint.save,
        "--load": config.checkpoint.load,
        "--tensorboard-dir": config.metrics.tensorboard_dir,
    }
    warnings: dict[str, str] = {}
    for flag, text in folders.items():
        for written, claimed in claimed_sizes(text):
            if all(max(count / claimed, claimed / max(1, count)) > TOLERANCE for count in (total, body)):
                warnings.setdefault(
                    written,
                    f"the name in {flag} says {written}, but this model has {format_parameters(total)} ({total:,}) "
                    "parameters",
                )
    return list(warnings.values())
