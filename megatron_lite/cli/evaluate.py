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
    """Evaluate the model that `argv` names on its texts."""
    parser = _parser()
    options = parser.parse_args(argv)
    if not options.text and not options.data_path:
        parser.error("nothing to evaluate: give --text FILE or --data-path PREFIX")

    from megatron_lite.evaluation.perplexity import format_table

    files = [(path, _read(path)) for path in options.text]  # a wrong name is reported before the model is loaded
    model = load_model(options)
    seq_length = options.seq_length or model.config.batch.seq_length
    note(f"windows of {seq_length} tokens, {options.stride or seq_length} apart")
    figures = [_measured(model, work, options, seq_length) for work in list(_works(files, options, model))]
    if options.json:
        record = {
            "checkpoint": str(model.path),
            "iteration": model.iteration,
            "seq_length": seq_length,
            "stride": options.stride or seq_length,
            "texts": [one.record() for one in figures],
        }
        print(json.dumps(record, indent=2))
    else:
        print(format_table(figures))
    return 0


@dataclass(frozen=True)
class _Work:
    """What is to be evaluated: ids, the first of which is only context, and the text's sizes where they are known."""

    name: str
    ids: NDArray[np.generic]
    num_bytes: int | None = None
    num_words: int | None = None


def _works(files: list[tuple[str, str]], options: argparse.Namespace, model: TrainedModel) -> Iterator[_Work]:
    for path, text in files:
        yield _of_text(path, text, model, is_wikitext=options.wikitext, prepend_bos=options.prepend_bos)
    for prefix in options.data_path:
        yield _of_dataset(prefix, model, options.limit)


def _of_text(name: str, text: str, model: TrainedModel, *, is_wikitext: bool, prepend_bos: bool) -> _Work:
    import numpy as np

    from megatron_lite.evaluation import wikitext

    written = wikitext.detokenize(text) if is_wikitext else text
    words = wikitext.num_words(text) if is_wikitext else len(text.split())
    ids = np.asarray([*_context(model.tokenizer, prepend_bos=prepend_bos), *model.tokenizer.encode(written)])
    return _Work(name, ids, len(text.encode()), words)


def _context(tokenizer: Tokenizer, *, prepend_bos: bool) -> list[int]:
    """The token before a text, as in training: a document begins behind the end of another."""
    if prepend_bos:
        return [tokenizer.bos]
    try:
        return [tokenizer.eod]
    except DataError:
        note("the tokenizer has no end-of-document token: the first token of a text is not predicted")
        return []


def _of_dataset(prefix: str, model: TrainedModel, limit: int | None) -> _Work:
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
    return _Work(prefix, np.concatenate(parts) if parts else np.empty(0, np.int64))


def _measured(model: TrainedModel, work: _Work, options: argparse.Namespace, seq_length: int) -> TextMetrics:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from megatron_lite.evaluation.perplexity import TextMetrics, text_loss

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TextColumn("tokens"))
    console = Console(stderr=True)
    with Progress(
        *columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(Path(work.name).name, total=len(work.ids) - 1)
        loss = text_loss(
            model.stage,
            work.ids,
            seq_length,
            stride=options.stride or 0,
            batch_size=options.batch_size,
            on_tokens=lambda count: bar.advance(task, count),
        )
    return TextMetrics(work.name, loss, work.num_bytes, work.num_words)


def _read(path: str) -> str:
    text = require_text(path, "--text")
    if not text:
        raise DataError("--text must name files with text in them", found=f"{path} is empty", fix="Give another file")
    if Path(path).suffix == ".jsonl":
        raise ConfigError(
            "--text takes plain text",
            found=f"{path}, whose text is wrapped in JSON",
            fix="Make a dataset of it with `megatron-lite preprocess`, and give that with --data-path",
        )
    return text


def _parser() -> Parser:
    parser = Parser(
        prog="megatron-lite evaluate",
        description="Loss and perplexity of texts and datasets under a model from a checkpoint, every token predicted "
        "once. The model's shape and tokenizer are read from there. bits/byte and word ppl (perplexity per word) "
        "compare models of different tokenizers; loss and perplexity are per token.",
    )
    add_model_arguments(parser)
    texts = parser.add_argument_group("texts")
    texts.add_argument(
        "--text",
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE",
        help="plain UTF-8 text, each file one document",
    )
    texts.add_argument(
        "--data-path",
        nargs="+",
        action="extend",
        default=[],
        metavar="PREFIX",
        help="datasets, without .bin and .idx: all their tokens",
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
        help="the files are WikiText: put its words together, and count them and the bytes as published",
    )
    how = parser.add_argument_group("how")
    how.add_argument(
        "--seq-length", type=whole(1), metavar="N", help="tokens that the model sees at once (default: as in training)"
    )
    how.add_argument(
        "--stride",
        "--overlapping-eval",
        type=whole(1),
        metavar="N",
        help="how far apart windows start (default: seq-length, so that none overlap); less gives each token more "
        "context, for more work",
    )
    how.add_argument(
        "--batch-size", type=whole(1, 1_000_000), default=4, metavar="N", help="windows at once (default: 4)"
    )
    how.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    return parser
