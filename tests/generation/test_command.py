"""Tests of `megatron-lite generate`: JSON lines in and out, resume, stop strings, best-of, sessions."""

import io
import json
import signal

import pytest

from megatron_lite.cli import generate as command
from megatron_lite.cli import generation_stop
from megatron_lite.cli.main import main
from megatron_lite.errors import ConfigError, DataError
from megatron_lite.generation import generate as decoding
from megatron_lite.generation.prompts import Settings, parse_prompts
from megatron_lite.generation.requests import Generated
from megatron_lite.generation.sampling import Sampling


def call(saved, *args):
    return command.run(["--load", str(saved), "--device", "cpu", *map(str, args)])


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


RECORDS = (
    {"id": "a", "prompt": "1 2 3", "temperature": 0, "max_new_tokens": 6},
    {"prompt": "4 5 6 7", "num_samples": 2, "seed": 5, "meta": {"mine": [1]}},
    {"prompt": "8", "top_k": 5, "stop": " 9", "max_new_tokens": 3},
)


@pytest.fixture
def prompts(tmp_path):
    return write(tmp_path / "prompts.jsonl", *RECORDS)


def test_json_lines_have_ids_settings_and_seeds_of_their_own(saved, prompts, tmp_path, capsys):
    output = tmp_path / "out.jsonl"
    assert call(saved, "--input", prompts, "--output", output, "--max-new-tokens", 4, "--log-probs") == 0
    found = lines(output)
    assert [(one["id"], one["sample"], one["seed"]) for one in found] == [
        ("a", 0, 1234),
        (2, 0, 5),
        (2, 1, 6),
        (3, 0, 1234),
    ]
    assert [one["num_tokens"] for one in found[:3]] == [6, 4, 4]
    assert found[1]["meta"] == {"mine": [1]} and "meta" not in found[0]
    assert found[0]["settings"]["temperature"] == 0 and found[1]["settings"]["max_new_tokens"] == 4
    assert all("best_of" not in one["settings"] for one in found)
    assert found[0]["checkpoint"] == "iter_0000007"
    for one in found:
        assert len(one["tokens"]) == len(one["log_probs"]) == one["num_tokens"]
        assert sum(one["log_probs"]) == pytest.approx(one["log_prob"], abs=1e-5)
        assert all(value == round(value, 6) for value in [one["log_prob"], *one["log_probs"]])
    # Each equals its prompt alone.
    capsys.readouterr()
    assert call(saved, "--prompt", "4 5 6 7", "--seed", 6, "--max-new-tokens", 4) == 0
    assert capsys.readouterr().out == f"4 5 6 7{found[2]['text']}\n"
    assert (
        call(
            saved,
            "--input",
            prompts,
            "--output",
            tmp_path / "one",
            "--batch-size",
            1,
            "--max-new-tokens",
            4,
            "--log-probs",
        )
        == 0
    )
    assert [one["text"] for one in lines(tmp_path / "one")] == [one["text"] for one in found]


def test_an_output_is_not_overwritten_and_can_be_resumed(saved, prompts, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out.jsonl"
    assert call(saved, "--input", prompts, "--output", output) == 0
    whole = output.read_bytes()
    with pytest.raises(DataError, match=r"exists already\. Add --resume"):
        call(saved, "--input", prompts, "--output", output)
    assert output.read_bytes() == whole
    # Killed within the second text of prompt 2.
    first, second, third, _ = whole.splitlines(keepends=True)
    output.write_bytes(first + second + third[:20])
    generated = []
    inner = decoding._Text
    monkeypatch.setattr(decoding, "_Text", lambda *args: generated.append(args[1].prompt) or inner(*args))
    assert call(saved, "--input", prompts, "--output", output, "--resume") == 0
    assert output.read_bytes().startswith(first)
    for found, wanted in zip(lines(output), map(json.loads, whole.splitlines()), strict=True):
        assert found == {**wanted, "log_prob": pytest.approx(wanted["log_prob"], abs=1e-4)}
    whole = output.read_bytes()
    assert len(generated) == 3, "both texts of prompt 2, and prompt 3"
    assert "1 of 3 prompts are complete" in capsys.readouterr().err
    assert call(saved, "--input", prompts, "--output", output, "--resume") == 0
    assert output.read_bytes() == whole


def test_another_setting_or_prompt_is_not_mixed_into_a_file(saved, prompts, tmp_path):
    output = tmp_path / "out.jsonl"
    assert call(saved, "--input", prompts, "--output", output) == 0
    with pytest.raises(
        DataError, match=r"Line 1 of .* different settings\. Give the flags with which the file was begun"
    ):
        call(saved, "--input", prompts, "--output", output, "--resume", "--top-p", 0.5, "--min-p", 0.1)
    write(prompts, RECORDS[0])
    with pytest.raises(DataError, match=r"Line 2 of .* different id, sample, prompt, settings, checkpoint"):
        call(saved, "--input", prompts, "--output", output, "--resume")


def test_ctrl_c_keeps_complete_prompts(saved, prompts, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out.jsonl"
    inner = decoding._next_tokens
    passes = iter(range(100))

    def interrupted(*args):
        if next(passes) == 8:
            raise KeyboardInterrupt
        return inner(*args)

    with monkeypatch.context() as patch:
        patch.setattr(decoding, "_next_tokens", interrupted)
        arguments = [
            "generate",
            "--load",
            str(saved),
            "--device",
            "cpu",
            "--input",
            str(prompts),
            "--output",
            str(output),
        ]
        assert main([*arguments, "--batch-size", "1"]) == 130
    assert [one["id"] for one in lines(output)] == ["a"]
    assert "1 of 3 prompts are complete in" in capsys.readouterr().err
    assert main([*arguments, "--resume"]) == 0
    assert [one["id"] for one in lines(output)] == ["a", 2, 2, 3]


def test_json_lines_through_a_pipe(saved, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO('{"prompt": "1 2"}\n\n{"prompt": "3"}\n'))
    assert call(saved, "--input", "-", "--output", "-", "--greedy", "--max-new-tokens", 2) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(one["id"], one["prompt"]) for one in found] == [(1, "1 2"), (3, "3")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "Line 1 of f is not JSON"),
        ("[1]", 'has no text under "prompt"'),
        ('{"prompt": 1}', 'has no text under "prompt"'),
        ('{"prompt": "a", "top_kk": 1}', '"top_kk" is unknown, the nearest is "top_k"'),
        ('{"prompt": "a", "top_k": "5"}', '"top_k" is "5". Give "top_k" a number from 0'),
        ('{"prompt": "a", "max_new_tokens": 0}', 'Give "max_new_tokens" a number from 1'),
        ('{"prompt": "a", "seed": true}', '"seed" is true'),
        ('{"prompt": "a", "stop": [1]}', 'Give "stop" a text or a list of texts'),
        ('{"prompt": "a", "top_p": 2}', 'Line 1 of f: "top_p" 2 is out of range'),
        ('{"prompt": "a", "top_k": 1, "top_k": 2}', 'Line 1 of f: the key "top_k" is repeated'),
        ('{"prompt": "a", "id": null}', 'has the "id" null'),
        ('{"prompt": "a", "num_samples": 3, "best_of": 2}', '"best_of" 2 is less than "num_samples" 3'),
        ('{"prompt": "a", "id": 1.5}', 'has the "id" 1.5'),
        ('{"prompt": "a", "id": 2}\n{"prompt": "b"}', "Line 2 of f has the id 2 of line 1"),
        ('{"prompt": "\\ud800"}', "half of a surrogate pair"),
        ("\n", "f has no prompts"),
    ],
)
def test_wrong_lines_are_refused(line, message):
    with pytest.raises(DataError) as caught:
        parse_prompts(line, "f", Settings())
    assert message in str(caught.value)


def test_settings_of_a_line_replace_those_of_the_command():
    defaults = Settings(sampling=Sampling(top_k=3), stop=("x",), seed=9)
    first, second = parse_prompts('{"prompt": "a"}\n{"prompt": "", "min_p": 0.5, "stop": ["y", "z"]}', "f", defaults)
    assert first.settings == defaults
    assert second.settings == Settings(sampling=Sampling(top_k=3, min_p=0.5), stop=("y", "z"), seed=9)


def text_of(saved, capsys, *args):
    assert call(saved, *args) == 0
    return capsys.readouterr().out


def test_stop_strings_end_the_text_before_them(saved, capsys, tmp_path):
    free = text_of(saved, capsys, "--prompt", "1 2 3", "--seed", 3, "--max-new-tokens", 12).strip()
    args = free.split()
    stop = f"{args[7]} {args[8]}"  # across two tokens
    wanted = free[: free.index(stop)]
    found = text_of(
        saved, capsys, "--prompt", "1 2 3", "--seed", 3, "--max-new-tokens", 12, "--stop", "nothing", "--stop", stop
    )
    assert found == wanted + "\n"
    output = tmp_path / "out"
    call(saved, "--prompt", "1 2 3", "--seed", 3, "--max-new-tokens", 12, "--stop", stop, "--output", output)
    (record,) = lines(output)
    assert (record["finish_reason"], record["num_tokens"]) == ("stop", 6)
    assert "1 2 3" + record["text"] == wanted


def test_best_of_keeps_the_likeliest_texts(saved, tmp_path):
    shared = ("--prompt", "1 2 3", "--max-new-tokens", 5)
    call(saved, *shared, "--num-samples", 6, "--output", tmp_path / "all")
    call(saved, *shared, "--num-samples", 2, "--best-of", 6, "--output", tmp_path / "best")
    everything, best = lines(tmp_path / "all"), lines(tmp_path / "best")
    likeliest = sorted(
        everything, key=lambda one: -one["log_prob"] / (one["num_tokens"] + (one["finish_reason"] == "eod"))
    )[:2]
    assert [(one["seed"], one["text"]) for one in best] == [(one["seed"], one["text"]) for one in likeliest]
    assert [one["sample"] for one in best] == [0, 1]
    with pytest.raises(ConfigError, match=r"--best-of 2 is less than --num-samples 3\. Use --best-of 3 or more"):
        call(saved, *shared, "--num-samples", 3, "--best-of", 2)


def test_the_end_of_document_counts_in_the_likelihood():
    empty = Generated(eod_log_prob=-5.0, reason="eod")
    text = Generated(tokens=[1, 2], log_probs=[-1.0, -2.0], eod_log_prob=-3.0, reason="eod")
    cut = Generated(tokens=[1, 2], log_probs=[-1.0, -2.0])
    assert [one.log_prob for one in (empty, text, cut)] == [-5.0, -6.0, -3.0]
    assert [one.mean_log_prob for one in (empty, text, cut)] == [-5.0, -2.0, -1.5]


def test_log_probabilities_are_printed(saved, capsys):
    out = text_of(saved, capsys, "--prompt", "1 2 3", "--max-new-tokens", 3, "--log-probs").splitlines()
    assert len(out) == 5
    values = [float(line.split()[0]) for line in out[1:]]
    assert values[3] == pytest.approx(sum(values[:3]), abs=1e-3) and all(value < 0 for value in values)


def test_unconditional_texts_begin_as_documents_do(saved, capsys):
    out = text_of(saved, capsys, "--unconditional", "--num-samples", 2, "--max-new-tokens", 4)
    assert out.count("--- prompt 1, sample") == 2
    assert text_of(saved, capsys, "--unconditional", "--max-new-tokens", 4) == text_of(
        saved, capsys, "--prompt", "", "--max-new-tokens", 4
    )


def test_texts_longer_than_the_context(saved, capsys, tmp_path):
    long = " ".join("1" for _ in range(40))
    with pytest.raises(
        ConfigError, match=r"Prompt 1 of 1 of 40 tokens .* 32 learned positions. Shorten the prompt to 31 tokens"
    ):
        call(saved, "--prompt", long, "--max-new-tokens", 2)
    out = text_of(saved, capsys, "--prompt", long, "--max-new-tokens", 40, "--sliding-window")
    assert len(out.split()) == 80
    with pytest.raises(ConfigError, match="--context 33 is longer than the model's table of 32 learned positions"):
        call(saved, "--prompt", "1", "--context", 33)
    with pytest.raises(ConfigError, match=r"at least 1 new token \(--max-new-tokens\) .* 1 token\. Use --context 2 or"):
        call(saved, "--prompt", "1", "--context", 1)
    write(tmp_path / "f", {"prompt": "1 2", "max_new_tokens": 40})
    with pytest.raises(
        ConfigError, match=r'The prompt of line 1 of --input .*\("max_new_tokens"\).*"max_new_tokens" 30 '
    ):
        call(saved, "--input", tmp_path / "f")
    with pytest.raises(ConfigError, match="--sliding-window 9 drops more tokens than the context of 8"):
        call(saved, "--prompt", "1", "--context", 8, "--sliding-window", 9)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--input", "x", "--prompt", "1"], "--input gives all prompts: remove --prompt"),
        (
            ["--interactive", "--prompt", "1"],
            "--interactive reads prompts from the keyboard and prints texts: remove --prompt",
        ),
        (["--interactive", "--output", "x"], "remove --output"),
        (
            ["--prompt", "1", "--greedy", "--temperature", "0.5"],
            "--greedy is --temperature 0, and --temperature is 0.5",
        ),
        (["--prompt", "1", "--greedy", "--best-of", "2"], "greedy decoding generates the same text each time"),
        (["--prompt", "1", "--resume"], "--resume continues a file: add --output FILE"),
    ],
)
def test_contradicting_options_are_refused(saved, capsys, args, message):
    with pytest.raises(SystemExit):
        call(saved, *args)
    assert message in capsys.readouterr().err


def test_a_number_of_ranks_that_the_launcher_did_not_start_is_refused(saved, monkeypatch):
    for name, value in {
        "RANK": 0,
        "WORLD_SIZE": 3,
        "LOCAL_RANK": 0,
        "LOCAL_WORLD_SIZE": 3,
        "MASTER_ADDR": "a",
        "MASTER_PORT": 1,
    }.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(ConfigError, match=r"torchrun started 3 ranks, but .* describe 2 ranks. Start 2 ranks"):
        call(saved, "--prompt", "1", "--tensor-model-parallel-size", 2)


def test_ctrl_c_ends_a_text_and_ctrl_d_the_session(saved, monkeypatch, capsys):
    inputs = iter(["1 2 3", "^C", "", "1 2 3", "^D"])

    def typed(prompt=""):
        text = next(inputs)
        if text == "^C":
            signal.raise_signal(signal.SIGINT)
        if text == "^D":
            raise EOFError
        return text

    pushed = []
    inner = decoding._Text.take

    def take(self, *args):
        pushed.append(self)
        if len(pushed) == 3:
            signal.raise_signal(signal.SIGINT)
        return inner(self, *args)

    monkeypatch.setattr(generation_stop, "TWICE", 0.0)
    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr("builtins.input", typed)
    monkeypatch.setattr(decoding._Text, "take", take)
    assert call(saved, "--interactive", "--greedy", "--max-new-tokens", 9) == 0
    first, second = [line for line in capsys.readouterr().out.splitlines() if line]
    assert len(first.split()) == 3 + 3 and len(second.split()) == 3 + 9
    assert second.startswith(first)
    assert signal.getsignal(signal.SIGINT) is before
