"""Packaging: setup.py declares exactly the imported packages; messages install extras by one command."""

import ast
import functools
import re
import sys
from pathlib import Path

import pytest

import megatron_lite

ROOT = Path(megatron_lite.__file__).parent.parent
MODULES = {"protobuf": None, "liger-kernel": "liger_kernel", "cut-cross-entropy": "cut_cross_entropy"}
"""Distributions whose modules have another name; None: another package (sentencepiece) imports it."""
UNDECLARED = {"apex", "fused_weight_gradient_mlp_cuda", "flash_attn", "flash_attn_interface", "transformer_engine"}
"""Modules that sites build themselves; each has a replacement."""
PROGRAMS = {"shfmt-py": "shfmt"}
"""Distributions of a program that the package runs."""


def declared():
    """Return the packages of install_requires and of each extra."""
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    names = {}
    for node in ast.walk(tree):
        named = ("EXTRAS", "ENGINES", "KERNELS", "TRACKERS")
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") in named:
            names |= ast.literal_eval(node.value)
        if isinstance(node, ast.keyword) and node.arg == "install_requires":
            names["required"] = ast.literal_eval(node.value)
    return {extra: {re.split(r"[\[<>=]", need)[0] for need in needs} for extra, needs in names.items()}


@functools.cache
def imported():
    """Return imported third-party modules, including import_module calls, outside TYPE_CHECKING."""
    found = set()
    for path in (ROOT / "megatron_lite").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in list(ast.walk(tree)):
            if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
                node.body = []
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                found |= {name.name for name in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found.add(node.module)
            elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
                found.add(ast.unparse(node.args[0]).lstrip("f").strip("'\""))
        programs = {part.value for part in ast.walk(tree) if isinstance(part, ast.Constant)} & set(PROGRAMS.values())
        found |= {need for need, program in PROGRAMS.items() if program in programs}
    tops = {name.split(".")[0] for name in found}
    return tops - set(sys.stdlib_module_names) - {"megatron_lite", "__future__"}


def test_each_import_is_declared_and_each_declared_package_is_imported():
    needs = {MODULES.get(need, need) for extra in declared().values() for need in extra} - {None}
    assert imported() == needs | UNDECLARED


@pytest.mark.parametrize("extra", sorted(declared()))
def test_each_extra_has_an_imported_package(extra):
    assert {MODULES.get(need, need) for need in declared()[extra]} & imported()


def test_an_extra_is_installed_by_one_command_that_exists():
    """`pip install megatron-lite[x]` would search a package index instead of the clone.

    Where the package is installed without a clone, errors.install_extra names it: the extra's libraries are missing.
    """
    wrong = []
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "setup.py", *(ROOT / "docs").glob("*.md")]
    for path in [*pages, *(ROOT / "megatron_lite").rglob("*.py")]:
        for match in re.finditer(r"pip install (.{0,30})\[([\w{}]+)\]", path.read_text(encoding="utf-8")):
            known = match[2] in ("dev", *declared())
            if match[1] != "-e '." or not known:
                wrong.append(f"{path.relative_to(ROOT)}: {match[0]}")
    assert not wrong


def test_extras_that_errors_name_exist():
    for path in (ROOT / "megatron_lite").rglob("*.py"):
        for name in re.findall(r"install_extra\(['\"](\w+)", path.read_text(encoding="utf-8")):
            assert name in declared(), path
