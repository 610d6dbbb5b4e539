"""Every field of RunConfig is read by what trains: a flag that nothing reads would be parsed and ignored.

The readers are found by types, not by names (`load` and `kind` are attributes of many things): a small inference over
the package's annotations gives the class of each expression `x` in `x.field`.
"""

import ast
from dataclasses import fields
from functools import cache
from pathlib import Path

import pytest

import megatron_lite
from megatron_lite.config.command import CommandOptions
from megatron_lite.config.table import SECTIONS

PACKAGE = Path(megatron_lite.__file__).parent
SECTION_OF = {cls.__name__: section for section, cls in SECTIONS.items()}
SECTION_FILES = tuple(f"config/{name}.py" for name in ("model", "parallel", "deepspeed", "checkpoint", "run"))
"""Modules whose classes compute with fields; their functions parse, check and write them."""
DEFINITIONS = tuple(
    f"config/{name}.py" for name in ("counts", "layout", "selection", "partition", "sharing", "vocabulary")
)
"""Modules of config/ that compute with fields."""
SHOWN_ONLY = (
    "cli/explain.py",
    "planner/summary.py",
    "train/introduction.py",
    "data/format/fingerprint.py",
    "runs/comparison.py",
)
"""These show, hash or compare a field: that has no effect on what is trained."""


@cache
def modules():
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}


def class_name(annotation):
    """The class that an annotation names: X, "X", X | None, mod.X; for list[X] and its kin, the element's."""
    match annotation:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name
        case ast.Subscript(value=ast.Name(id="Literal")):
            return None
        case ast.Constant(value=str(text)):
            return class_name(ast.parse(text, mode="eval").body)
        case ast.BinOp(left=left, right=right):
            return class_name(left) if class_name(left) not in ("None", None) else class_name(right)
        case ast.Subscript(slice=ast.Tuple(elts=[first, *_])):
            return class_name(first)
        case ast.Subscript(slice=inner):
            return class_name(inner)
    return None


@cache
def signatures():
    """Classes of attributes, as {(class, attribute): class}, and of what functions return, as {name: class}."""
    attributes, returns = {}, {}
    for tree in modules().values():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and node.returns is not None:
                returns[node.name] = class_name(node.returns)
            if not isinstance(node, ast.ClassDef):
                continue
            returns[node.name] = node.name
            for item in node.body:
                if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                    attributes[node.name, item.target.id] = class_name(item.annotation)
                if isinstance(item, ast.FunctionDef):
                    if item.returns is not None:
                        attributes[node.name, item.name] = class_name(item.returns)
                    for name, kind in assigned_to_self(item).items():
                        attributes[node.name, name] = kind
    return attributes, returns


def assigned_to_self(function):
    """{attribute: class} for `self.attribute = parameter`, and for annotated assignments to attributes."""
    known = parameters(function)
    found = {}
    for node in ast.walk(function):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Attribute):
            found[node.target.attr] = class_name(node.annotation)
        if isinstance(node, ast.Assign):
            for target, value in pairs(node):
                if isinstance(target, ast.Attribute) and (kind := infer_chain(value, known)):
                    found[target.attr] = kind
    return found


def infer_chain(node, known):
    """The class of a parameter, or of a section of one that is a RunConfig, before all signatures are known."""
    match node:
        case ast.Name(id=name):
            return known.get(name)
        case ast.Attribute(value=value, attr=attr) if infer_chain(value, known) == "RunConfig" and attr in SECTIONS:
            return SECTIONS[attr].__name__
    return None


def pairs(assignment):
    for target in assignment.targets:
        if isinstance(target, ast.Tuple) and isinstance(assignment.value, ast.Tuple):
            yield from zip(target.elts, assignment.value.elts, strict=False)
        else:
            yield target, assignment.value


def parameters(function):
    arguments = (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)
    return {item.arg: class_name(item.annotation) for item in arguments if item.annotation is not None}


class Reads(ast.NodeVisitor):
    """Collects (class, attribute) of every attribute that is read, where the class can be inferred."""

    def __init__(self):
        self.found = set()
        self.scopes = [{}]
        self.classes = []

    def visit_ClassDef(self, node):
        self.classes.append(node.name)
        self.generic_visit(node)
        self.classes.pop()

    def visit_FunctionDef(self, node):
        own = {"self": self.classes[-1]} if self.classes else {}
        self.scopes.append({**self.scopes[-1], **own, **parameters(node)})
        self.generic_visit(node)
        self.scopes.pop()

    def visit_Assign(self, node):
        for target, value in pairs(node):
            if isinstance(target, ast.Name):
                self.scopes[-1][target.id] = self.infer(value)
        self.generic_visit(node)

    def visit_NamedExpr(self, node):
        self.scopes[-1][node.target.id] = self.infer(node.value)
        self.generic_visit(node)

    def visit_Attribute(self, node):
        if isinstance(node.ctx, ast.Load):
            self.found.add((self.infer(node.value), node.attr))
        self.generic_visit(node)

    def infer(self, node):
        attributes, returns = signatures()
        match node:
            case ast.Name(id=name):
                return self.scopes[-1].get(name)
            case ast.Attribute(value=value, attr=attr):
                return attributes.get((self.infer(value), attr))
            case ast.Call(func=ast.Name(id="replace") | ast.Attribute(attr="replace"), args=[first, *_]):
                return self.infer(first)
            case ast.Call(func=ast.Name(id=name)):
                return returns.get(name)
            case ast.Call(func=ast.Attribute() as method):
                return self.infer(method)
            case ast.IfExp(body=body):
                return self.infer(body)
        return None


@cache
def reads():
    found = {}
    for path, tree in modules().items():
        name = path.relative_to(PACKAGE).as_posix()
        if (name.startswith("config/") and name not in (*DEFINITIONS, *SECTION_FILES)) or name in SHOWN_ONLY:
            continue
        visitor = Reads()
        for node in tree.body:
            if name not in SECTION_FILES or isinstance(node, ast.ClassDef):
                visitor.visit(node)
        for kind, attribute in visitor.found:
            if kind in SECTION_OF:
                found.setdefault(f"{SECTION_OF[kind]}.{attribute}", set()).add(name)
    return found


FIELDS = [f"{section}.{field.name}" for section, cls in SECTIONS.items() for field in fields(cls)]


@pytest.mark.parametrize("field", FIELDS)
def test_a_field_is_read(field):
    assert field in reads(), f"{field} is set by a flag, but nothing that trains reads it"


def test_an_option_of_the_command_line_is_resolved():
    """CommandOptions become fields of RunConfig in resolvers; a preset is replaced by its flags."""
    text = "".join(path.read_text(encoding="utf-8") for path in (PACKAGE / "config").glob("*.py"))
    for field in fields(CommandOptions):
        assert f"command.{field.name}" in text or field.name == "preset", field.name


def test_a_field_of_another_class_does_not_count():
    """The inference tells `checkpoint.load` from other attributes of that name, and sees what it should."""
    assert "checkpoint.load" in reads()
    assert not any(name in reads() for name in ("checkpoint.iteration", "lr.get", "model.forward", "optimizer.step"))
    visitor = Reads()
    visitor.visit(ast.parse("def f(config: RunConfig, other: Path):\n    a = config.lr\n    a.lr + other.min_lr"))
    assert ("LrConfig", "lr") in visitor.found
    assert ("LrConfig", "min_lr") not in visitor.found
