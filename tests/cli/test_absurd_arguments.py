"""Invalid argument values of every command: one error paragraph, exit code 1 or 2, no traceback."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import pytest

from megatron_lite.cli.main import COMMANDS, main
from megatron_lite.cli.parser import Parser, file_path
from megatron_lite.config.help import plain_type
from megatron_lite.config.table import supported_flags

NOT_UTF8 = os.fsdecode(b"x\xe9")
NUMBERS = ("nan", "inf", "-inf", "-1", "-1e300", "1e300", "99999999999999999999", "9" * 5000, "x", "", "²", NOT_UTF8)
"""Values that no numeric option accepts."""

COMMAND_LINES = {
    "generate": ["--load", "x"],
    "evaluate": ["--load", "x", "--text", "x"],
    "preprocess": ["--input", "x", "--output-prefix", "x"],
    "train-tokenizer": ["--input", "x", "--output", "x", "--vocab-size", "300"],
    "merge": ["--output-prefix", "x", "--datasets", "x"],
    "data inspect": ["x"],
    "data verify": ["x"],
    "data pack": ["x", "y", "--seq-length", "8"],
    "data samples": ["--iteration", "1"],
    "data convert": ["x", "y"],
    "checkpoint average": ["x", "--output", "y"],
    "checkpoint reshard": ["x", "--output", "y"],
    "upscale": ["x", "--layers", "3", "--output", "y"],
    "checkpoint list": ["x"],
    "checkpoint diff": ["x", "y"],
    "import": ["x", "--output", "y"],
    "export": ["x", "--output", "y"],
    "rollback": ["--to", "1"],
    "schedule": [],
    "slurm submit": ["x"],
    "doctor": [],
    "devices": [],
    "report": ["x"],
    "watch": ["x"],
    "sync": ["x", "--to", "y"],
    "curve": ["x"],
}
"""Required arguments of each command."""

WITHOUT_DATA = [
    *("--num-layers", "2", "--hidden-size", "64", "--num-attention-heads", "4", "--seq-length", "32"),
    *("--micro-batch-size", "2", "--global-batch-size", "4", "--train-iters", "10", "--lr", "1e-3"),
    *("--tokenizer-type", "NullTokenizer", "--vocab-size", "100"),
]
RUN = [*WITHOUT_DATA, "--mock-data"]


class MadeError(Exception):
    """Raised to end a command after it has built its parser."""


def parser_of(name, monkeypatch):
    """Return the parser of a command."""

    def made(self, args=None, namespace=None):
        raise MadeError(self)

    with monkeypatch.context() as patch, pytest.raises(MadeError) as caught:
        patch.setattr(Parser, "parse_known_args", made)
        main(name.split(" "))
    return caught.value.args[0]


def actions_of(parser, words):
    """Return the options of a parser or of a sub-parser."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from action.choices[words[0]]._actions
        elif not isinstance(action, argparse._HelpAction):
            yield action


def outcome(argv, capsys):
    """Return exit code and error text of a command line."""
    try:
        code = main(argv)
    except SystemExit as stop:
        code = stop.code
    return code, capsys.readouterr().err


def refused(argv, capsys):
    code, error = outcome(argv, capsys)
    assert code in (1, 2), (argv, code)
    assert 0 < len(error) < 1500 and error.strip().count("\n") < 3, error
    return error


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def with_option(name, option, value):
    """Return a command line with an option set by `=`, so that a leading minus is part of the value."""
    words = COMMAND_LINES[name]
    if option in words:
        at = words.index(option)
        words = [*words[:at], *words[at + 2 :]]
    return [*name.split(" "), *words, f"{option}={value}"]


@pytest.mark.parametrize("name", COMMAND_LINES)
def test_numbers(name, capsys, monkeypatch):
    parser = parser_of(name, monkeypatch)
    for action in actions_of(parser, name.split(" ")[1:]):
        if action.type is file_path or getattr(action.type, "__module__", "") != "megatron_lite.cli.parser":
            continue
        for value in NUMBERS:
            option = action.option_strings[0]
            error = refused(with_option(name, option, value), capsys)
            assert option.lstrip("-") in error or value == NOT_UTF8, error


@pytest.mark.parametrize("name", COMMAND_LINES)
def test_every_number_has_bounds(name, monkeypatch):
    """Every number has a reader of cli/parser.py instead of int or float."""
    for action in actions_of(parser_of(name, monkeypatch), name.split(" ")[1:]):
        assert action.type not in (int, float), action.option_strings


@pytest.mark.parametrize("name", COMMAND_LINES)
def test_text_that_is_not_utf_8(name, capsys, monkeypatch):
    command = name.split(" ")
    assert r"b'x\xe9'" in refused([*command, *COMMAND_LINES[name], NOT_UTF8], capsys)
    for action in actions_of(parser_of(name, monkeypatch), command[1:]):
        if action.option_strings and action.nargs != 0:
            error = refused(with_option(name, action.option_strings[0], NOT_UTF8), capsys)
            assert r"x\xe9" in error, error


def test_every_command_is_tested():
    others = {"train", "explain", "rehearse", "plan"}
    assert {name.split(" ")[0] for name in COMMAND_LINES} | others == set(COMMANDS)


def numeric_flags():
    for group in supported_flags().values():
        for flag in group:
            if flag.takes_value and plain_type(flag.type) in (int, float):
                yield flag


@pytest.mark.parametrize("flag", list(numeric_flags()), ids=lambda flag: flag.name)
def test_numbers_of_a_training_run(flag, capsys):
    words = list(RUN)
    if flag.name in words:
        del words[words.index(flag.name) : words.index(flag.name) + 2]
    for value in NUMBERS:
        if value == "-1" or (plain_type(flag.type) is float and value == "99999999999999999999"):
            continue  # which numbers a run can use is a matter of the rules between flags
        error = refused(["explain", *words, f"{flag.name}={value}"], capsys)
        assert flag.name in error or value == NOT_UTF8, error
    code, _ = outcome(["explain", *words, f"{flag.name}=-1"], capsys)
    assert code in (0, 1)


@pytest.mark.parametrize(
    "command", ["train", "explain", "plan", "rehearse", "data samples --iteration 1", "data index"]
)
def test_training_flags_that_are_not_utf_8(command, capsys):
    for flag in ("--save", "--data-path", "--tokenizer-model", "--eod-token", "--lr-decay-style", "--split"):
        assert r"x\xe9" in refused([*command.split(), *RUN, flag, NOT_UTF8], capsys)
    Path("flags").write_bytes(b"--save x\xe9")
    assert "is not UTF-8: byte 0xe9 in line 1, byte 9" in refused([*command.split(), "@flags"], capsys)
    assert r"x\xe9" in refused([*command.split(), NOT_UTF8], capsys)


@pytest.mark.parametrize("rank", ["²", "-1", "9" * 5000, "1.5", NOT_UTF8])
def test_ranks_of_a_rehearsal(rank, capsys):
    refused(["rehearse", *RUN, "--rank", rank], capsys)


@pytest.mark.parametrize("value", ["-5", "5-", "9-1", "9" * 5000, "1-nan", "1e300-2e300", NOT_UTF8])
def test_samples_of_a_rollback(value, capsys):
    refused(["rollback", "--to", "1", f"--skip-samples={value}"], capsys)


def test_a_command_that_is_not_utf_8(capsys):
    assert "unknown command 'x\\udce9'" in refused([NOT_UTF8], capsys)


@pytest.mark.parametrize("kind", ["missing", "folder", "pipe", "latin-1", "utf-16", "zip", "damaged"])
@pytest.mark.parametrize(
    "words",
    [
        ["generate", "--load", "x", "--prompt-file"],
        ["evaluate", "--load", "x", "--text"],
        ["preprocess", "--output-prefix", "o", "--tokenizer-type", "NullTokenizer", "--vocab-size", "9", "--input"],
        ["train-tokenizer", "--output", "o", "--vocab-size", "300", "--input"],
        ["preprocess", "--input", "in.jsonl", "--output-prefix", "o", "--merge-file", "m", "--vocab-file"],
        ["preprocess", "--input", "in.jsonl", "--output-prefix", "o", "--vocab-file", "v", "--merge-file"],
        ["preprocess", "--input", "in.jsonl", "--output-prefix", "o", "--tokenizer-model"],
        ["data", "inspect"],
        ["data", "verify"],
        ["curve"],
        ["train", *WITHOUT_DATA, "--data-args-path"],
        ["train", *WITHOUT_DATA, "--train-weighted-split-paths-path"],
        ["train", *RUN, "--deepspeed", "--deepspeed_config"],
    ],
    ids=lambda words: " ".join(words[:1] + words[-1:]),
)
def test_files_that_are_not_text(words, kind, tmp_path, capsys):
    (tmp_path / "in.jsonl").write_text('{"text": "1"}\n')
    (tmp_path / "v").write_text('{"a": 0}')
    (tmp_path / "m").write_text("#version: 0.2\n")
    path = tmp_path / "given"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind != "missing":
        contents = {
            "latin-1": b'{"text": "x\xe9"}\n',
            "utf-16": '{"text": "x\xe9"}\n'.encode("utf-16"),
            "zip": b"PK\x03\x04" + bytes(100),
            "damaged": b"\x1f\x8b\x08\x00garbage",
        }
        path.write_bytes(contents[kind])
    error = refused([*words, str(path)], capsys)
    assert "given" in error
