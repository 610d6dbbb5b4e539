"""CLI command `evaluate`: loss and perplexity of texts and datasets under a trained model."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_lite.cli.model_arguments import add_model_arguments, load_model, note
from megatron_lite.cli.parser import Parser, whole
from megatron_lite.config.text_file import require_text
from megatron_lite.errors import ConfigError, DataError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from megatron_lite.evaluation.perplexity import TextMetrics
    from megatron_lite.generation.restore import TrainedModel
    from megatron_lite.tokenizer.base import Tokenizer

SUMMARY = "loss and perplexity of a text or dataset under a model from a checkpoint"


def run(argv: list[str]) -> int:
    """Evaluate a model on texts and datasets."""
    parser = _parser()
    options = parser.parse_args(argv)
    if not options.text and not options.data_path:
        parser.error("nothing to evaluate: give --text FILE or --data-path PREFIX")

    from megatron_lite.evaluation.perplexity import format_table

    files = [(path, _read(path)) for path in options.text]  # report a wrong path before loading the model
    model = load_model(options)
    seq_length = options.seq_length or model.config.batch.seq_length
    note(f"windows of {seq_length} tokens, {options.stride or seq_length} apart")
    metrics = [_measure(model, item, options, seq_length) for item in list(_inputs(files, options, model))]
    if options.json:
        record = {
            "checkpoint": str(model.path),
            "iteration": model.iteration,
            "seq_length": seq_length,
            "stride": options.stride or seq_length,
            "texts": [one.record() for one in metrics],
        }
        print(json.dumps(record, indent=2))
    else:
        print(format_table(metrics))
    return 0


@dataclass(frozen=True)
class _Input:
    """Evaluation input: token ids, the first of which is context only, and sizes of the text if known."""

    name: str
    ids: NDArray[np.generic]
    num_bytes: int | None = None
    num_words: int | None = None


def _inputs(files: list[tuple[str, str]], options: argparse.Namespace, model: TrainedModel) -> Iterator[_Input]:
    for path, text in files:
        yield _of_text(path, text, model, is_wikitext=options.wikitext, prepend_bos=options.prepend_bos)
    for prefix in options.data_path:
        yield _of_dataset(prefix, model, options.limit)


def _of_text(name: str, text: str, model: TrainedModel, *, is_wikitext: bool, prepend_bos: bool) -> _Input:
    import numpy as np

    from megatron_lite.evaluation import wikitext

    written = wikitext.detokenize(text) if is_wikitext else text
    words = wikitext.num_words(text) if is_wikitext else len(text.split())
    ids = np.asarray([*_context(model.tokenizer, prepend_bos=prepend_bos), *model.tokenizer.encode(written)])
    return _Input(name, ids, len(text.encode()), words)


def _context(tokenizer: Tokenizer, *, prepend_bos: bool) -> list[int]:
    """Return the token before a text: the end of another document, as in training."""
    if prepend_bos:
        return [tokenizer.bos]
    try:
        return [tokenizer.eod]
    except DataError:
        note("the tokenizer has no end-of-document token: the first token of a text is not predicted")
        return []


def _of_dataset(prefix: str, model: TrainedModel, limit: int | None) -> _Input:
    import numpy as np

    from megatron_lite.data.format.indexed_dataset import IndexedDataset
    from megatron_lite.data.format.manifest import check_manifest

    dataset = IndexedDataset(prefix)
    check_manifest(prefix, model.tokenizer.fingerprint())
    wanted = dataset.num_tokens if limit is None else limit + 1
    parts: list[NDArray[np.generic]] = []
    count = 0
    for number in range(dataset.num_documents):
        if count >= wanted:
            break
        parts.append(dataset.document(number)[: wanted - count])
        count += len(parts[-1])
    return _Input(prefix, np.concatenate(parts) if parts else np.empty(0, np.int64))


def _measure(model: TrainedModel, item: _Input, options: argparse.Namespace, seq_length: int) -> TextMetrics:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from megatron_lite.evaluation.perplexity import TextMetrics, text_loss

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TextColumn("tokens"))
    console = Console(stderr=True)
    with Progress(
        *columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(Path(item.name).name, total=len(item.ids) - 1)
        loss = text_loss(
            model.stage,
            item.ids,
            seq_length,
            stride=options.stride or 0,
            batch_size=options.batch_size,
            on_tokens=lambda count: bar.advance(task, count),
        )
    return TextMetrics(item.name, loss, item.num_bytes, item.num_words)


def _read(path: str) -> str:
    text = require_text(path, "--text")
    if not text:
        raise DataError(f"The file --text {path} is empty", fix="Give --text a file with text")
    if Path(path).suffix == ".jsonl":
        raise ConfigError(
            f"Cannot evaluate --text {path}: --text reads plain text, and this file is named as JSON lines",
            fix="Preprocess the file with `megatron-lite preprocess`, and give the dataset with --data-path",
        )
    return text


def _parser() -> Parser:
    parser = Parser(
        prog="megatron-lite evaluate",
        description="Loss and perplexity of texts and datasets under a model from a checkpoint, which also gives its "
        "architecture and tokenizer. Every token is predicted once. bits/byte and word ppl (perplexity per word) are "
        "comparable between tokenizers; loss and perplexity are per token.",
    )
    add_model_arguments(parser)
    texts = parser.add_argument_group("texts")
    texts.add_argument(
        "--text",
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE",
        help="plain UTF-8 text files, one document each",
    )
    texts.add_argument(
        "--data-path",
        nargs="+",
        action="extend",
        default=[],
        metavar="PREFIX",
        help="dataset prefixes, without .bin and .idx",
    )
    texts.add_argument(
        "--prepend-bos",
        action="store_true",
        help="begin each --text with the beginning-of-text token, as the training data (preprocess --prepend-bos)",
    )
    texts.add_argument(
        "--limit", type=whole(1), metavar="N", help="only the first N tokens of each dataset (default: all)"
    )
    texts.add_argument(
        "--wikitext",
        action="store_true",
        help="the files are WikiText: detokenize, and count words and bytes as in publications",
    )
    windows = parser.add_argument_group("windows and output")
    windows.add_argument("--seq-length", type=whole(1), metavar="N", help="tokens per window (default: as in training)")
    windows.add_argument(
        "--stride",
        "--overlapping-eval",
        type=whole(1),
        metavar="N",
        help="distance between starts of windows (default: seq-length, no overlap); a smaller stride gives tokens more "
        "context at higher cost",
    )
    windows.add_argument(
        "--batch-size", type=whole(1, 1_000_000), default=4, metavar="N", help="windows per batch (default: 4)"
    )
    windows.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    return parser
