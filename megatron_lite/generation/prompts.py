"""Prompts with generation settings of their own (sampling, length, stop strings), and their JSON lines format."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from megatron_lite.config.text_file import text_lines
from megatron_lite.config.values import MAX_SEED, is_utf8
from megatron_lite.errors import ConfigError, DataError, MegatronLiteError
from megatron_lite.generation.sampling import Sampling


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of a prompt's texts.

    Attributes:
        sampling: sampling parameters.
        max_new_tokens: maximum number of new tokens; None: as many as the context leaves, 128 at most.
        seed: of the first text; the next texts have the next seeds.
        stop: strings that end a text; they are not part of it.
        num_samples: texts of the prompt.
        best_of: texts that are generated, of which the num_samples likeliest are kept; 0: num_samples.

    Raises:
        ConfigError: best_of is below num_samples, or a stop string is empty.
    """

    sampling: Sampling = field(default_factory=Sampling)
    max_new_tokens: int | None = None
    seed: int = 1234
    stop: tuple[str, ...] = ()
    num_samples: int = 1
    best_of: int = 0

    def __post_init__(self) -> None:
        if self.best_of and self.best_of < self.num_samples:
            raise ConfigError(
                f"--best-of {self.best_of} is less than --num-samples {self.num_samples}",
                fix=f"Use --best-of {self.num_samples} or more, or remove --best-of",
            )
        if "" in self.stop:
            raise ConfigError("A stop string (--stop) is empty", fix="Remove the empty --stop, or give it a text")

    @property
    def num_generated(self) -> int:
        """Texts that are generated for the prompt."""
        return self.best_of or self.num_samples


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """Text to continue.

    Attributes:
        text: empty: the text starts after the end of a document.
        settings: of its texts.
        name: for messages.
        id: of its results.
        meta: the user's own data, copied to the results.
        limit: flag or key of max_new_tokens, for messages.
    """

    text: str
    settings: Settings
    name: str
    id: str | int
    meta: Any = None
    limit: str = "--max-new-tokens"


_KINDS: Mapping[str, tuple[type, ...]] = {
    "max_new_tokens": (int,),
    "temperature": (int, float),
    "top_k": (int,),
    "top_p": (int, float),
    "min_p": (int, float),
    "repetition_penalty": (int, float),
    "seed": (int,),
    "stop": (str, list),
    "num_samples": (int,),
    "best_of": (int,),
}
"""Types of the settings of a line."""
_LEAST = {"max_new_tokens": 1, "seed": 0, "num_samples": 1, "best_of": 0, "top_k": 0}
_MOST = {"seed": MAX_SEED}
_OTHER_KEYS = ("id", "prompt", "meta")
_SAMPLING = {entry.name for entry in fields(Sampling)}


def parse_prompts(text: str, source: str, defaults: Settings) -> list[Prompt]:
    """Return the prompts of JSON lines: `prompt`, and optionally `id`, `meta` and settings by the names of Settings.

    Args:
        text: one JSON object per line; empty lines are ignored.
        source: flag and file, for errors.
        defaults: settings that a line does not have.

    Raises:
        DataError: a line is not an object with a text as its prompt, has an unknown or invalid setting, or repeats an
            id.
    """
    prompts: list[Prompt] = []
    seen: dict[str | int, int] = {}
    for number, line in enumerate(text_lines(text), 1):
        if not line.strip():
            continue
        where = f"Line {number} of {source}"
        prompt = _parse(line, where, number, defaults)
        if (first := seen.setdefault(prompt.id, number)) != number:
            raise DataError(
                f"{where} has the id {_json(prompt.id)} of line {first}",
                fix='Give each line another "id", or none: it is then the number of the line',
            )
        prompts.append(prompt)
    if not prompts:
        raise DataError(
            f"{source} has no prompts", fix='Write lines such as {"prompt": "Once upon a time"} in the file'
        )
    return prompts


def _parse(line: str, where: str, number: int, defaults: Settings) -> Prompt:
    try:
        record = json.loads(line, object_pairs_hook=_unique)
    except DataError as error:
        raise DataError(f"{where}: {error.problem}", fix=error.fix) from None
    except ValueError as error:
        raise DataError(
            f"{where} is not JSON: {error}", fix='Write one object per line, such as {"prompt": "Once upon a time"}'
        ) from None
    if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
        raise DataError(
            f'{where} has no text under "prompt"',
            fix='Write {"prompt": "Once upon a time"}; an empty text starts after the end of a document',
        )
    try:
        settings = _settings(record, defaults)
    except MegatronLiteError as error:
        problem, fix = (_naming_keys(part, record) for part in (error.problem, error.fix))
        raise DataError(f"{where}: {problem}", fix=fix) from None
    if not is_utf8(record["prompt"]):
        raise DataError(
            f"The prompt of {where[0].lower()}{where[1:]} has half of a surrogate pair, which UTF-8 cannot represent",
            fix="Write the character itself, or both halves of its \\u escapes",
        )
    name = record.get("id", number)
    if not isinstance(name, str | int) or isinstance(name, bool):
        raise DataError(f'{where} has the "id" {_json(name)}', fix="Use a text or a whole number as id")
    return Prompt(
        text=record["prompt"],
        settings=settings,
        name=f"The prompt of {where[0].lower()}{where[1:]}",
        id=name,
        meta=record.get("meta"),
        limit='"max_new_tokens"',
    )


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of JSON.

    Raises:
        DataError: a key is repeated.
    """
    record: dict[str, Any] = {}
    for name, value in pairs:
        if name in record:
            raise DataError(f'the key "{name}" is repeated', fix=f'Keep one of the values of "{name}"')
        record[name] = value
    return record


def _naming_keys(message: str, record: Mapping[str, Any]) -> str:
    """Replace flags in a message by the keys that a line has for them.

    >>> _naming_keys("--top-p 2 is out of range: remove --top-p", {"top_p": 2})
    '"top_p" 2 is out of range: remove "top_p"'
    """
    for name in record.keys() & _KINDS.keys():
        message = re.sub(rf"--{name.replace('_', '-')}\b", f'"{name}"', message)
    return message


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _settings(record: Mapping[str, Any], defaults: Settings) -> Settings:
    """Return the settings of a line.

    Raises:
        ConfigError: a key is unknown, or a value invalid.
    """
    given = {name: value for name, value in record.items() if name not in _OTHER_KEYS}
    for name, value in given.items():
        if name not in _KINDS:
            near = difflib.get_close_matches(name, _KINDS, n=1)
            raise ConfigError(
                f'the key "{name}" is unknown' + (f', the nearest is "{near[0]}"' if near else ""),
                fix=f'Use one of {", ".join(_KINDS)}, or put data of your own under "meta"',
            )
        right = isinstance(value, _KINDS[name]) and not isinstance(value, bool)
        if isinstance(value, list):
            right = all(isinstance(entry, str) for entry in value)
        elif right and isinstance(value, int):
            right = _LEAST.get(name, value) <= value <= _MOST.get(name, value)
        if not right:
            least = f" from {_LEAST[name]}" if name in _LEAST else ""
            expected = "a text or a list of texts" if name == "stop" else f"a number{least}"
            raise ConfigError(f'"{name}" is {_json(value)}', fix=f'Give "{name}" {expected}, or leave it out')
    if isinstance(stop := given.get("stop", ()), str):
        stop = (stop,)
    if "stop" in given:
        given["stop"] = tuple(stop)
    sampling = replace(defaults.sampling, **{name: value for name, value in given.items() if name in _SAMPLING})
    others = {name: value for name, value in given.items() if name not in _SAMPLING}
    return replace(defaults, sampling=sampling, **others)
