"""Arguments of the command `evaluate`."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_lite.cli.model_arguments import add_model_arguments
from megatron_lite.cli.parser import Parser, whole

CORPORA = ("text", "wikitext", "ptb", "enwik8", "text8")
INPUTS = (*CORPORA, "lambada", "documents", "data_path", "tasks")
"""Options that name something to evaluate."""
_APPLIES_TO = {
    "stride": (*CORPORA, "documents", "data_path"),
    "prepend_bos": (*CORPORA, "lambada", "documents", "tasks"),
    "limit": ("lambada", "documents", "data_path", "tasks"),
    "num_fewshot": ("tasks",),
    "include_path": ("tasks",),
}
"""Inputs on which an option has an effect; the other options apply to all."""
_FILES = {
    "text": "plain UTF-8 text files, one document each",
    "wikitext": "WikiText-2 or 103 (wiki.test.raw): detokenized; perplexity per word of the file, as published",
    "ptb": "Penn Treebank (ptb.test.txt): detokenized; perplexity per word of the file",
    "enwik8": "bits per character; of the whole file the last 5,000,000 bytes, the test split",
    "text8": "the same for text8",
    "lambada": "LAMBADA: accuracy and perplexity of the last word; OpenAI's JSON lines or the original plain text",
    "documents": 'JSON lines with "text", scored one by one: bits per byte, also of each meta.pile_set_name',
}


def evaluate_parser() -> Parser:
    """Return the parser of `megatron-lite evaluate`."""
    parser = Parser(
        prog="megatron-lite evaluate",
        description="Evaluate checkpoints on texts, published corpora and tasks of lm-evaluation-harness. The "
        "checkpoint gives architecture and tokenizer. Results are printed and recorded in evaluations.jsonl of the "
        "run. Everything is read from files of this machine. torchrun, srun or --ranks-per-task start several ranks.",
    )
    add_model_arguments(parser)
    checkpoints = parser.add_argument_group("checkpoints of a run")
    checkpoints.add_argument(
        "--all-checkpoints",
        action="store_true",
        help="evaluate every checkpoint of --load; those that are recorded are not evaluated again",
    )
    checkpoints.add_argument("--again", action="store_true", help="evaluate recorded checkpoints again")
    checkpoints.add_argument("--svg", type=Path, metavar="DIR", help="write a curve of each metric to this folder")
    texts = parser.add_argument_group("texts")
    for name, text in _FILES.items():
        texts.add_argument(f"--{name}", nargs="+", action="extend", default=[], metavar="FILE", help=text)
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
        help="begin each text with the beginning-of-text token, as the training data (preprocess --prepend-bos)",
    )
    texts.add_argument(
        "--limit",
        type=whole(1),
        metavar="N",
        help="only the first N tokens of a dataset, passages, documents, or samples of a task (default: all)",
    )
    tasks = parser.add_argument_group("lm-evaluation-harness")
    tasks.add_argument(
        "--tasks",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME",
        help="tasks, separated by spaces or commas, such as lambada_openai,piqa,hellaswag",
    )
    tasks.add_argument(
        "--include-path", action="append", default=[], metavar="DIR", help="folder with YAML files of own tasks"
    )
    tasks.add_argument("--num-fewshot", type=whole(), metavar="N", help="examples in the prompt (default: the task's)")
    windows = parser.add_argument_group("windows and output")
    windows.add_argument(
        "--seq-length",
        type=whole(1),
        nargs="+",
        default=[],
        metavar="N",
        help="tokens per window (default: as in training); several: each of them",
    )
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
    ranks = parser.add_argument_group("several ranks")
    ranks.add_argument("--tensor-model-parallel-size", type=whole(1, 4096), default=1, metavar="N", help="default: 1")
    ranks.add_argument("--pipeline-model-parallel-size", type=whole(1, 4096), default=1, metavar="N", help="default: 1")
    ranks.add_argument(
        "--ranks-per-task",
        type=whole(1, 4096),
        default=1,
        metavar="N",
        help="start N ranks on this machine, or in each task of srun; those beyond the two sizes share the work",
    )
    return parser


def flags_without_effect(options: argparse.Namespace) -> dict[str, list[str]]:
    """Return the given flags that do not apply to all given inputs, each with the flags of the other inputs."""
    inputs = [name for name in INPUTS if getattr(options, name)]
    found = {
        _flag(name): [_flag(one) for one in inputs if one not in applies]
        for name, applies in _APPLIES_TO.items()
        if getattr(options, name) not in (None, []) and getattr(options, name) is not False
    }
    return {flag: others for flag, others in found.items() if others}


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
