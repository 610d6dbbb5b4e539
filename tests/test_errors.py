"""Texts of all errors: every fix names a form, value or command, and parts have no full stop of their own."""

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
"""Fixes without form, value, choice or command."""
ALLOWED = {"Leave one of them out"}
"""For two contradicting flags, which the problem names."""


def fixes():
    """Yield (place, text) of every fix; values of f-strings are {}."""
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


def test_problem_rule_and_fix_have_no_full_stop():
    """The message joins them to sentences."""
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "").endswith("Error"):
                keywords = [keyword.value for keyword in node.keywords if keyword.arg in ("fix", "rule")]
                for part in [*node.args[:1], *keywords] if keywords else []:
                    last = part.values[-1] if isinstance(part, ast.JoinedStr) else part
                    if isinstance(last, ast.Constant) and str(last.value).endswith("."):
                        wrong.append(f"{path.name}:{node.lineno}")
    assert not wrong
