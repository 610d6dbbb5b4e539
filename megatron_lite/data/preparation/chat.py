"""Chat templates: renders a conversation with a tokenizer's Jinja template, divided into prompts and answers."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from megatron_lite.config.files import cached_tokenizer
from megatron_lite.config.text_file import require_text
from megatron_lite.errors import DataError, install_extra
from megatron_lite.tokenizer.base import rules_hash

TEMPLATE_NAME = "chat_template.jinja"
CONFIG_NAME = "tokenizer_config.json"
ANSWERS = "assistant"
"""Role whose messages are answers."""
BASIC = ("role", "content")
"""Keys of a message; with others, as tool_calls, an answer without content is not empty."""
END_MARK = re.compile(r"\s*\S(?:.*\S)?")
"""Mark that ends a message: the first line after its content that is not blank, as `<|im_end|>`."""


class TemplateError(ValueError):
    """A conversation that cannot be rendered; the message is the reason in a few words."""


class ChatTemplate:
    """Jinja template as transformers reads it: sandboxed, with the functions and tags that templates of models use.

    Args:
        source: the template.
        names: values of bos_token, eos_token and others, from the tokenizer's files.
        origin: where the template is from, for errors.

    Attributes:
        fingerprint: hash of the template and the names.

    Raises:
        DataError: jinja2 is not installed, or the template cannot be parsed.
    """

    def __init__(self, source: str, names: dict[str, str], origin: str = "") -> None:
        try:
            import jinja2
            from jinja2.ext import Extension, loopcontrols
            from jinja2.sandbox import ImmutableSandboxedEnvironment
        except ImportError:
            raise DataError(
                "Chat templates need the Python module jinja2, which is not installed", fix=install_extra("chat")
            ) from None

        class Generation(Extension):
            """The tag {% generation %}, which marks answers in some templates, around what it contains."""

            tags = {"generation"}  # noqa: RUF012, as in the base class

            def parse(self, parser: Any) -> Any:
                next(parser.stream)
                return parser.parse_statements(("name:endgeneration",), drop_needle=True)

        def refuse(message: str) -> NoReturn:
            raise TemplateError(f"refused by the chat template: {message}")

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
        )
        # As in transformers: jinja2's own filter would escape HTML.
        environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
        environment.globals |= {"raise_exception": refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise DataError(
                f"The chat template {origin} cannot be parsed: {error}",
                fix="Give --chat-template a file with a valid template",
            ) from error
        self._errors = (jinja2.TemplateError, TypeError, KeyError, AttributeError)
        self._names = names
        self.fingerprint = rules_hash(json.dumps([source, names], sort_keys=True).encode())

    def segments(self, messages: Sequence[dict[str, Any]]) -> tuple[str, ...]:
        """Return the parts of a conversation in order, alternately prompt and answer; a prompt may be empty.

        An answer begins where the template asks for one, and includes the token that ends the turn. What the template
        writes after that token belongs to the next prompt.

        Raises:
            TemplateError: there is no answer, or an empty one, or the template writes an earlier message in another way
                once a later one follows it.
        """
        whole, found, end = self._render(messages, prompt=False), list[str](), 0
        for number, message in enumerate(messages):
            if message.get("role") != ANSWERS:
                continue
            before = self._render(messages[:number], prompt=True)
            after = self._render(messages[: number + 1], prompt=False)
            if not (whole.startswith(after) and after.startswith(before) and len(before) >= end):
                raise TemplateError(f"the chat template renders message {number + 1} differently in a longer chat")
            content = message.get("content")
            if _is_blank(content) and all(not value for name, value in message.items() if name not in BASIC):
                raise TemplateError(f"the answer in message {number + 1} is empty")
            start = len(before)
            answer = after[start : start + _answer_length(after[start:], content)]
            found += [whole[end:start], answer]
            end = start + len(answer)
        if not found:
            raise TemplateError(f"no message of the role {ANSWERS!r}")
        return (*found, whole[end:])

    def _render(self, messages: Sequence[dict[str, Any]], *, prompt: bool) -> str:
        try:
            return self._template.render(messages=list(messages), add_generation_prompt=prompt, **self._names)
        except TemplateError:
            raise
        except self._errors as error:
            raise TemplateError(f"the chat template fails: {error}") from error


def _is_blank(content: Any) -> bool:
    return isinstance(content, str) and not content.strip()


def _answer_length(rendered: str, content: Any) -> int:
    """Return the number of characters of a rendered answer up to the end of the mark that ends it.

    A template without such a mark ends messages with white space, which then belongs to the answer.
    """
    text = content.strip() if isinstance(content, str) else ""
    at = rendered.rfind(text) if text else -1
    if at < 0:  # the template writes the content in a form of its own
        return len(rendered.rstrip()) or len(rendered)
    mark = END_MARK.match(rendered, at + len(text))
    return len(rendered) if mark is None else mark.end()


def read_template(model: str, path: str = "") -> ChatTemplate:
    """Read the chat template of a file, or of a tokenizer's folder.

    Args:
        model: --tokenizer-model, a file or folder or the name of a cached model.
        path: --chat-template; empty: the template in the tokenizer's folder.

    Raises:
        DataError: there is no template, or it cannot be parsed.
    """
    given = Path(model)
    folder = given if given.is_dir() else given.parent if given.is_file() else None
    if folder is None and (cached := cached_tokenizer(model)) is not None:
        folder = cached.parent
    declared = _declared(folder)
    if path:
        source: Any = require_text(path, "--chat-template")
    elif folder is not None and (folder / TEMPLATE_NAME).is_file():
        source = require_text(folder / TEMPLATE_NAME, "--tokenizer-model")
    else:
        source = declared.get("chat_template")
        if isinstance(source, list):  # several named templates
            source = next((one.get("template") for one in source if one.get("name") == "default"), None)
    if not isinstance(source, str):
        raise DataError(
            f"The tokenizer {model} has no chat template ({TEMPLATE_NAME}, or chat_template in {CONFIG_NAME})",
            fix="Give --chat-template a file with a Jinja template",
        )
    tokens = {name: value for name, value in declared.items() if name.endswith("_token")}
    names = {
        name: str(token.get("content", "") if isinstance(token, dict) else token) for name, token in tokens.items()
    }
    return ChatTemplate(
        source, {name: token for name, token in names.items() if token != "None"}, path or f"of the tokenizer {model}"
    )


def _declared(folder: Path | None) -> dict[str, Any]:
    """Return the content of tokenizer_config.json; empty if there is none."""
    path = None if folder is None else folder / CONFIG_NAME
    if path is None or not path.is_file():
        return {}
    try:
        declared = json.loads(require_text(path, "--tokenizer-model"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON: {error}", fix=f"Copy {path} again") from error
    return declared if isinstance(declared, dict) else {}
