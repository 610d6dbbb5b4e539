"""Small models of every architecture, as Hugging Face folders and as checkpoints of several layouts."""

from __future__ import annotations

import dataclasses
import json
import logging

import pytest
import torch
from support.interop_models import VOCAB, run_config, save, save_on_rank
from support.megatron_files import read_state
from support.trainer import make_corpus

from megatron_lite.backend.environment import read_launch
from megatron_lite.backend.select import select_backend
from megatron_lite.checkpoint.reading import CheckpointReader
from megatron_lite.checkpoint.stored_model import stored_model
from megatron_lite.config.parallel import ParallelConfig
from megatron_lite.errors import CheckpointError
from megatron_lite.interop import transformers_logits, verify
from megatron_lite.interop.importing import ImportOptions, import_checkpoint
from megatron_lite.interop.megatron.opening import MegatronOptions
from megatron_lite.interop.streamed_logits import streamed_logits
from megatron_lite.rectangle import Rectangle


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def transformers(tmp_path_factory):
    logging.getLogger("transformers").setLevel(logging.ERROR)  # one line for each image processor without torchvision
    import transformers
    from transformers import dynamic_module_utils

    # Modeling files of exports are executed from there.
    dynamic_module_utils.HF_MODULES_CACHE = str(tmp_path_factory.mktemp("modules"))
    return transformers


@pytest.fixture(autouse=True)
def in_process(monkeypatch, transformers):
    """Comparisons with transformers run here: importing it costs five seconds in every process of its own."""

    def run(folder, request):
        transformers_logits.main([str(folder), str(request)])

    monkeypatch.setattr(verify, "run_apart", run)
    return run


@pytest.fixture
def make_checkpoint(tmp_path, on_ranks):
    """Saves a random model at a layout; returns the folder for --load."""

    def make(name="ck", tp=1, pp=1, dtype="fp32", iteration=7, **fields):
        parallel = ParallelConfig(tp=tp, pp=pp, world_size=tp * pp)
        config = dataclasses.replace(run_config(dtype, **fields), parallel=parallel)
        if tp * pp == 1:
            save(select_backend(config.runtime, parallel, read_launch({})), config, tmp_path / name, iteration)
        else:
            on_ranks(tp * pp, save_on_rank, config, tmp_path / name, iteration)
        return tmp_path / name

    return make


@pytest.fixture(scope="session")
def make_folder(tmp_path_factory, transformers):
    """Writes a random model as save_pretrained does, once a session; returns the folder, not to be changed."""
    made = {}

    def make(model_type, dtype="float32", **fields):
        key = (model_type, dtype, json.dumps(fields, sort_keys=True))
        if key not in made:
            torch.manual_seed(0)
            config = transformers.AutoConfig.for_model(model_type, **fields)
            model = transformers.AutoModelForCausalLM.from_config(config)
            with torch.no_grad():
                for param in model.parameters():
                    if param.dim() == 1:
                        param.add_(torch.randn_like(param) * 0.1)
            made[key] = tmp_path_factory.mktemp("hf") / "model"
            model.to(getattr(torch, dtype)).save_pretrained(made[key])
        return made[key]

    return make


@pytest.fixture(scope="session")
def small():
    """Fields of a small config, by the names that most classes use."""
    return {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": 64,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }


@pytest.fixture(scope="session")
def gpt2():
    """The same for GPT-2 and, but for n_positions, BLOOM."""
    return {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 0, "eos_token_id": 0}


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def original(make_checkpoint):
    """A random model: its tensors, its config, and the logits of some tokens."""

    def make(**fields):
        path = make_checkpoint("original", **fields) / "iter_0000007"
        source = CheckpointReader(path)
        model = stored_model(source.manifest, path).model
        tokens = torch.arange(40).view(2, 20) % VOCAB
        return read_state(path), model, streamed_logits(model, source, tokens), tokens

    return make


@pytest.fixture(scope="session")
def imported():
    """Imports a checkpoint of Megatron-LM or DeepSpeed; returns the report and the tensors."""

    def run(source, output, *flags, dtype=None, **options):
        chosen = ImportOptions(megatron=MegatronOptions(flags=flags, **options), verify=False, dtype=dtype)
        report = import_checkpoint(source, output, chosen)
        (path,) = output.glob("iter_*")
        return report, CheckpointReader(path)

    return run


@pytest.fixture(scope="session")
def same():
    """Asserts that the weights are those of a state, bit for bit."""

    def check(source, state):
        found = {name: tensor for name, tensor in source.tensors.items() if not name.startswith("optimizer.")}
        assert found.keys() == {name for name in state if not name.startswith("optimizer.")}
        for name in found:
            tensor = state[name]
            assert source.read(name, Rectangle.full(tensor.shape)).equal(tensor), name

    return check


@pytest.fixture
def refused(imported, tmp_path):
    """Asserts that an import is refused with a text, and leaves nothing."""

    def check(source, text, *flags, error=CheckpointError, **options):
        with pytest.raises(error, match=text):
            imported(source, tmp_path / "out" / "ck", *flags, **options)
        assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())

    return check
