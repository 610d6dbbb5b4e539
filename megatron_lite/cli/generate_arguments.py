"""Arguments of the command `generate`: model and layout, prompts, output, sampling, length."""

from __future__ import annotations

import argparse

from megatron_lite.cli.model_arguments import add_model_arguments
from megatron_lite.cli.parser import Parser, real, seed, whole


def read_arguments(argv: list[str]) -> argparse.Namespace:
    """Parse the arguments of `megatron-lite generate`; exit with a message if they contradict each other."""
    parser = _parser()
    options = parser.parse_args(argv)
    prompts = {
        "--prompt": options.prompt,
        "--prompt-file": options.prompt_file,
        "--unconditional": options.unconditional,
        "--input": options.input,
    }
    given = [flag for flag, value in prompts.items() if value]
    if options.input and len(given) > 1:
        parser.error(f"--input gives all prompts: remove {given[0]}")
    if options.interactive and (given or options.output):
        parser.error(
            f"--interactive reads prompts from the keyboard and prints texts: remove {[*given, '--output'][0]}"
        )
    if options.resume and options.output in (None, "-"):
        parser.error("--resume continues a file: add --output FILE")
    if options.greedy and options.temperature:
        parser.error(
            f"--greedy is --temperature 0, and --temperature is {options.temperature:g}: remove one of the two"
        )
    if options.temperature is None:
        options.temperature = 0.0 if options.greedy else 1.0
    if not options.temperature and options.best_of > 1 and not options.input:
        parser.error(
            f"--best-of {options.best_of} selects from different texts, and greedy decoding generates the same text "
            "each time: remove --best-of, or --greedy or --temperature 0"
        )
    return options


def _parser() -> Parser:
    parser = Parser(
        prog="megatron-lite generate",
        description="Continue prompts with a model from a checkpoint, which also gives its architecture and tokenizer. "
        "Without prompts, piped text is one prompt, and a terminal starts a session (--interactive).",
    )
    add_model_arguments(parser)
    _add_layout(parser)
    _add_prompts(parser)
    _add_output(parser)
    _add_sampling(parser)
    _add_length(parser)
    return parser


def _add_layout(parser: Parser) -> None:
    layout = parser.add_argument_group("layout")
    for name, dest, text in (
        ("--tensor-model-parallel-size", "tensor_parallel", "ranks that share each layer"),
        ("--pipeline-model-parallel-size", "pipeline_parallel", "pipeline stages"),
    ):
        layout.add_argument(name, dest=dest, type=whole(1, 10**6), default=1, metavar="N", help=f"{text} (default: 1)")


def _add_prompts(parser: Parser) -> None:
    prompts = parser.add_argument_group("prompts")
    prompts.add_argument("--prompt", action="append", metavar="TEXT", help="text to continue; may be repeated")
    prompts.add_argument("--prompt-file", metavar="FILE", help="a file with one prompt on each line")
    prompts.add_argument(
        "--input",
        metavar="FILE",
        help='JSON lines {"prompt": …, "id": …} with settings of their own; -: standard input',
    )
    prompts.add_argument("--unconditional", action="store_true", help="a text without prompt, as a document begins")
    prompts.add_argument(
        "--interactive", action="store_true", help="a session: Ctrl-C ends a text, Ctrl-D ends the session"
    )
    prompts.add_argument(
        "--num-samples", type=whole(1, 1_000_000), default=1, metavar="N", help="continuations of each prompt"
    )
    prompts.add_argument(
        "--prepend-bos",
        action="store_true",
        help="begin each prompt with the beginning-of-text token, as the training data (preprocess --prepend-bos)",
    )


def _add_output(parser: Parser) -> None:
    output = parser.add_argument_group("output")
    output.add_argument(
        "--output",
        metavar="FILE",
        help="write JSON lines instead of text, in the order of the prompts; -: standard output",
    )
    output.add_argument(
        "--resume", action="store_true", help="continue --output, which an interrupted command has begun"
    )
    output.add_argument("--log-probs", action="store_true", help="print or write the log-probability of each new token")
    output.add_argument(
        "--batch-size", type=whole(1, 1_000_000), default=32, metavar="N", help="texts at once (default: %(default)s)"
    )


def _add_sampling(parser: Parser) -> None:
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--temperature", type=real(0.0, 1e6), help="0: greedy; default: 1.0")
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
    sampling.add_argument(
        "--min-p",
        type=real(0.0, 1.0),
        default=0.0,
        metavar="P",
        help="sample from tokens with at least P times the probability of the likeliest; 0: all (default)",
    )
    sampling.add_argument(
        "--repetition-penalty",
        type=real(0.0, 1e6, above=True),
        default=1.0,
        metavar="X",
        help="divide the positive logits of tokens that the text contains by X, multiply the negative ones; 1: none "
        "(default)",
    )
    sampling.add_argument("--greedy", action="store_true", help="always choose the likeliest token")
    sampling.add_argument(
        "--best-of",
        type=whole(0, 1_000_000),
        default=0,
        metavar="N",
        help="generate N texts for each prompt and keep the --num-samples likeliest, by log-probability per token",
    )
    sampling.add_argument(
        "--seed", type=seed, default=1234, help="the same seed gives the same text; default: %(default)s"
    )


def _add_length(parser: Parser) -> None:
    length = parser.add_argument_group("length")
    length.add_argument(
        "--max-new-tokens",
        type=whole(1, 1_000_000_000),
        metavar="N",
        help="default: 128, or fewer if the context leaves fewer",
    )
    length.add_argument(
        "--stop", action="append", metavar="TEXT", help="end a text before this string; may be repeated"
    )
    length.add_argument(
        "--context",
        type=whole(1, 10**9),
        default=0,
        metavar="N",
        help="maximum tokens of prompt and text (default: that of the training); more extrapolates rotary and ALiBi",
    )
    length.add_argument(
        "--sliding-window",
        type=whole(1, 10**9),
        nargs="?",
        const=0,
        metavar="N",
        help="continue texts past the context: drop the N oldest tokens whenever it is full (default: half)",
    )
