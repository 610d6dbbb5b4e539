"""Hidden states and their gradients between neighbouring stages, in the order that the program fixes."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_lite.backend.group import Group, Work


class Messages:
    """Sends without waiting, receives with waiting.

    The program's order is one in which even a send that blocks until it is received cannot deadlock
    (schedules/lowering.py), so a send may be waited for as late as the next one; that keeps at most one tensor alive
    for the transport.

    Args:
        group: the pp axis.
        device: where tensors lie.
    """

    def __init__(self, group: Group, device: torch.device) -> None:
        self._group = group
        self._device = device
        self._sending: list[tuple[Work, Tensor]] = []

    def send(self, tensor: Tensor, peer: int) -> None:
        """Starts sending; `tensor` must not change until the next send or finish."""
        self.finish()
        tensor = tensor.contiguous()
        self._sending.append((self._group.send(tensor, peer), tensor))

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype, peer: int) -> Tensor:
        """A tensor of the given shape from a peer's next message to this rank."""
        tensor = torch.empty(shape, dtype=dtype, device=self._device)
        self._group.recv_(tensor, peer).wait()
        return tensor

    def finish(self) -> None:
        """Waits for the send that is under way."""
        for work, _ in self._sending:
            work.wait()
        self._sending.clear()
