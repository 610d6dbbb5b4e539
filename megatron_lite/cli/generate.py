"""CLI command `generate`: text generation from a checkpoint, from prompts, JSON lines or a terminal."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

from megatron_lite.backend.environment import Launch, read_launch
from megatron_lite.backend.task_ranks import end_with_parent, start_ranks
from megatron_lite.cli.generate_arguments import read_arguments
from megatron_lite.cli.model_arguments import note
from megatron_lite.cli.tokenizer_arguments import tokenizer_fields
from megatron_lite.config.text_file import TextFileError, decode_text, require_text, text_lines
from megatron_lite.errors import ConfigError, DataError
from megatron_lite.formatting import format_count

if TYPE_CHECKING:
    from megatron_lite.cli.generation_stop import StopFlag
    from megatron_lite.generation.prompts import Prompt, Settings
    from megatron_lite.generation.restore import TrainedModel
    from megatron_lite.generation.results import Result
    from megatron_lite.generation.texts import TextGenerator
    from megatron_lite.tokenizer.base import Tokenizer

SUMMARY = "continue prompts with a model from a checkpoint"
SEVERAL_RANKS = True
"""A rank of several that fails before the rendezvous reports its error to the others (see cli/main.py)."""
IDLE_MINUTES = 10.0**6
"""Timeout of collectives in a session, whose ranks wait for what the user types."""


def run(argv: list[str]) -> int:
    """Continue the given prompts, or start a session."""
    options = read_arguments(argv)
    launch, count = read_launch(), options.tensor_parallel * options.pipeline_parallel
    if launch.world_size == 1 and count > 1 and launch.launcher in ("python", "slurm"):
        return start_ranks([sys.executable, "-m", "megatron_lite", "generate", *argv], launch, count)
    if launch.launcher == "task":
        end_with_parent()
    if launch.world_size != count:
        raise ConfigError(
            f"{launch.launcher} started {format_count(launch.world_size, 'rank')}, but --tensor-model-parallel-size "
            f"{options.tensor_parallel} and --pipeline-model-parallel-size {options.pipeline_parallel} describe "
            f"{format_count(count, 'rank')}",
            fix=f"Start {format_count(count, 'rank')}, or give sizes whose product is {launch.world_size}",
        )
    return _run_rank(options, launch)


def _run_rank(options: argparse.Namespace, launch: Launch) -> int:
    from megatron_lite.cli.generate_session import run_session
    from megatron_lite.config.parallel import ParallelConfig
    from megatron_lite.config.runtime import RuntimeConfig
    from megatron_lite.generation.prompts import Settings
    from megatron_lite.generation.restore import restore_model
    from megatron_lite.generation.sampling import Sampling
    from megatron_lite.train.assemble import machine

    sampling = Sampling(
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        repetition_penalty=options.repetition_penalty,
    )
    defaults = Settings(
        sampling=sampling,
        max_new_tokens=options.max_new_tokens,
        seed=options.seed,
        stop=tuple(options.stop or ()),
        num_samples=options.num_samples,
        best_of=options.best_of,
    )
    # Unreadable prompts are reported before the ranks meet. Rank 0 reads: standard input has one reader.
    prompts = _read_prompts(options, defaults) if launch.rank == 0 else []
    parallel = ParallelConfig(
        world_size=launch.world_size,
        tp=options.tensor_parallel,
        pp=options.pipeline_parallel,
        distributed_timeout_minutes=IDLE_MINUTES,
    )
    runtime = RuntimeConfig(device=options.device, seed=options.seed)
    broken: BrokenPipeError | None = None
    interrupted = False
    with machine(runtime, parallel) as backend:
        model = restore_model(
            options.load,
            options.load_iteration,
            runtime,
            parallel=parallel,
            backend=backend,
            tokenizer=tokenizer_fields(options),
            averaged=options.ema,
            notify=note,
        )
        if launch.rank == 0:
            on = format_count(launch.world_size, "rank") if launch.world_size > 1 else str(backend.device)
            what = "the moving average of the weights of " if options.ema else ""
            note(f"loaded {what}{model.path} (iteration {model.iteration}) on {on}")
        prompts = model.mesh.world.all_gather_object(prompts)[0]
        generator = _generator(model, options)
        try:
            if prompts is None:
                run_session(generator, defaults, options.log_probs)
            else:
                interrupted = write_texts(generator, prompts, options)
        except BrokenPipeError as error:
            broken = error
    # Not raised above: neither is a failure of this rank.
    if broken is not None:
        raise broken
    if interrupted:
        raise KeyboardInterrupt
    return 0


def _generator(model: TrainedModel, options: argparse.Namespace) -> TextGenerator:
    from megatron_lite.generation.texts import TextGenerator, context_of, end_of_document

    eod = end_of_document(model.tokenizer)
    if eod is None and model.mesh.world.rank == 0:
        note("the tokenizer has no end-of-document token: texts end at --max-new-tokens")
    context = context_of(model, options.context, options.sliding_window)
    prefix = [model.tokenizer.bos] if options.prepend_bos else []
    return TextGenerator(model, context, options.batch_size, eod, prefix)


def write_texts(generator: TextGenerator, prompts: list[Prompt], options: argparse.Namespace) -> bool:
    """Generate the texts of all prompts and write them as text, or as JSON lines with --output.

    Returns:
        True if Ctrl-C ended the texts of several ranks; complete prompts have been written to --output.

    Raises:
        KeyboardInterrupt: Ctrl-C on a single rank; complete prompts have been written to --output.
        MegatronLiteError: see TextGenerator.generate and ResultFile.
    """
    from megatron_lite.cli.generation_stop import StopFlag
    from megatron_lite.generation.results import ResultFile
    from megatron_lite.generation.texts import in_order

    world, path = generator.model.mesh.world, generator.model.path
    stop = StopFlag(world, generator.model.mesh.backend.device)
    if not options.output:
        with stop.on_ctrl_c() if world.size > 1 else nullcontext():
            print_texts(generator, prompts, stop, log_probs=options.log_probs)
        stop.end()
        return stop.requested
    from megatron_lite.backend.agreement import broadcast_from_rank0

    files: list[ResultFile] = []

    def open_file() -> int:
        file = ResultFile(options.output, prompts, path, resume=options.resume, log_probs=options.log_probs)
        files.append(file)
        return file.done

    done = broadcast_from_rank0(world, open_file)
    if done and world.rank == 0:
        note(f"{done:,} of {format_count(len(prompts), 'prompt')} are complete in {options.output}")
    try:
        with stop.on_ctrl_c() if world.size > 1 else nullcontext():
            for results in in_order(generator.generate(prompts[done:], interrupted=stop)):
                if any(result.generated.reason == "interrupted" for result in results):
                    break
                stop.guard(lambda results=results: files[0].add(results))  # type: ignore[misc]
        stop.end()
        return stop.requested
    finally:
        for file in files:
            file.close()
            if file.done < len(prompts) and options.output != "-":
                note(
                    f"{file.done:,} of {format_count(len(prompts), 'prompt')} are complete in {options.output}; the "
                    "same command with --resume continues"
                )


def print_texts(generator: TextGenerator, prompts: Sequence[Prompt], stop: StopFlag, *, log_probs: bool) -> None:
    """Print the texts of prompts on rank 0: a single text while it is generated, others under a heading each."""
    from megatron_lite.generation.texts import in_order

    live = len(prompts) == 1 and prompts[0].settings.num_generated == 1

    def show(text: str) -> None:
        if live:
            stop.guard(lambda: print(text, end="", flush=True))

    def show_all(number: int, results: list[Result]) -> None:
        for result in results:
            if live:
                print()
            else:
                heading = f"--- prompt {number + 1}, sample {result.sample + 1} ---"
                print(f"{heading}\n{prompts[number].text}{result.text}", flush=True)
            if log_probs:
                print(_log_prob_lines(result, generator.model.tokenizer), flush=True)

    texts = in_order(generator.generate(prompts, on_piece=show, interrupted=stop))
    show(prompts[0].text if live else "")
    for number, results in enumerate(texts):
        stop.guard(lambda number=number, results=results: show_all(number, results))  # type: ignore[misc]


def _log_prob_lines(result: Result, tokenizer: Tokenizer) -> str:
    """Return a line for each token, end-of-document included, and their sum."""
    generated = result.generated
    lines = [
        f"{log_prob:10.4f}  {tokenizer.decode([token])!r}"
        for token, log_prob in zip(generated.tokens, generated.log_probs, strict=True)
    ]
    if generated.eod_log_prob is not None:
        lines.append(f"{generated.eod_log_prob:10.4f}  end of document")
    return "\n".join([*lines, f"{generated.log_prob:10.4f}  in all"])


def _read_prompts(options: argparse.Namespace, defaults: Settings) -> list[Prompt] | None:
    """Return the prompts of the command line, of files or of a pipe; None: start a session."""
    from megatron_lite.generation.prompts import Prompt, parse_prompts
    from megatron_lite.generation.results import refuse_existing

    if options.output:
        refuse_existing(options.output, options.resume)
    if options.interactive:
        return None
    if options.input is not None:
        source = "standard input" if options.input == "-" else f"--input {options.input}"
        text = _read_stdin() if options.input == "-" else require_text(options.input, "--input")
        return parse_prompts(text, source, defaults)
    texts = [*(options.prompt or []), *([""] if options.unconditional else [])]
    if options.prompt_file is not None:
        texts += text_lines(require_text(options.prompt_file, "--prompt-file"))
    elif not texts:
        if sys.stdin.isatty():
            return None
        texts.append(_read_stdin().removesuffix("\n"))
    return [
        Prompt(text=text, settings=defaults, name=f"Prompt {number} of {len(texts)}", id=number)
        for number, text in enumerate(texts, 1)
    ]


def _read_stdin() -> str:
    """Return the text on standard input."""
    try:
        if (raw := getattr(sys.stdin, "buffer", None)) is not None:
            return decode_text(raw.read())
        return sys.stdin.read()
    except TextFileError as error:
        raise DataError(
            f"Cannot read the prompt: standard input {error}",
            fix="Convert the text, if it is latin1: `iconv -f latin1 -t UTF-8 FILE | megatron-lite generate …`",
        ) from error
