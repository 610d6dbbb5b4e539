"""Every error's fix is a way out: not "Correct X", which says only that X is wrong."""

import ast
import re
from pathlib import Path

import megatron_lite

PACKAGE = Path(megatron_lite.__file__).parent
EMPTY = re.compile(
    r"\b[Cc]orrect\b"
    r"|^(Check|Change|Rename|Give|Leave|Name|Fix|Repair|Adjust|Copy) "
    r"(it|its \w+|them|both|one|one of them|one of these|more|the [\w']+|a name|the file again)\.?$"
)
"""Texts that name no form, value, choice or command."""
ALLOWED = {"Leave one of them out"}
"""Two flags contradict each other: the error has named both."""


def fixes():
    """(place, text) of every fix; what an f-string fills in reads {}."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.keyword) and node.arg == "fix":
                for part in ast.walk(node.value):
                    if isinstance(part, ast.JoinedStr):
                        yield (
                            f"{path.name}:{part.lineno}",
                            "".join(piece.value if isinstance(piece, ast.Constant) else "{}" for piece in part.values),
                        )
                    elif isinstance(part, ast.Constant) and isinstance(part.value, str):
                        yield f"{path.name}:{part.lineno}", part.value


def test_no_fix_is_empty_advice():
    assert len(list(fixes())) > 200
    assert not [f"{place}: {text}" for place, text in fixes() if EMPTY.search(text.strip()) and text not in ALLOWED]
