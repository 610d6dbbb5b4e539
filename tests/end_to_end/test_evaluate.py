"""`megatron-lite evaluate` on the checkpoint of a run."""

import json
import math

import pytest
from support.trainer import command


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    trained = command(
        *corpus.job("--train-iters", 60, "--lr", 1e-2, "--save", folder, "--save-interval", 60, "--log-interval", 60)
    )
    assert trained.code == 0, trained
    return folder


def evaluate(run, *args):
    return command("evaluate", "--load", run, "--device", "cpu", *args)


def figures(run, *args):
    result = evaluate(run, *args, "--json")
    assert result.code == 0, result
    return json.loads(result.out)


def test_metrics_of_texts_and_datasets(run, corpus, tmp_path):
    text = tmp_path / "held-out.txt"
    text.write_text("abc dé\r\nabc\n" * 5, newline="")
    found = figures(run, "--text", text, "--data-path", corpus.data[0], "--data-path", corpus.data[1])
    assert (found["iteration"], found["seq_length"], found["stride"]) == (60, 16, 16)
    written, *datasets = found["texts"]
    assert written["name"] == str(text)
    assert (written["bytes"], written["words"]) == (65, 15), "bytes of the file, its line ends as they are"
    total = written["loss"] * written["tokens"]
    assert written["bits_per_byte"] == pytest.approx(total / 65 / math.log(2))
    assert written["word_perplexity"] == pytest.approx(math.exp(total / 15))
    assert written["perplexity"] == pytest.approx(math.exp(written["loss"]))
    assert [one["name"] for one in datasets] == [str(prefix) for prefix in corpus.data]
    # The same documents in another order: different sums, both below the loss of random guessing.
    assert all(one["loss"] < math.log(300) - 1 for one in datasets)
    assert datasets[0]["tokens"] == datasets[1]["tokens"]


def test_window_options_and_limit(run, corpus):
    plain = figures(run, "--data-path", corpus.data[0], "--limit", 500)
    overlapping = figures(run, "--data-path", corpus.data[0], "--limit", 500, "--overlapping-eval", 4)
    assert plain["texts"][0]["tokens"] == overlapping["texts"][0]["tokens"] == 500
    assert overlapping["stride"] == 4
    assert overlapping["texts"][0]["loss"] != plain["texts"][0]["loss"]
    short = figures(run, "--data-path", corpus.data[0], "--limit", 500, "--seq-length", 2, "--batch-size", 3)
    assert short["texts"][0]["loss"] != plain["texts"][0]["loss"]


def test_wikitext_is_detokenized_and_counted_as_published(run, tmp_path):
    text = tmp_path / "wiki.txt"
    text.write_text(" \n = Abc = \n \n a hard @-@ shelled abc , of 0 @.@ 7 kg \n")
    (plain,), (joined,) = (figures(run, "--text", text, *args)["texts"] for args in ((), ("--wikitext",)))
    assert joined["tokens"] < plain["tokens"]
    assert joined["bytes"] == plain["bytes"] == len(text.read_bytes())
    assert (plain["words"], joined["words"]) == (14, 18), "four ends of lines"


def test_the_table_fits_a_terminal(run, tmp_path):
    text = tmp_path / "t.txt"
    text.write_text("abc " * 50, encoding="utf-8")
    result = evaluate(run, "--text", text)
    assert result.code == 0
    assert "loaded" in result.err and "loaded" not in result.out
    assert all(len(line) <= 80 for line in result.out.splitlines() if line != str(text))


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        ((), 2, "give --text FILE or --data-path PREFIX"),
        (("--text", "nowhere"), 1, "nowhere: No such file"),
        (("--text", "."), 1, "Is a directory"),
        (("--text", "{folder}/empty"), 1, "is empty"),
        (("--text", "{folder}/latin1"), 1, "UTF-8"),
        (("--text", "{folder}/text", "--prepend-bos"), 1, "no beginning-of-text token for --prepend-bos"),
        (("--text", "{folder}/x.jsonl"), 1, "megatron-lite preprocess"),
        (("--data-path", "nowhere"), 1, "nowhere.idx"),
        (("--text", "{folder}/text", "--seq-length", 64), 1, "table of 16 learned positions"),
        (("--text", "{folder}/text", "--stride", 17), 1, "is outside 1 to"),
        (("--text", "{folder}/text", "--batch-size", 0), 2, "--batch-size: '0' is not a whole number from 1"),
    ],
)
def test_errors(run, tmp_path, args, code, said):
    (tmp_path / "empty").touch()
    (tmp_path / "latin1").write_bytes(b"\xe9t\xe9")
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "text").write_text("abc abc")
    result = evaluate(run, *(str(word).format(folder=tmp_path) for word in args))
    assert result.code == code, result
    assert said in result.err
