"""A path that does not exist: the nearest one that does is suggested, through the trainer's own checks."""

from pathlib import Path

import pytest
from support.job_commands import SMALL

from megatron_lite.config.arguments import parse_run
from megatron_lite.config.files import missing_files
from megatron_lite.config.paths import suggest_dataset, suggest_path

NULL = ["--tokenizer-type", "NullTokenizer", "--vocab-size", "9"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("data/wiki_text_document", "data/books_text_document", "data/half"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(f"{name}.bin").touch()
        Path(f"{name}.idx").touch()
    Path("data/half.idx").unlink()
    Path("corpus.jsonl").touch()
    Path("empty").mkdir()
    Path("tokenizer").mkdir()
    Path("tokenizer/vocab.json").touch()


DATASETS = {
    "data/wiki": "Did you mean data/wiki_text_document?",
    "data/wiki_text_dokument": "Did you mean data/wiki_text_document?",
    "data/Wiki_Text_Document": "Did you mean data/wiki_text_document?",
    "dta/wiki_text_document": "Did you mean data/wiki_text_document?",
    "data/wiki_text_document.bin": "Give the common prefix of both files: data/wiki_text_document",
    "data/wiki_text_document.idx": "Give the common prefix of both files: data/wiki_text_document",
    "data": "Give a dataset of that folder: data/books_text_document, data/wiki_text_document",
    "data/half": "Copy it to the folder of data/half.bin, or preprocess the corpus again",
    "corpus.jsonl": "Make a dataset of that text with `megatron-lite preprocess --input corpus.jsonl",
    "empty": "Make a dataset with `megatron-lite preprocess`: there is no .idx file in empty",
    "empty/x": "holds no dataset",
    "data/zzz": "holds books_text_document, wiki_text_document",
    "quite/elsewhere/x": "There is no folder quite: give another prefix",
}


@pytest.mark.parametrize("prefix", DATASETS)
def test_a_dataset(prefix):
    (error,) = missing_files(parse_run([*SMALL, *NULL, "--data-path", prefix]).config)
    assert f'The dataset "{prefix}" (--data-path) does not exist' in str(error)
    assert DATASETS[prefix] in str(error)
    assert suggest_dataset(prefix) == error.fix


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_a_dataset_of_one_split(split):
    (error,) = missing_files(parse_run([*SMALL, *NULL, f"--{split}-data-path", "data/wiki"]).config)
    assert error.fix == "Did you mean data/wiki_text_document?"


@pytest.mark.parametrize("blend", ["0.7 A B", "0.7 A 0.3", "0.7 0.3 A B", "nan A 2 B"])
def test_weights_that_do_not_alternate_with_datasets(blend):
    errors = missing_files(parse_run([*SMALL, "--data-path", *blend.split()]).config)
    assert any("Weights and paths alternate" in str(error) for error in errors)


PATHS = {
    "tokenizer/vocab.jsn": "Did you mean --vocab-file tokenizer/vocab.json?",
    "tokeniser/vocab.json": "Did you mean --vocab-file tokenizer/vocab.json?",
    "tokeniser/other.txt": "there is no folder tokeniser, but tokenizer with vocab.json",
    "tokenizer/zzz": "holds vocab.json",
    "/nowhere/at/all": "there is no folder /nowhere",
    "empty/x": "empty holds nothing",
}


@pytest.mark.parametrize("path", PATHS)
def test_a_file(path):
    fix = suggest_path("--vocab-file", path)
    assert PATHS[path] in fix
    argv = [*SMALL, "--mock-data", "--vocab-file", path, "--merge-file", "tokenizer/vocab.json"]
    assert missing_files(parse_run(argv).config)[0].fix == fix


def test_long_folder_listings_are_shortened(tmp_path):
    for number in range(9):
        (tmp_path / "empty" / f"{number}").touch()
    assert suggest_path("--save", "empty/x").endswith("holds 0, 1, 2, 3, 4 and 4 more")


def test_a_model_of_the_hub_is_found_in_the_cache(tmp_path, monkeypatch):
    import huggingface_hub.constants as constants

    argv = [*SMALL, "--mock-data", "--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", "some/model"]
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert "`hf download NAME`" in str(missing_files(parse_run(argv).config)[0])
    snapshot = tmp_path / "hub" / "models--some--model" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "tokenizer.json").touch()
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    assert missing_files(parse_run(argv).config) == []


def test_missing_argument_files_and_jsons():
    Path("ds_config.json").write_text("{}")
    Path("flags.txt").write_text("--bf16")
    parsed = parse_run([*SMALL, "--deepspeed", "--deepspeed_config", "ds_confg.json"])
    assert "Did you mean --deepspeed_config ds_config.json?" in str(parsed.missing[0])
    parsed = parse_run([*SMALL, "--train-weighted-split-paths-path", "flags.text"])
    assert "Did you mean --train-weighted-split-paths-path flags.txt?" in str(parsed.missing[0])
    with pytest.raises(Exception, match=r"Did you mean @flags\.txt\?"):
        parse_run([*SMALL, "@flags.text"])
    with pytest.raises(
        Exception, match=r"@flags.txt .* not closed in line 1, --save 'x. Close the quotation mark in that line"
    ):
        Path("flags.txt").write_text("--save 'x")
        parse_run([*SMALL, "@flags.txt"])
    with pytest.raises(Exception, match='Give a file instead of the folder "empty"'):
        parse_run([*SMALL, "@empty"])
