"""Prompt session of `generate`: reads prompts from the keyboard, with line editing, until Ctrl-D."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import TYPE_CHECKING

from megatron_lite.cli.generate import print_texts
from megatron_lite.cli.generation_stop import StopFlag
from megatron_lite.cli.model_arguments import note
from megatron_lite.config.values import is_utf8
from megatron_lite.errors import ConfigError
from megatron_lite.generation.prompts import Prompt, Settings
from megatron_lite.generation.texts import TextGenerator

if TYPE_CHECKING:
    from collections.abc import Iterator


def run_session(generator: TextGenerator, settings: Settings, log_probs: bool) -> None:
    """Continue one prompt after the other; a prompt that the model cannot continue does not end the session.

    Args:
        generator: of the texts.
        settings: of all prompts.
        log_probs: print the log-probability of each token.
    """
    mesh = generator.model.mesh
    stop = StopFlag(mesh.world, mesh.backend.device)
    if mesh.world.rank == 0:
        note("type a prompt and press return; Ctrl-C ends a text, Ctrl-D the session")
        with suppress(ImportError):
            import readline  # noqa: F401  (input() then has line editing and a history)
    with stop.on_ctrl_c():
        for number, text in enumerate(_prompts(stop, generator), 1):
            prompt = Prompt(text=text, settings=settings, name="The prompt", id=number)
            try:
                print_texts(generator, [prompt], stop, log_probs=log_probs)
            except ConfigError as error:
                if mesh.world.rank == 0:
                    note(str(error))
            stop.end()


def _prompts(stop: StopFlag, generator: TextGenerator) -> Iterator[str]:
    """Yield the prompts that the user types at rank 0; a collective call on all ranks."""
    world = generator.model.mesh.world
    while True:
        text: str | None = world.all_gather_object(_read(stop) if world.rank == 0 else None)[0]
        if text is None:
            return
        yield text


def _read(stop: StopFlag) -> str | None:
    """Return the next prompt; None: the end of the input. Ctrl-C discards what is typed."""
    typed = sys.stdin.isatty()
    while True:
        try:
            with stop.reading():
                text = input("> " if typed else "")
        except EOFError:
            if typed:
                print()
            return None
        except KeyboardInterrupt:
            print()
            continue
        except UnicodeDecodeError as error:
            note(f"not UTF-8: {error}")
            continue
        if not is_utf8(text):
            note("not UTF-8 text")
        elif text:
            return text
