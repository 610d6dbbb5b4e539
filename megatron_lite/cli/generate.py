"""CLI command `generate`: text generation from a checkpoint."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from megatron_lite.cli.model_arguments import add_model_arguments, load_model, note
from megatron_lite.cli.parser import Parser, real, seed, whole
from megatron_lite.config.model import ModelConfig
from megatron_lite.config.text_file import TextFileError, decode_text, require_text, text_lines
from megatron_lite.config.values import is_utf8
from megatron_lite.errors import ConfigError, DataError

if TYPE_CHECKING:
    from megatron_lite.generation.restore import TrainedModel
    from megatron_lite.generation.sampling import Sampling
    from megatron_lite.tokenizer.base import Tokenizer

SUMMARY = "continue prompts with a model from a checkpoint"
MAX_NEW_TOKENS = 128
ROWS_AT_ONCE = 32
"""Rows (prompts times samples) per batch."""


def run(argv: list[str]) -> int:
    """Continue the given prompts, or start a prompt session."""
    options = _parser().parse_args(argv)
    prompts = _read_prompts(options)  # report an unreadable file before loading the model

    from megatron_lite.generation.sampling import Sampling

    sampling = Sampling(
        temperature=0.0 if options.greedy else options.temperature, top_k=options.top_k, top_p=options.top_p
    )
    model = load_model(options, options.seed)
    if prompts:
        _continue(model, prompts, options, sampling)
    else:
        _run_session(model, options, sampling)
    return 0


def _run_session(model: TrainedModel, options: argparse.Namespace, sampling: Sampling) -> None:
    """Read prompts until an empty one; a prompt that the model cannot continue does not end the session."""
    note("type a prompt and press return; an empty one or Ctrl-D ends")
    while prompt := _read_prompt():
        _continue_or_report(model, prompt, options, sampling)


def _continue_or_report(model: TrainedModel, prompt: str, options: argparse.Namespace, sampling: Sampling) -> None:
    try:
        _continue(model, [prompt], options, sampling)
    except ConfigError as error:
        note(str(error))


def _read_prompt() -> str:
    while True:
        try:
            prompt = input("> ")
        except EOFError:
            return ""
        except UnicodeDecodeError as error:
            note(f"not UTF-8: {error}")
            continue
        if is_utf8(prompt):
            return prompt
        note("not UTF-8 text")


def _parser() -> Parser:
    parser = Parser(
        prog="megatron-lite generate",
        description="Continue prompts with a model from a checkpoint, which also gives its architecture and tokenizer. "
        "Without --prompt, piped text is one prompt, and a terminal starts a prompt session.",
    )
    add_model_arguments(parser)
    prompts = parser.add_argument_group("prompts")
    prompts.add_argument("--prompt", action="append", metavar="TEXT", help="text to continue; may be repeated")
    prompts.add_argument("--prompt-file", metavar="FILE", help="a file with one prompt on each line")
    prompts.add_argument(
        "--num-samples", type=whole(1, 1_000_000), default=1, metavar="N", help="continuations of each prompt"
    )
    prompts.add_argument(
        "--prepend-bos",
        action="store_true",
        help="begin each prompt with the beginning-of-text token, as the training data (preprocess --prepend-bos)",
    )
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument(
        "--max-new-tokens",
        type=whole(1, 1_000_000_000),
        metavar="N",
        help="default: 128, or fewer if the model has fewer positions",
    )
    sampling.add_argument("--temperature", type=real(0.0, 1e6), default=1.0, help="0: greedy; default: %(default)s")
    sampling.add_argument(
        "--top-k", type=whole(), default=0, metavar="K", help="sample from the K likeliest tokens; 0: all (default)"
    )
    sampling.add_argument(
        "--top-p",
        type=real(0.0, 1.0, above=True),
        default=1.0,
        metavar="P",
        help="sample from the likeliest tokens with total probability P",
    )
    sampling.add_argument("--greedy", action="store_true", help="always choose the likeliest token")
    sampling.add_argument(
        "--seed", type=seed, default=1234, help="the same seed gives the same text; default: %(default)s"
    )
    return parser


def _read_prompts(options: argparse.Namespace) -> list[str]:
    """Return the prompts of the command line or of a pipe; empty: start a prompt session."""
    given = list(options.prompt or [])
    if options.prompt_file is not None:
        given += text_lines(require_text(options.prompt_file, "--prompt-file"))
    elif not given and not sys.stdin.isatty():
        given.append(_read_stdin().removesuffix("\n"))
    return given


def _read_stdin() -> str:
    """Return the text on standard input."""
    try:
        if (raw := getattr(sys.stdin, "buffer", None)) is not None:
            return decode_text(raw.read())
        return sys.stdin.read()
    except TextFileError as error:
        raise DataError(f"Cannot read the prompt: standard input {error}", fix=error.fix) from error


def _end_of_document(tokenizer: Tokenizer) -> int | None:
    """Return the id of the end-of-document token; None if the tokenizer has none."""
    try:
        return tokenizer.eod
    except DataError:
        note("the tokenizer has no end-of-document token: texts end at --max-new-tokens")
        return None


def _default_new_tokens(prompt: int, model: ModelConfig) -> int:
    """Return the default of --max-new-tokens: 128 or the remaining positions, at least 1."""
    left = model.max_position_embeddings - prompt if model.position_embedding == "learned" else MAX_NEW_TOKENS
    return max(1, min(MAX_NEW_TOKENS, left))


def _continue(model: TrainedModel, prompts: list[str], options: argparse.Namespace, sampling: Sampling) -> None:
    from megatron_lite.generation.generate import check_prompts, generate
    from megatron_lite.generation.stream import TextStream

    eod = _end_of_document(model.tokenizer)
    bos = [model.tokenizer.bos] if options.prepend_bos else []
    # An empty prompt starts after the end-of-document token, as documents do in training.
    empty = bos or ([] if eod is None else [eod])
    ids = [[*bos, *encoded] if (encoded := model.tokenizer.encode(prompt)) else empty for prompt in prompts]
    max_new_tokens = options.max_new_tokens
    if max_new_tokens is None:
        max_new_tokens = _default_new_tokens(max(map(len, ids)), model.config.model)
    check_prompts(ids, max_new_tokens, model.config.model)
    rows = [(number, sample) for number in range(len(prompts)) for sample in range(options.num_samples)]
    streams = [TextStream(model.tokenizer, ids[number]) for number, _ in rows]
    texts = [""] * len(rows)
    live = len(rows) == 1

    def emit(row: int, piece: str) -> None:
        texts[row] += piece
        if live:
            print(piece, end="", flush=True)

    if live:
        print(prompts[0], end="", flush=True)
    for start in range(0, len(rows), ROWS_AT_ONCE):
        part = rows[start : start + ROWS_AT_ONCE]

        def on_token(row: int, token: int, start: int = start) -> None:
            emit(start + row, streams[start + row].push(token))

        generate(
            model.stage,
            [ids[number] for number, _ in part],
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            # By sample number: the text of a prompt does not depend on the other prompts.
            seeds=[options.seed + sample for _, sample in part],
            eod=eod,
            on_token=on_token,
        )
    for row, stream in enumerate(streams):
        emit(row, stream.flush())
    if live:
        print()
        return
    for (number, sample), text in zip(rows, texts, strict=True):
        print(f"--- prompt {number + 1}, sample {sample + 1} ---\n{prompts[number]}{text}")
