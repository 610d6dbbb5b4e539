"""`megatron-lite evaluate` on the checkpoint of a run."""

import json
import math

import pytest
from support.trainer import command

pytestmark = pytest.mark.slow


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
    assert found["iteration"] == 60
    written, *datasets = found["results"]
    assert (written["task"], written["name"]) == ("text", str(text))
    assert (written["seq_length"], written["stride"]) == (16, 16)
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
    (plain,), (overlapping,) = plain["results"], overlapping["results"]
    assert plain["tokens"] == overlapping["tokens"] == 500
    assert (plain["stride"], overlapping["stride"]) == (16, 4)
    assert overlapping["loss"] != plain["loss"]
    sweep = figures(run, "--data-path", corpus.data[0], "--limit", 500, "--seq-length", 2, 8, 16, "--batch-size", 3)
    losses = [one["loss"] for one in sweep["results"]]
    assert [one["seq_length"] for one in sweep["results"]] == [2, 8, 16]
    assert losses[0] != losses[1] and losses[2] == pytest.approx(plain["loss"], rel=1e-5)


def test_published_corpora(run, tmp_path):
    """Each corpus is normalized by the counts of its file."""
    files = {
        "wikitext": " \n = Abc = \n \n a hard @-@ shelled abc , of 0 @.@ 7 kg \n",
        "ptb": " a abc was n't N \n",
        "enwik8": "abc dé",
        "text8": " abc def",
        "lambada": '{"text": "abc def ab"}\n{"text": "a b, c d ."}\n',
        "documents": '{"text": "abc"}\n{"text": "de f", "meta": {"pile_set_name": "B"}}\n',
    }
    args = []
    for name, content in files.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
        args += [f"--{name}", tmp_path / name]
    found = {one["task"]: one for one in figures(run, *args)["results"]}
    assert set(found) == set(files)
    for name, words in (("wikitext", 18), ("ptb", 6)):
        one = found[name]
        assert one["words"] == words and one["bytes"] == len(files[name].encode())
        assert one["word_perplexity"] == pytest.approx(math.exp(one["loss"] * one["tokens"] / words))
    for name, characters in (("enwik8", 7), ("text8", 8)):
        bits = found[name]["loss"] * found[name]["tokens"] / characters / math.log(2)
        assert found[name]["bits_per_character"] == pytest.approx(bits)
    assert found["lambada"]["passages"] == 2 and 0 <= found["lambada"]["accuracy"] <= 1
    documents = found["documents"]
    assert documents["parts"]["B"]["bytes"] == 4 and documents["bytes"] == 7
    bits = [documents["parts"][name]["bits_per_byte"] for name in ("", "B")]
    assert documents["mean_bits_per_byte"] == pytest.approx(sum(bits) / 2)
    assert documents["bits_per_byte"] == pytest.approx((3 * bits[0] + 4 * bits[1]) / 7)
    table = evaluate(run, *args, "--stride", 8)
    assert "--stride has no effect on --lambada" in table.err
    assert "1 passage of 2 ends with punctuation instead of a word (first: line 2)" in table.err
    assert table.code == 0 and all(len(line) <= 80 for line in table.out.splitlines() if str(tmp_path) not in line)


def test_all_checkpoints_are_evaluated_once(corpus, tmp_path):
    run, text = tmp_path / "run", tmp_path / "text"
    job = corpus.job("--train-iters", 3, "--lr", 1e-2, "--save", run, "--save-interval", 1, "--log-interval", 3)
    assert command(*job).code == 0
    text.write_text("abc def " * 5)
    alone = figures(run, "--text", text, "--load-iteration", 2)["results"]
    (tmp_path / "lambada").write_text("abc def\n")
    args = ("--all-checkpoints", "--text", text, "--lambada", tmp_path / "lambada", "--svg", tmp_path / "curves")
    first = evaluate(run, *args)
    assert first.code == 0, first
    assert [f"(iteration {n})" in first.err for n in (1, 2, 3)] == [True] * 3
    assert first.out.splitlines()[2].split() == ["iteration", "(1)", "(2)"]
    assert "+----" in first.out and (tmp_path / "curves" / "accuracy.svg").read_text().startswith("<svg")
    second = evaluate(run, *args)
    assert second.out == first.out and "(iteration" not in second.err, "nothing is loaded"
    found = figures(run, *args)["checkpoints"]
    assert [one["iteration"] for one in found] == [1, 2, 3]
    assert found[1]["results"][0] == alone[0]
    # A new task or checkpoint is added, and a damaged checkpoint is passed over.
    (file,) = (run / "iter_0000002").glob("*.distcp")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 255
    file.write_bytes(content)
    third = evaluate(run, *args, "--seq-length", 8)
    assert third.code == 1 and "skipped iter_0000002" in third.err
    assert "(iteration 1)" in third.err and "(iteration 3)" in third.err


def test_the_table_fits_a_terminal(run, tmp_path):
    text = tmp_path / "t.txt"
    text.write_text("abc " * 50, encoding="utf-8")
    result = evaluate(run, "--text", text)
    assert result.code == 0
    assert "loaded" in result.err and "loaded" not in result.out
    assert all(len(line) <= 80 for line in result.out.splitlines() if not line.startswith(str(text)))


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        ((), 2, "give --text FILE, --data-path PREFIX, --lambada FILE or --tasks NAME"),
        (("--text", "{folder}/text", "--svg", "x"), 2, "--svg is an option of --all-checkpoints"),
        (("--text", "{folder}/text", "--all-checkpoints", "--load-iteration", 60), 1, "names a single one"),
        (("--text", "{folder}/text", "--tensor-model-parallel-size", 2), 1, "1 rank cannot hold"),
        (("--text", "{folder}/text", "--tasks", "x", "--include-path", "{folder}/none"), 1, "none is not a folder"),
        (("--text8", "{folder}/x.jsonl"), 1, "letters a to z and spaces"),
        (("--text", "nowhere"), 1, "nowhere: No such file"),
        (("--text", "."), 1, "Is a directory"),
        (("--text", "{folder}/empty"), 1, "is empty"),
        (("--text", "{folder}/latin1"), 1, "UTF-8"),
        (("--text", "{folder}/text", "--prepend-bos"), 1, "no beginning-of-text token for --prepend-bos"),
        (("--text", "{folder}/x.jsonl"), 1, "--documents"),
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
    assert said in result.err and "loaded" not in result.err
