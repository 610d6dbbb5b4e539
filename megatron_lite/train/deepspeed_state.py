"""DeepSpeed optimizer state: this rank's fp32 parameters and moments as slices of global tensors, at any ZeRO stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_lite.optim.element_sums import squares_of
from megatron_lite.parallel.mesh import Mesh
from megatron_lite.parallel.parameters import NamedParameter
from megatron_lite.parallel.tensors import GlobalTensor, Piece, parameter_tensor
from megatron_lite.rectangle import rectangles_of_range
from megatron_lite.train.deepspeed_swap import SwapFiles


@dataclass(frozen=True, eq=False)
class Fragment:
    """Elements of a parameter whose optimizer state this rank has.

    Attributes:
        parameter: on this rank, with its shape before ZeRO stage 3 partitions it.
        start: first element in the flattened parameter.
        flat: [n] fp32 main parameters of a partition, empty if they are in a swap file; key of the optimizer's state.
        position: of the fragment in `flat`.
        length: elements, padding at the end included.
    """

    parameter: NamedParameter
    start: int
    flat: Tensor
    position: int
    length: int

    def view(self, flat: Tensor) -> Tensor:
        """Return the fragment of a tensor that is as long as the partition."""
        return flat.view(-1)[self.position : self.position + self.length]


class OptimizerState:
    """Weights, main parameters and moments of this rank as views of DeepSpeed's tensors or swap files.

    Attributes:
        files: swap files of what is offloaded to NVMe.

    Args:
        zero: DeepSpeed's optimizer, or torch's at stage 0.
        optimizer: torch's optimizer, which `zero` steps.
        stage: ZeRO stage.
        parameters: of this rank.
        mesh: this rank's groups.
    """

    def __init__(
        self, zero: Any, optimizer: torch.optim.Optimizer, stage: int, parameters: Sequence[NamedParameter], mesh: Mesh
    ) -> None:
        self._zero = zero
        self._optimizer = optimizer
        self._stage = stage
        self._parameters = parameters
        self._mesh = mesh
        self.files = SwapFiles(zero)
        self._fragments = [
            fragment for parameter in parameters if parameter.trained for fragment in self._find(parameter)
        ]
        for flat in self._partitions():
            with self.files.in_memory(flat):
                self._start(flat)

    def tensors(self) -> list[GlobalTensor]:
        """Return weights under their own names, main parameters unless the weights are fp32, and moments."""
        weights = [self._weight(parameter) for parameter in self._parameters]
        found = [tensor for tensor in weights if tensor.pieces]
        states = {id(flat): {"main_param": self._main(flat), **self._moments(flat)} for flat in self._partitions()}
        for fragment in self._fragments:
            for name, flat in states[id(fragment.flat)].items():
                if name == "main_param" and not self._is_half(fragment):
                    continue
                tensor = self._global(f"optimizer.{name}", fragment, fragment.view(flat.detach()))
                found += [tensor] if tensor.pieces else []
        return found

    def adopt(self) -> None:
        """Take over values that were written to the tensors; a collective call at stage 3."""
        with torch.no_grad():
            mains = {id(flat): self._main(flat) for flat in self._partitions()}
            for fragment in self._fragments:
                if not self._is_half(fragment) and self._stage:
                    fragment.view(mains[id(fragment.flat)]).copy_(self._values(fragment))
            self.files.flush()
            persistent = getattr(self._zero, "persistent_parameters", [])
            if self._stage == 3 and persistent:
                # Small parameters stay gathered between iterations.
                for param in persistent:
                    param.partition()
                persistent[0].all_gather(persistent)

    def set_step(self, applied: int) -> None:
        """Set the number of steps so far, for Adam's bias correction."""
        for flat in self._partitions():
            if "step" in self._optimizer.state[flat]:
                self._optimizer.state[flat]["step"].fill_(applied)

    def squared_norm(self) -> Tensor:
        """Return the sum of squares of all trained parameters; a collective call; a scalar."""
        backend = self._mesh.backend
        total = torch.zeros((), dtype=backend.sum_dtype, device=backend.device)
        mains = {id(flat): self._main(flat) for flat in self._partitions()}
        for fragment in self._fragments:
            if self._counts(fragment.parameter):
                real = fragment.view(mains[id(fragment.flat)])[: fragment.parameter.rectangle.numel - fragment.start]
                total += squares_of(real.detach(), total.dtype).to(total.device)
        group = self._mesh.group("tp", "cp", "dp") if self._stage else self._mesh.tp
        group.all_reduce_(total)
        return total

    def state_bytes(self) -> dict[str, int]:
        """Return the bytes of this rank's main parameters and moments."""
        partitions = self._partitions()
        moments = sum(moment.nbytes for flat in partitions for moment in self._moments(flat).values())
        return {
            "main parameters": sum(self._main(flat).nbytes for flat in partitions) if self._stage else 0,
            "moments": moments,
        }

    def _partitions(self) -> list[Tensor]:
        """Return the partitions, at stage 3 in the order in which DeepSpeed swaps them."""
        if self._stage == 3:
            return list(self._zero.fp32_partitioned_groups_flat)
        return list({id(fragment.flat): fragment.flat for fragment in self._fragments}.values())

    def _find(self, parameter: NamedParameter) -> list[Fragment]:
        """Return the fragment of a parameter on this rank; none if other ranks have all of it."""
        param: Any = parameter.param
        if self._stage == 0:
            return [Fragment(parameter, 0, param, 0, param.numel())]
        if self._stage == 3:
            group, position, length = self._zero.grad_position[self._zero.get_param_id(param)]
            flat = self._zero.fp32_partitioned_groups_flat[group]
            return [Fragment(parameter, length * self._mesh.replicas.rank, flat, position, length)]
        mapping = param._hp_mapping
        if mapping is None:
            return []
        flat = self._zero.single_partition_of_fp32_groups[mapping.param_group_index]
        place = mapping.get_hp_fragment_address()
        return [Fragment(parameter, mapping.lp_fragment_address.start, flat, place.start, place.numel)]

    def _start(self, flat: Tensor) -> None:
        """Create the optimizer's state of a partition, as its first step would, so that it can be loaded."""
        names = ["momentum_buffer"] if isinstance(self._optimizer, torch.optim.SGD) else ["exp_avg", "exp_avg_sq"]
        if "momentum_buffer" in names and not self._optimizer.defaults["momentum"]:
            return
        state: dict[str, Tensor] = {name: torch.zeros_like(flat, requires_grad=False) for name in names}
        if "exp_avg" in state:
            fused = self._optimizer.defaults["fused"]
            state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device if fused else "cpu")
        self._optimizer.state[flat] = state

    def _moments(self, flat: Tensor) -> dict[str, Tensor]:
        """Return the moments of a partition by their names in checkpoints."""
        state: Mapping[str, Tensor] = self._optimizer.state[flat]
        names = {"exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq", "momentum_buffer": "momentum"}
        return {name: self.files.state(flat, state[key]) for key, name in names.items() if key in state}

    def _main(self, flat: Tensor) -> Tensor:
        """Return the main parameters of a partition, [n]."""
        return self.files.state(flat, flat)

    def _is_half(self, fragment: Fragment) -> bool:
        return fragment.parameter.param.dtype != torch.float32

    def _values(self, fragment: Fragment) -> Tensor:
        """Return the fragment's elements of the weight, [n]."""
        param: Any = fragment.parameter.param
        if self._stage == 3:
            return self.files.shard(param).view(-1)[: fragment.length]
        return param.data.view(-1)[fragment.start : fragment.start + fragment.length]

    def _counts(self, parameter: NamedParameter) -> bool:
        """Return whether this rank's tp coordinate counts and saves the parameter."""
        return parameter.tp_dim is not None or self._mesh.tp.rank == 0

    def _weight(self, parameter: NamedParameter) -> GlobalTensor:
        """Return a weight: complete on each replica, or at stage 3 this replica's shard."""
        group = self._mesh.replicas
        if self._stage < 3:
            if not self._counts(parameter):
                return parameter_tensor(parameter, write=False)
            return parameter_tensor(parameter, write=group.rank == 0, replica=(group.rank, group.size))
        shard = self.files.shard(parameter.param)
        fragment = Fragment(parameter, shard.numel() * group.rank, shard, 0, shard.numel())
        return self._global("", fragment, shard.detach())

    def _global(self, prefix: str, fragment: Fragment, values: Tensor) -> GlobalTensor:
        """Return the global tensor of which a fragment's values are a part.

        Args:
            prefix: of the name; empty: the weight itself.
            fragment: its place.
            values: [n].
        """
        parameter = fragment.parameter
        local, begin = parameter.rectangle, 0
        start = min(fragment.start, local.numel)
        pieces = []
        for block in rectangles_of_range(local.shape, start, min(start + values.numel(), local.numel)):
            view = values[begin : begin + block.numel].view(block.shape)
            pieces.append(Piece(block.shifted(local.offset).offset, view))
            begin += block.numel
        name = f"{prefix}.{parameter.name}" if prefix else parameter.name
        group = self._mesh.replicas
        counts = self._counts(parameter)
        replica = (group.rank, group.size) if self._stage == 0 and counts else (0, 1)
        write = counts and replica[0] == 0
        return GlobalTensor(name, parameter.global_shape, values.dtype, pieces, write, replica)
