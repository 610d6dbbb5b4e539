"""Bash assignments: variables, arrays and their elements; declare, export, local and readonly."""

from __future__ import annotations

from megatron_lite.ops.shell.words import Node, WordExpander


def declare(words: WordExpander, command: Node) -> None:
    """Evaluate `declare`, `export`, `local` or `readonly`; all variables are global."""
    variant = command["Variant"]["Value"]
    assignments, options = [], ""
    for argument in command.get("Args") or ():
        if argument.get("Naked") and not argument.get("Name"):
            for text in words.fields(argument["Value"]):
                options += text if text.startswith("-") else ""
        else:
            assignments.append(argument)
    for assignment in assignments:
        name = assignment["Name"]["Value"]
        if "A" in options:
            words.variables.associative.add(name)
        if not assignment.get("Naked"):
            assign(words, assignment)
        if variant == "export" or "x" in options:
            words.variables.exported.add(name)


def assign(words: WordExpander, assignment: Node) -> None:
    """Evaluate `name=value`, `name+=value`, `name[index]=value` or `name=(values)`."""
    name, values = assignment["Name"]["Value"], words.variables.values
    append = bool(assignment.get("Append"))
    if (array := assignment.get("Array")) is not None:
        old = values.get(name)
        elements = (
            dict(old) if append and isinstance(old, dict) else {"0": old} if append and isinstance(old, str) else {}
        )
        for element in array.get("Elems") or ():
            if element.get("Index"):
                elements[words.index(name, element["Index"])] = words.text(element.get("Value"))
                continue
            for text in words.fields(element["Value"]):
                elements[str(max((int(key) for key in elements), default=-1) + 1)] = text
        values[name] = elements
        return
    text = words.text(assignment.get("Value"))
    if index := assignment.get("Index"):
        old = values.get(name)
        elements = dict(old) if isinstance(old, dict) else {} if old is None else {"0": old}
        key = words.index(name, index)
        elements[key] = elements.get(key, "") + text if append else text
        values[name] = elements
    else:
        values[name] = (words.variables.text(name) or "") + text if append else text
