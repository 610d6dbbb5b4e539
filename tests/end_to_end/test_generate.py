"""`megatron-lite generate` on several ranks."""

import json

import pytest
from support.trainer import command

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    trained = command(*corpus.job("--train-iters", 2, "--save", folder, "--save-interval", 2))
    assert trained.code == 0, trained
    return folder


@pytest.mark.parametrize("layout", ["tensor", "pipeline"])
def test_two_ranks_write_the_texts_of_one(run, ranks, tmp_path, layout):
    prompts = tmp_path / "prompts.jsonl"
    lines = [{"prompt": text, "seed": seed, "stop": "a"} for seed, text in enumerate(("", "abc", "fade cab de"))]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    shared = ["generate", "--load", run, "--device", "cpu", "--max-new-tokens", 5, "--input", prompts]
    alone = command(*shared, "--output", tmp_path / "alone")
    assert alone.code == 0, alone
    split = (f"--{layout}-model-parallel-size", 2)
    results = ranks(*[[*shared, "--output", tmp_path / "split", *split]] * 2)
    assert [result.code for result in results] == [0, 0], results
    written = [
        [
            (one["text"], one["finish_reason"], one["num_tokens"])
            for one in map(json.loads, path.read_text().splitlines())
        ]
        for path in (tmp_path / "alone", tmp_path / "split")
    ]
    assert written[0] == written[1] and len(written[0]) == 3
    assert [result.out for result in results] == ["", ""]


def test_an_error_of_all_ranks_is_printed_once(run, ranks):
    arguments = [
        "generate",
        "--load",
        run,
        "--device",
        "cpu",
        "--prompt",
        "ab " * 40,
        "--tensor-model-parallel-size",
        2,
    ]
    results = ranks(arguments, arguments)
    assert [result.code for result in results] == [1, 1]
    assert "".join(result.err for result in results).count("exceed the context of 16 learned positions") == 1
