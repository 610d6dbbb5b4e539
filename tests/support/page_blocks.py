"""Fenced shell blocks of a Markdown page, and its test directives.

An HTML comment before a block prepares the folder in which the page's commands run, one directive a line:

    <!-- test:
    corpus corpus.jsonl             makes toy files (support/toy_files.py: MAKERS)
    replace iter_0090000 iter_0000004   in the next block
    file tasks/my_task.yaml         the next block is written to this file
    -->
"""

import re
import shlex
from dataclasses import dataclass, field

SHELL = ("sh", "bash")
_PIECE = re.compile(
    r"^ *<!-- test:(?P<directives>.*?)-->$"
    r"|^(?P<indent> *)```(?P<language>[\w-]*)\n(?P<text>.*?)^ *```$",
    re.DOTALL | re.MULTILINE,
)


@dataclass
class Block:
    """A fenced block.

    Attributes:
        line: number of its first line in the page.
        language: after the three backticks.
        text: the content, without common indentation.
        made: directives that make files: (kind, paths).
        file: path to write the content to, instead of running it.
    """

    line: int
    language: str
    text: str
    made: list[tuple[str, list[str]]] = field(default_factory=list)
    file: str = ""


def read_blocks(page):
    """Return the blocks of a page that are run or written to a file.

    Raises:
        ValueError: a command stands in a block without language, or a directive stands before no block.
    """
    blocks, waiting = [], []
    for piece in _PIECE.finditer(page):
        if piece["directives"] is not None:
            waiting += [words for line in piece["directives"].splitlines() if (words := shlex.split(line))]
            continue
        line = page[: piece.start("text")].count("\n") + 1
        text = re.sub(f"^{piece['indent']}", "", piece["text"], flags=re.MULTILINE)
        block = Block(line, piece["language"], text)
        if not block.language:
            raise ValueError(f"line {line}: name the language of the block: ```sh for commands, ```text for output")
        for kind, *arguments in waiting:
            if kind == "file":
                (block.file,) = arguments
            elif kind == "replace":
                block.text = block.text.replace(*arguments)
            else:
                block.made.append((kind, arguments))
        if block.language in SHELL or waiting:
            blocks.append(block)
        waiting = []
    if waiting:
        raise ValueError(f"no block follows the test directives {waiting}")
    return blocks
