"""Documentation site: builds README, docs/ and generated reference pages as static HTML with Sphinx, MyST and Furo.

    python tools/build_site.py [OUTPUT]     `make site` writes build/site; open build/site/index.html

The pages are staged in build/site-source with the links of the repository. Broken links and anchors are errors. Styles,
scripts and search are files of the site: it needs neither a server nor a network.
"""

from __future__ import annotations

import ast
import contextlib
import io
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "megatron_lite"
SOURCE, OUTPUT = ROOT / "build" / "site-source", ROOT / "build" / "site"
# Pages in the order of the navigation. Pages of docs/ that are missing here follow the guides.
START = ("docs/tutorial",)
GUIDES = (
    *("data", "parallelism", "plan", "checkpoints", "several_nodes", "../slurm/README", "operations", "reports"),
    *(
        "gpu",
        "kernels",
        "tpu",
        "deepspeed",
        "optimizers",
        "finetuning",
        "generation",
        "evaluation",
        "interop",
        "warm_start",
    ),
    "layer_sharing",
)
REFERENCE = ("docs/arguments", "commands", "docs/glossary", "docs/benchmarks", "CHANGELOG")
CODE = ("docs/architecture", "CONTRIBUTING", "api/index")
SETTINGS = {
    "project": "megatron_lite",
    "extensions": ["myst_parser", "sphinx_copybutton"],
    "html_theme": "furo",
    "html_title": "megatron_lite",
    "html_copy_source": False,
    "html_show_sphinx": False,
    "html_show_copyright": False,
    "copybutton_exclude": ".linenos, .gp, .go",
    "myst_heading_anchors": 4,
    "nitpicky": True,
    "smartquotes": False,  # -- begins a flag
    "html_search_scorer": str(SOURCE / "scorer.js"),
}
# Pages of the Python API follow the other results of a search.
SCORER = """\
var Scorer = {
  score: ([page, , , , score]) => (page.startsWith("api/") ? score - 100 : score),
  objNameMatch: 11, objPartialMatch: 6, objPrio: {0: 15, 1: 5, 2: -5}, objPrioDefault: 0,
  title: 15, partialTitle: 7, term: 5, partialTerm: 2,
};
"""
LINK = re.compile(r"\]\(([^)\s:#]+)(?:#[^)\s]*)?\)")
DIRECTIVE = re.compile(r"^ *<!-- test:(?:(?!-->).)*-->\n(?=\n* *```\w)", re.MULTILINE | re.DOTALL)
LOADED = re.compile(r"<(?:script|img|iframe)\b[^>]*\bsrc=\"(?:https?:)?//[^>]*>|<link[^>]*stylesheet[^>]*//[^>]*>")
ACTION = re.compile(r"^ {2,4}([a-z][a-z-]+)(?: {2,}\S|$)", re.MULTILINE)


def main(output: Path = OUTPUT) -> int:
    """Build the site; return the exit code."""
    stage()
    return build(output)


def stage() -> None:
    """Write all pages to SOURCE: those of the repository, files that they link to, and the generated ones."""
    shutil.rmtree(SOURCE, ignore_errors=True)
    pages = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "slurm/README.md")]
    for path in (*pages, *sorted((ROOT / "docs").glob("*.md"))):
        text = _without_folder_links(DIRECTIVE.sub("", path.read_text(encoding="utf-8")), path.parent)
        _write(path.relative_to(ROOT), text.replace("](../README.md)", "](../index.md)"))
        for link in LINK.findall(text):
            linked = (path.parent / link).resolve()
            if linked.is_file() and linked.suffix != ".md" and linked.is_relative_to(ROOT):
                _write(linked.relative_to(ROOT), linked.read_text(encoding="utf-8"))
    (SOURCE / "README.md").rename(SOURCE / "index.md")
    _write(Path("scorer.js"), SCORER)
    _write(Path("commands.md"), commands_page())
    packages = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))
    for package in packages:
        _write(Path("api") / f"{package}.md", api_page(PACKAGE / package))
    _write(Path("api") / "index.md", f"# Python API\n{_contents('', packages, hidden=False)}")
    with (SOURCE / "index.md").open("a", encoding="utf-8") as index:
        index.writelines(navigation())


def build(output: Path) -> int:
    """Convert the staged pages to HTML; return 1 after a warning, or if a page loads something of another host."""
    from sphinx.application import Sphinx

    shutil.rmtree(output, ignore_errors=True)
    doctrees = SOURCE.parent / "site-doctrees"
    app = Sphinx(SOURCE, None, output, doctrees, "html", SETTINGS, status=None, freshenv=True, warningiserror=True)
    app.build()
    loaded = [
        f"{path.relative_to(output)} loads from another host: {element}"
        for path in sorted(output.rglob("*.html"))
        for element in LOADED.findall(path.read_text(encoding="utf-8"))
    ]
    if loaded or app.statuscode:
        sys.stderr.write("\n".join([*loaded, "build_site: mend the warnings above"]) + "\n")
        return 1
    sys.stdout.write(f"open {output / 'index.html'}\n")
    return 0


def navigation() -> Iterator[str]:
    """Yield the tables of contents at the end of the first page, which are the navigation."""
    listed = {Path(page).name for page in (*START, *GUIDES, *REFERENCE, *CODE)}
    others = [path.stem for path in sorted((ROOT / "docs").glob("*.md")) if path.stem not in listed]
    guides = [f"docs/{page}".replace("docs/../", "") for page in (*GUIDES, *others)]
    for caption, pages in (("Start", START), ("Guides", guides), ("Reference", REFERENCE), ("Code", CODE)):
        yield _contents(caption, [page for page in pages if (SOURCE / f"{page}.md").exists()], hidden=True)


def commands_page() -> str:
    """Return `--help` of every command and subcommand, in Markdown."""
    from megatron_lite.cli.main import COMMANDS

    lines = ["# Commands", "", "The output of `--help`."]
    for name in COMMANDS:
        lines += ["", f"## megatron-lite {name}", ""]
        if name == "train":
            lines.append("Also `python pretrain_gpt.py`. [Flags](docs/arguments.md) describes all flags.")
            continue
        text = _help(name)
        lines += ["```text", text, "```"]
        for action in dict.fromkeys(ACTION.findall(text)):
            shown = _help(name, action)
            if shown.startswith(f"usage: megatron-lite {name} {action}"):
                lines += ["", f"### megatron-lite {name} {action}", "", "```text", shown, "```"]
    return "\n".join(lines) + "\n"


def api_page(package: Path) -> str:
    """Return the public classes and functions of a package, with signatures and docstrings, in Markdown."""
    parsed = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(package.rglob("*.py"))}
    lines = [f"# {package.name}", "", *_docstring(parsed.pop(package / "__init__.py"))]
    for path, tree in parsed.items():
        lines += ["", f"## {'.'.join(path.relative_to(ROOT).with_suffix('').parts)}", "", *_docstring(tree)]
        for node in _public(tree):
            lines += ["", f"### {node.name}", "", "```python", _signature(node), "```", "", *_docstring(node)]
            for method in _public(node) if isinstance(node, ast.ClassDef) else ():
                lines += ["", f"#### {node.name}.{method.name}", "", "```python", _signature(method), "```", ""]
                lines += _docstring(method)
    return "\n".join(lines) + "\n"


def _public(node: ast.Module | ast.ClassDef) -> Iterator[ast.ClassDef | ast.FunctionDef]:
    for item in node.body:
        if isinstance(item, ast.ClassDef | ast.FunctionDef) and not item.name.startswith("_"):
            yield item


def _signature(node: ast.ClassDef | ast.FunctionDef) -> str:
    """Return the head of a function, or that of a class with its annotated fields."""
    decorators = "".join(f"@{ast.unparse(item)}\n" for item in node.decorator_list)
    if isinstance(node, ast.FunctionDef):
        return decorators + ast.unparse(ast.FunctionDef(**{**vars(node), "body": [], "decorator_list": []})).rstrip(":")
    fields = [f"    {ast.unparse(item)}" for item in node.body if isinstance(item, ast.AnnAssign)]
    bases = f"({', '.join(map(ast.unparse, node.bases))})" if node.bases else ""
    return "\n".join([f"{decorators}class {node.name}{bases}", *(line for line in fields if "option(" not in line)])


def _docstring(node: ast.Module | ast.ClassDef | ast.FunctionDef) -> list[str]:
    """Return a docstring in Google's form as Markdown: its sections become lists."""
    lines: list[str] = []
    in_section = False
    for line in (ast.get_docstring(node) or "").splitlines():
        shown = line.replace("<", "&lt;").replace("*", "\\*")
        if re.fullmatch(r"(Args|Attributes|Returns|Raises|Yields):", line):
            in_section = True
            lines += [f"**{line[:-1]}**", ""]
        elif in_section and re.match(r" {4}[\w*, .\[\]|]+: ", line):
            name, _, text = shown.strip().partition(": ")
            lines.append(f"- `{name}`: {text}".replace("`\\*", "`*"))
        elif line.startswith("    ") and not in_section:
            lines += [line]  # a block of code
        else:
            lines.append(shown.strip() if not in_section or not line.startswith("     ") else f"  {shown.strip()}")
    return lines


def _help(*command: str) -> str:
    from megatron_lite.cli.main import main as run

    out = io.StringIO()
    with (
        mock.patch.dict("os.environ", {"COLUMNS": "100"}),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(io.StringIO()),
        contextlib.suppress(SystemExit),
    ):
        run([*command, "--help"])
    return out.getvalue().strip()


def _contents(caption: str, pages: list[str] | tuple[str, ...], *, hidden: bool) -> str:
    options = [*([":hidden:"] if hidden else []), *([f":caption: {caption}"] if caption else []), ":maxdepth: 1"]
    return "\n".join(["\n```{toctree}", *options, "", *pages, "```\n"])


def _without_folder_links(text: str, here: Path) -> str:
    """Return a page with links to folders, which the site has no page for, as plain text."""

    def name(found: re.Match[str]) -> str:
        return f"`{found[1]}`" if (here / found[2]).is_dir() else found[0]

    return re.sub(r"\[([^\]]+)\]\(([^)\s:#]+)\)", name, text)


def _write(path: Path, text: str) -> None:
    (SOURCE / path).parent.mkdir(parents=True, exist_ok=True)
    (SOURCE / path).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:2])))
