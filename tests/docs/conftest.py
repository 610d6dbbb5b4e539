"""Fixtures for tests of the documentation's commands: toy files, a shell, a local hub, checks by transformers."""

import logging

import pytest
import torch
from support.hub_server import HubServer
from support.page_shell import PageShell
from support.toy_files import ToyFiles

from megatron_lite.interop import transformers_logits, verify


@pytest.fixture(scope="session")
def toy_files(tmp_path_factory):
    return ToyFiles(tmp_path_factory.mktemp("toy"))


@pytest.fixture
def hub(monkeypatch):
    from huggingface_hub import constants

    made = HubServer("ada", orgs=[("you", "write"), ("USER", "write")])
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    monkeypatch.setattr(constants, "ENDPOINT", made.endpoint)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    yield made
    made.close()


@pytest.fixture
def shell(toy_files, tmp_path, monkeypatch, hub):
    def compare(folder, request):
        logging.getLogger("transformers").setLevel(logging.ERROR)
        transformers_logits.main([str(folder), str(request)])

    # A process of its own would import transformers each time, for 5 seconds.
    monkeypatch.setattr(verify, "run_apart", compare)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    shell = PageShell(tmp_path, toy_files)
    yield shell
    shell.close()
    torch.set_num_threads(threads)
