"""Conversion check: logits of a converted checkpoint against those of the transformers library."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_lite.config.data import DataConfig
from megatron_lite.data.format.indexed_dataset import IndexedDataset
from megatron_lite.errors import CheckpointError, ConfigError, MegatronLiteError, install_extra, report_bug
from megatron_lite.tokenizer.base import Tokenizer

TOLERANCE = 2e-5
"""Largest difference of logits, as a share of the largest logit (at least 1): above fp32 rounding in deep models, below
the difference between the two GELUs (2e-4 in a tiny model)."""
LENGTH = 256
TEXT = """The library had been closed for most of the winter, and when it opened again in March 2019 the first visitors
found that little had changed. The reading room still smelled of paper and floor polish; the clock over the door was
still eleven minutes slow. "You could set your watch wrong by it," said Mrs. Aldous, who has worked there since 1987.

def mean(values):
    return sum(values) / len(values)

Average attendance fell by 3.4% between 2010 and 2016, then rose. Nobody is quite sure why: the collection is smaller
than it was, the opening hours are shorter, and the heating fails whenever the temperature drops below -5 degrees. What
is certain is that people come. They come to read the newspapers, to use the printers, to study for examinations, or
simply to sit by the large windows that look out over the river and watch the barges go past on their way to the sea.
"""


@dataclass(frozen=True)
class Verification:
    """Result of comparing logits: largest |a - b|, largest logit, number of tokens and their source."""

    largest: float
    scale: float
    tokens: int
    text: str

    def __str__(self) -> str:
        return (
            f"logits equal to transformers' within {self.largest:.2e} (largest logit {self.scale:.3g}, "
            f"{self.tokens} tokens of {self.text})"
        )


def require_transformers(command: str) -> None:
    """Raise an error if transformers is not installed.

    Raises:
        ConfigError: it is not; the message names the extra.
    """
    if importlib.util.find_spec("transformers") is None:
        raise ConfigError(
            f"transformers is not installed, with which {command} compares the logits of the model",
            fix=f"{install_extra('hf')}, or add --no-verify to skip the comparison",
        )


def sample_tokens(tokenizer: Tokenizer | None, data: DataConfig, length: int, vocab_size: int) -> tuple[Tensor, str]:
    """Return tokens [1, s] to compare logits on, and what they are: the run's data, or a built-in text.

    Args:
        tokenizer: the model's; None: it has none.
        data: the run's data, of which the first source that is there is taken.
        length: the longest sequence of the model.
        vocab_size: of the model.
    """
    length = min(length, LENGTH)
    groups = (*data.train_groups, *data.valid_groups)
    for source in (*data.sources, *(source for group in groups for source in group.sources)):
        if all(Path(source.path + suffix).is_file() for suffix in (".bin", ".idx")):
            ids = _first_tokens(source.path, length)
            if ids is not None and len(ids) > 1 and int(ids.max()) < vocab_size:
                return torch.from_numpy(ids.astype(np.int64))[None], source.path
    if tokenizer is not None:
        try:
            ids = np.resize(np.array(tokenizer.encode(TEXT), dtype=np.int64), length)
            return torch.from_numpy(ids)[None], "a built-in text"
        except MegatronLiteError:  # a tokenizer of numbers, or one without a token for some character
            pass
    numbers = torch.randint(0, vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    return numbers, "random tokens"


def _first_tokens(prefix: str, length: int) -> Any:
    try:
        dataset = IndexedDataset(prefix)
        parts, found = [], 0
        for number in range(dataset.num_documents):
            parts.append(np.asarray(dataset.document(number))[: length - found])
            found += len(parts[-1])
            if found == length:
                break
        return np.concatenate(parts) if parts else None
    except MegatronLiteError:  # moved or replaced since the run: the built-in text does as well
        return None


def run_apart(folder: Path, request: Path) -> None:
    """Run transformers_logits in a process of its own; its memory is returned when it ends.

    Raises:
        CheckpointError: transformers cannot load the folder.
    """
    # transformers copies modeling files into this folder before it executes them; its own cache may not be writable.
    words = ["env", f"HF_MODULES_CACHE={request / 'modules'}"]
    words += [sys.executable, "-m", "megatron_lite.interop.transformers_logits", str(folder), str(request)]
    ended = subprocess.run(words, capture_output=True, encoding="utf-8", errors="replace", check=False)
    if ended.returncode:
        last = ended.stderr.strip().splitlines()[-1:] or [f"exit code {ended.returncode}"]
        if str(request) in last[0]:
            raise CheckpointError(
                f"The comparison with transformers failed, since its files were deleted: {last[0]}",
                fix="Give the same command again, or add --no-verify to skip the comparison",
            )
        raise CheckpointError(
            f"transformers cannot load {folder}: {last[0]}",
            fix="Install a current transformers (pip install -U transformers), or add --no-verify to skip the "
            "comparison",
        )


def verify_logits(
    folder: Path,
    tokens: Tensor,
    text: str,
    expected: Tensor,
    *,
    tokenizer: Tokenizer | None = None,
    tolerance: float = TOLERANCE,
    run: Callable[[Path, Path], None] | None = None,
) -> Verification:
    """Compare the logits of a Hugging Face folder with ours.

    Args:
        folder: the model's.
        tokens: [b, s].
        text: what they are.
        expected: our logits [b, s, vocabulary]; the folder's model may have padding rows beyond them.
        tokenizer: compared with the folder's too; None: the folder has none.
        tolerance: largest difference, as a share of the largest logit (at least 1).
        run: compares; None: in a process of its own.

    Raises:
        CheckpointError: transformers cannot load the folder, or the logits or the tokenizer differ.
    """
    with TemporaryDirectory() as request:
        np.save(Path(request) / "tokens.npy", tokens.numpy())
        np.save(Path(request) / "expected.npy", expected.numpy())
        words = None if tokenizer is None else _tokenized(tokenizer)
        (Path(request) / "text.json").write_text(json.dumps(words), encoding="utf-8")
        (run or run_apart)(folder, Path(request))
        result = json.loads((Path(request) / "result.json").read_text(encoding="utf-8"))
    if result["problem"]:
        raise CheckpointError(
            f"transformers loads the weights in {folder} incompletely: {result['problem']}",
            fix=report_bug("The export was discarded"),
        )
    if not result["largest"] <= tolerance * max(1.0, result["scale"]):  # NaN is not
        raise CheckpointError(
            f"The logits in transformers differ by up to {result['largest']:.3g} from those of megatron_lite, on "
            f"{tokens.numel()} tokens of {text}; allowed are {tolerance * max(1.0, result['scale']):.3g} (--tolerance "
            f"{tolerance:g} x the largest logit, {result['scale']:.3g})",
            fix="If the weights are fp16 or bf16, give a larger --tolerance; otherwise: "
            + report_bug("The conversion was discarded"),
        )
    if result["tokenizer"]:
        raise CheckpointError(
            f"The exported tokenizer gives other tokens in transformers: a test text becomes {result['tokenizer']}",
            fix="Export without the tokenizer (--no-tokenizer), and copy its original files into the folder",
        )
    return Verification(result["largest"], result["scale"], tokens.numel(), text)


def _tokenized(tokenizer: Tokenizer) -> dict[str, Any] | None:
    try:
        return {"text": TEXT, "ids": [int(token) for token in tokenizer.encode(TEXT)]}
    except MegatronLiteError:
        return None
