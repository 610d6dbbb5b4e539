"""Detector of host reads: fails when Python reads the values of a tensor, which on a GPU waits for the device.

On a CPU every tensor counts as one of the device, within `NoHostReads()` and outside of `allowed()`. The arguments of
`stream_seed` are excepted: they are host tensors on every device.
"""

from contextlib import contextmanager
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_lite.parallel import random

# Operators whose result is a Python number or has a size that depends on values. bool(), int() and float() of a tensor
# and indexing with a mask call them.
READING = {
    "_local_scalar_dense",
    "equal",
    "is_nonzero",
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_dim",
    "bincount",
}
# Methods that read memory without an operator.
METHODS = ("tolist", "numpy", "cpu", "__array__")


class NoHostReads(TorchDispatchMode):
    """Raises AssertionError at the host reads of operators and methods."""

    def __init__(self):
        super().__init__()
        self.watching = True
        self.patches = []

    def __enter__(self):
        for name in METHODS:
            original = getattr(torch.Tensor, name)

            def method(tensor, *args, original=original, name=name, **options):
                assert not self.watching, f"a host read: Tensor.{name}"
                return original(tensor, *args, **options)

            self.patches.append(mock.patch.object(torch.Tensor, name, method))
            self.patches[-1].start()

        def seed(*args, original=random.stream_seed):
            with self.allowed():
                return original(*args)

        self.patches.append(mock.patch.object(random, "stream_seed", seed))
        self.patches[-1].start()
        return super().__enter__()

    def __exit__(self, *error):
        for patch in self.patches:
            patch.stop()
        self.watching = False  # a method that was bound before may be called now
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.partition(".")[0]
        if self.watching:
            indices = args[1] if name in ("index", "index_put_") else ()
            masked = any(index is not None and index.dtype == torch.bool for index in indices)
            assert name not in READING and not masked, f"a host read: {func}"
        return func(*args, **(kwargs or {}))

    @contextmanager
    def allowed(self):
        """Do not watch: for values that are not of the device, or are read on purpose."""
        before, self.watching = self.watching, False
        try:
            yield
        finally:
            self.watching = before
