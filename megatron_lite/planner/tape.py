"""Tape of a simulated forward and backward pass: bytes of live tensors, counted as autograd allocates and frees them.

A storage is freed with its last reference: a Python variable, a node of the graph that saved it, or a gradient buffer.
The operators are those of the model (planner/operators.py).
"""

from __future__ import annotations

from collections.abc import Callable


class Storage:
    """Memory of one or several tensors.

    Attributes:
        size: bytes.
        references: holders; at 0 the memory is free.
    """

    __slots__ = ("references", "size")

    def __init__(self, size: int) -> None:
        self.size = size
        self.references = 1


class Value:
    """Tensor of the forward pass, with its gradient during backward.

    Attributes:
        storage: its memory; of a view, that of another tensor.
        elements: number of elements.
        itemsize: bytes of an element.
        gradient: memory of the gradient; None: there is none yet.
    """

    __slots__ = ("elements", "gradient", "itemsize", "storage")

    def __init__(self, storage: Storage, elements: int, itemsize: int) -> None:
        self.storage = storage
        self.elements = elements
        self.itemsize = itemsize
        self.gradient: Storage | None = None

    @property
    def size(self) -> int:
        """Return the bytes of the tensor, and of its gradient."""
        return self.elements * self.itemsize


class Deferred:
    """Operands of a weight gradient that backward left for later, and the temporary bytes of its product."""

    __slots__ = ("operands", "temporary")

    def __init__(self, operands: tuple[Storage, ...], temporary: int) -> None:
        self.operands = operands
        self.temporary = temporary


class Tape:
    """Live bytes of a pass, and the graph that it records.

    Args:
        saves: record nodes for backward; False: a forward pass without them, as in a recomputed unit.

    Attributes:
        live: bytes now.
        peak: most bytes since the last reset_peak.
        deferred: weight gradients that backward left for later.
    """

    def __init__(self, *, saves: bool = True) -> None:
        self.live = self.peak = 0
        self.saves = saves
        self.deferred: list[Deferred] = []
        self._nodes: list[tuple[tuple[Storage, ...], Callable[[], None]]] = []

    def reset_peak(self) -> None:
        """Count the peak from here on."""
        self.peak = self.live

    def new(self, size: int) -> Storage:
        """Allocate memory, with one reference."""
        self.live += size
        if self.live > self.peak:
            self.peak = self.live
        return Storage(size)

    def tensor(self, elements: int, itemsize: int) -> Value:
        """Allocate a tensor of the forward pass."""
        return Value(self.new(elements * itemsize), elements, itemsize)

    def keep(self, held: Storage | Value) -> Storage:
        """Add a reference to a storage, and return the storage."""
        storage = held.storage if isinstance(held, Value) else held
        storage.references += 1
        return storage

    def drop(self, *held: Storage | Value) -> None:
        """Drop a reference of each."""
        for entry in held:
            storage = entry.storage if isinstance(entry, Value) else entry
            storage.references -= 1
            if storage.references == 0:
                self.live -= storage.size

    def view(self, x: Value, elements: int) -> Value:
        """Return a view of a tensor, with a reference of its own."""
        return Value(self.keep(x), elements, x.itemsize)

    def node(self, backward: Callable[[], None], *saved: Value | Storage) -> None:
        """Record an operator with the tensors that it saves; they are freed when its backward has run."""
        if self.saves:
            self._nodes.append((tuple(self.keep(one) for one in saved), backward))

    def add_gradient(self, value: Value, gradient: Storage) -> None:
        """Add a gradient, whose reference passes to the tensor; autograd adds in place if it holds the only one."""
        held = value.gradient
        if held is None:
            value.gradient = gradient
        elif held.references == 1:
            self.drop(gradient)
        else:
            value.gradient = self.new(value.size)
            self.drop(held, gradient)

    def take_gradient(self, value: Value) -> Storage:
        """Return the gradient of an operator's output, and its reference."""
        gradient, value.gradient = value.gradient, None
        assert gradient is not None, "an operator's output has no gradient"
        return gradient

    def backward(self) -> None:
        """Run all recorded nodes, the last first; the output must have its gradient."""
        while self._nodes:
            saved, backward = self._nodes.pop()
            backward()
            self.drop(*saved)
