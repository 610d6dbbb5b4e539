"""One thread for the checkpoint tests, whose tensors are small."""

import pytest
import torch
from support.checkpoints import kit, on_ranks

__all__ = ["kit", "on_ranks"]


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)
