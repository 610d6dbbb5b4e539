import io
import json

import pytest
import tokenizers
import torch

from megatron_lite.backend.group import LocalGroup
from megatron_lite.checkpoint.save import save_checkpoint
from megatron_lite.checkpoint.writing import SaveRequest
from megatron_lite.cli import generate as command
from megatron_lite.config.optimizer import PrecisionConfig
from megatron_lite.config.runtime import RuntimeConfig
from megatron_lite.config.tokenizer import TokenizerConfig
from megatron_lite.errors import CheckpointError, ConfigError, DataError
from megatron_lite.generation.generate import generate
from megatron_lite.generation.requests import Context, Generated, Request
from megatron_lite.generation.restore import restore_model
from megatron_lite.generation.sampling import Sampling
from megatron_lite.parallel.tensors import parameter_tensor
from megatron_lite.runs.manifest import Provenance
from megatron_lite.tokenizer.build import build_tokenizer
from megatron_lite.tokenizer.huggingface import HuggingFaceTokenizer

CPU = RuntimeConfig(device="cpu", seed=99)


def greedy(stage):
    request = Request(prompt=[1, 2, 3], max_new_tokens=8, sampling=Sampling(temperature=0.0))
    ((_, found),) = generate(stage, [request], context=Context(32))
    return found.tokens


def test_a_checkpoint_restores_the_model(saved, stage):
    model = restore_model(str(saved), 0, CPU)
    assert model.iteration == 7 and model.path.name == "iter_0000007"
    assert model.config.model == stage.config
    for name, parameter in stage.named_parameters():
        assert torch.equal(parameter, model.stage.get_parameter(name)), name
    assert greedy(model.stage) == greedy(stage)


def test_half_precision_becomes_fp32_on_a_cpu(tmp_path, save, stage):
    model = restore_model(str(save(tmp_path, stage, precision=PrecisionConfig(dtype="bf16"))), 7, CPU)
    assert {parameter.dtype for parameter in model.stage.parameters()} == {torch.float32}


def test_a_folder_without_a_checkpoint_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="contains no checkpoint"):
        restore_model(str(tmp_path), 0, CPU)


def test_another_tokenizer_is_refused(tmp_path, save, stage):
    with pytest.raises(ConfigError, match="was trained with another tokenizer"):
        restore_model(str(save(tmp_path, stage, fingerprint="sha256:other")), 0, CPU)


def test_moved_tokenizer_files_can_be_given(saved):
    with pytest.raises(DataError, match="nowhere"):
        restore_model(str(saved), 0, CPU, tokenizer={"type": "HuggingFaceTokenizer", "model": "/nowhere"})


def test_a_manifest_without_config_is_an_error(tmp_path, stage):
    tensors = [parameter_tensor(entry, write=True) for entry in stage.named_parameters_global()]
    save_checkpoint(SaveRequest(tmp_path, 1, {}, Provenance()), tensors, LocalGroup("world"))
    with pytest.raises(CheckpointError, match="no config of model, tokenizer, precision"):
        restore_model(str(tmp_path), 0, CPU)


def run(saved, capsys, *words):
    assert command.run(["--load", str(saved), "--device", "cpu", "--max-new-tokens", "6", *words]) == 0
    return capsys.readouterr()


def test_the_command_continues_a_prompt(saved, stage, capsys):
    out, err = run(saved, capsys, "--prompt", "1 2 3", "--greedy")
    wanted = " ".join(str(token) for token in [1, 2, 3, *greedy(stage)[:6]])
    assert out.split() == wanted.split()
    assert "iteration 7" in err


def test_samples_of_a_prompt_do_not_depend_on_other_prompts(saved, capsys, tmp_path):
    (tmp_path / "prompts").write_text("4 5 6 7\n1 2\n")
    out, _ = run(saved, capsys, "--prompt-file", str(tmp_path / "prompts"), "--num-samples", "2", "--seed", "5")
    parts = [part.partition("---\n")[2].strip() for part in out.split("--- prompt ")[1:]]
    assert len(parts) == 4 and parts[0] != parts[1]
    alone, _ = run(saved, capsys, "--prompt", "1 2", "--seed", "6")
    assert alone.strip() == parts[3]


def test_the_command_reads_a_pipe_and_a_terminal(saved, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("1 2 3\n"))
    piped, _ = run(saved, capsys, "--greedy")

    class Keyboard(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr("sys.stdin", Keyboard("1 2 3\n" + "1 " * 40 + "\n1 2 3\n"))
    typed, err = run(saved, capsys, "--greedy")
    assert typed.count(piped.strip()) == 2
    assert "learned positions" in err  # the second prompt was too long, and the third still answered


def test_errors_of_the_command(saved, tmp_path, capsys):
    with pytest.raises(SystemExit):
        command.run(["--load", str(saved), "--prompt", "1", "--temperature", "-1"])
    assert "--temperature: '-1' is not a number from 0 to 1e+06" in capsys.readouterr().err
    with pytest.raises(DataError, match="--prompt-file"):
        command.run(["--load", str(saved), "--device", "cpu", "--prompt-file", str(tmp_path / "none")])
    with pytest.raises(SystemExit):
        command.run(["--load", str(saved), "--num-samples", "0"])
    assert "--num-samples" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command.run(["--load", str(saved), "--prompt", "1", "--max-new-tokens", "0"])
    assert "--max-new-tokens: '0' is not a whole number from 1 to" in capsys.readouterr().err


def test_the_manifest_is_json_of_the_config(saved, make_config):
    manifest = json.loads((saved / "iter_0000007" / "manifest.json").read_bytes())
    assert manifest["provenance"]["config"]["model"]["hidden_size"] == make_config().model.hidden_size


@pytest.fixture(scope="module")
def with_template(tmp_path_factory, save, stage):
    """Return a model whose tokenizer template adds tokens at both ends."""
    folder = tmp_path_factory.mktemp("template")
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<s>": 0, "</s>": 1, "h": 2, "i": 3, "?": 4}, "?"))
    library.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    library.add_special_tokens(["<s>", "</s>"])
    library.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    library.save(str(folder / "tokenizer.json"))
    config = TokenizerConfig(type="HuggingFaceTokenizer", model=str(folder))
    return save(folder / "saved", stage, fingerprint=build_tokenizer(config).fingerprint(), tokenizer=config)


@pytest.mark.parametrize(
    ("prompt", "flags", "fed"),
    [("hi", [], [2, 3]), ("hi", ["--prepend-bos"], [0, 2, 3]), ("", [], [1]), ("", ["--prepend-bos"], [0])],
)
def test_prompts_are_encoded_without_template(with_template, capsys, monkeypatch, prompt, flags, fed):
    told = []

    def generated(_, requests, **__):
        told.extend(list(request.prompt) for request in requests)
        return iter([(0, Generated())])

    monkeypatch.setattr("megatron_lite.generation.texts.generate", generated)
    run(with_template, capsys, "--prompt", prompt, *flags)
    assert told == [fed]


def test_a_tokenizer_without_an_end_of_document(with_template, capsys, monkeypatch):
    def none(_):
        raise DataError("none", fix="none")

    monkeypatch.setattr(HuggingFaceTokenizer, "eod", property(none))
    _, err = run(with_template, capsys, "--prompt", "hi", "--greedy")
    assert "no end-of-document token" in err
    with pytest.raises(ConfigError, match="has no tokens"):
        run(with_template, capsys, "--prompt", "")


def test_a_prompt_file_of_windows(saved, capsys, tmp_path):
    (tmp_path / "prompts").write_bytes("\ufeff4 5 6\r\n1\u20282\r\n".encode())
    out, _ = run(saved, capsys, "--prompt-file", str(tmp_path / "prompts"), "--greedy")
    assert out.startswith("--- prompt 1, sample 1 ---\n4 5 6")
    assert "--- prompt 2, sample 1 ---\n1\u20282" in out


def test_text_that_is_not_utf_8(saved, capsys, tmp_path, monkeypatch):
    (tmp_path / "prompts").write_bytes(b"1 2\n3 \xff\n")
    with pytest.raises(DataError, match="not UTF-8: byte 0xff in line 2, byte 3"):
        run(saved, capsys, "--prompt-file", str(tmp_path / "prompts"))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xef\xbb\xbf1 2 3\n")))
    assert run(saved, capsys, "--greedy")[0].startswith("1 2 3")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff")))
    with pytest.raises(DataError, match="standard input is not UTF-8"):
        run(saved, capsys)

    class Keyboard(io.TextIOWrapper):
        def isatty(self):
            return True

    monkeypatch.setattr("sys.stdin", Keyboard(io.BytesIO(b"1 \xff\n1 2 3\n"), errors="surrogateescape"))
    typed, err = run(saved, capsys, "--greedy")
    assert "not UTF-8" in err and typed.lstrip("> ").startswith("1 2 3")
