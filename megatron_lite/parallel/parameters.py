"""A parameter as the whole model knows it: its global name and shape, and which part of it lies here."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class NamedParameter:
    """One parameter of a stage.

    The local tensor, viewed as `local_shape`, sits at `offset` of the global one. Both shapes are logical: padded
    vocabulary rows are not in them. A gated MLP's first weight is (2, ffn, h) globally, so that a tensor-parallel
    part of it is one rectangle.
    """

    name: str
    """Global and free of layout: layers are numbered over the whole model."""
    param: nn.Parameter
    global_shape: tuple[int, ...]
    tp_dim: int | None
    """The dim of global_shape that tensor parallelism splits; None: every tp rank holds the whole."""
    local_shape: tuple[int, ...]
    offset: tuple[int, ...]
    owned: bool = True
    """False for the second copy of a tied weight: it is counted in norms, and saved, elsewhere."""
    sequence_parallel: bool = False
    """Whole on each tp rank, but each sees a part of the sequence (or of the heads): gradients add up over tp."""

    def local(self, tensor: Tensor | None = None) -> Tensor:
        """The logical part of this parameter, or of a tensor shaped like it (gradient, moment): a view, no copy.

        Args:
            tensor: same number of elements as the parameter; None: the parameter's data.

        Returns:
            A view shaped `local_shape`; padded vocabulary rows are cut off.
        """
        whole = (self.param.data if tensor is None else tensor).view(self.param.shape)
        if len(self.local_shape) == whole.dim() and self.local_shape[0] < whole.shape[0]:
            whole = whole[: self.local_shape[0]]
        return whole.view(self.local_shape)
