"""A ladder model whose weights, gradients and moments are shared among the processes of a run: PyTorch's FSDP2.

A process holds one part of every parameter, cut along its first dimension. A block's weights are whole on a device while that block is
computed, and no longer; its gradients are summed over processes as they are made, and each process keeps its own part. Numbers are those
of one device: weights travel in float32, and sums are divided nowhere.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.utils.checkpoint import checkpoint

from cuda_backend import cross_entropy
from cuda_backend.architectures import functions_of
from mlx_forget.ladder import ModelSpec, block_prefix, head_name, param_shapes

Weights = Mapping[str, Tensor]


class _Part(nn.Module):
    """Parameters under their names in the checkpoint, which may have dots."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__()
        self.names = {name: f"p{number}" for number, name in enumerate(shapes)}
        for name, shape in shapes.items():
            self.register_parameter(self.names[name], nn.Parameter(torch.empty(shape, device="meta")))

    def own(self) -> dict[str, Tensor]:
        """The parameters as they are now: whole within a forward or backward pass, parts outside."""
        return {name: getattr(self, attribute) for name, attribute in self.names.items()}


class _Block(_Part):
    def __init__(self, shapes: Mapping[str, tuple[int, ...]], compute: Callable[..., Tensor], *, grad_checkpoint: bool) -> None:
        super().__init__(shapes)
        self.compute, self.grad_checkpoint = compute, grad_checkpoint

    def forward(self, x: Tensor, *context: Any) -> Tensor:
        if not (self.grad_checkpoint and torch.is_grad_enabled()):
            return self.compute(self.own(), x, *context)
        # Weights are read when the block is computed, the second time too: in between they are parts again.
        result: Tensor = checkpoint(lambda x: self.compute(self.own(), x, *context), x, use_reentrant=False)
        return result


class _Model(_Part):
    """A ladder model with its loss, so that the head is whole where it is used."""

    def __init__(
        self,
        spec: ModelSpec,
        dtype: torch.dtype,
        chunk: int,
        compile_block: Callable[..., Callable[..., Any]],
        *,
        grad_checkpoint: bool,
    ) -> None:
        functions = functions_of(spec)
        prefixes = [block_prefix(spec, i) for i in range(spec.num_layers)]
        shapes = param_shapes(spec)
        super().__init__({name: shape for name, shape in shapes.items() if not name.startswith(tuple(prefixes))})
        compute = compile_block(functions.block)
        # Every block is computed under the names of the first: one compiled function serves all.
        self.blocks = nn.ModuleList(
            _Block(
                {prefixes[0] + name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)},
                lambda own, x, *context: compute(own, prefixes[0], spec, x, *context),
                grad_checkpoint=grad_checkpoint,
            )
            for prefix in prefixes
        )
        softmax = compile_block(cross_entropy.softmax_gradient)
        self.softmax = None if softmax is cross_entropy.softmax_gradient else softmax
        self.prefixes, self.spec, self.dtype, self.chunk, self.functions = prefixes, spec, dtype, chunk, functions

    def forward(self, tokens: Tensor, labels: Tensor, weight: Tensor | None, segment: Tensor | None) -> tuple[Tensor, Tensor]:
        """(objective, nll [N]); the objective is that of FusedCrossEntropy, and 0 without a weight float32[N]."""
        with torch.autocast(tokens.device.type, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            x, context = self.functions.begin(self.own(), self.spec, tokens, segment)
            for block in self.blocks:
                x = block(x, *context)
            x = self.functions.finish(self.own(), x)
        x, head = x.flatten(0, 1).to(self.dtype), self.own()[head_name(self.spec)]
        if weight is None:
            return x.new_zeros(()), cross_entropy.token_nll(x, head, labels, self.chunk)
        objective, nll = cross_entropy.FusedCrossEntropy.apply(  # type: ignore[no-untyped-call]
            x, head, labels, weight, self.chunk, self.softmax
        )
        return objective, nll

    def parameters_by_name(self) -> dict[str, Tensor]:
        """All parameters in the names and the order of a checkpoint."""
        found = self.own()
        for prefix, block in zip(self.prefixes, self.blocks, strict=True):
            assert isinstance(block, _Block)
            found |= {prefix + name.removeprefix(self.prefixes[0]): value for name, value in block.own().items()}
        return {name: found[name] for name in param_shapes(self.spec)}


class Shards:
    """This process's part of a model that all processes of a run hold together."""

    def __init__(
        self,
        spec: ModelSpec,
        start: Iterable[tuple[str, Any]],
        device: torch.device,
        dtype: torch.dtype,
        chunk: int,
        compile_block: Callable[..., Callable[..., Any]],
        *,
        grad_checkpoint: bool,
    ) -> None:
        self._rank, self._size, self._device = dist.get_rank(), dist.get_world_size(), device
        self._mesh = init_device_mesh(device.type, (self._size,))
        self._model = _Model(spec, dtype, chunk, compile_block, grad_checkpoint=grad_checkpoint)
        for part in (*self._model.blocks, self._model):
            fully_shard(part, mesh=self._mesh)
            assert isinstance(part, FSDPModule)
            # The core divides by the token counts of all processes: here sums stay sums.
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)
        self._model.to_empty(device=device)
        self._shapes = param_shapes(spec)
        # The first pass lays the parts out; from then on they are only written into, and the optimiser steps them in place.
        nothing = torch.zeros(1, 1, dtype=torch.int64, device=device)
        self.token_nll(nothing, nothing[0], None)
        self.weights = {name: _local(value) for name, value in self._model.parameters_by_name().items()}
        for name, value in start:
            self.weights[name].copy_(self._part_of(torch.from_numpy(value)))

    def loss(self, tokens: Tensor, labels: Tensor, weight: Tensor, segment: Tensor | None) -> Tensor:
        """The nll float32[N] of some rows; their gradient is added to this process's parts. All processes call this together."""
        objective, nll = self._model(tokens, labels, weight, segment)
        objective.backward()
        result: Tensor = nll
        return result

    @torch.no_grad()
    def token_nll(self, tokens: Tensor, labels: Tensor, segment: Tensor | None) -> Tensor:
        """The nll float32[N] of some rows. All processes call this together."""
        _, nll = self._model(tokens, labels, None, segment)
        # The outermost part stays whole for a backward pass that does not come.
        assert isinstance(self._model, FSDPModule)
        self._model.reshard()
        result: Tensor = nll
        return result

    def gradients(self) -> dict[str, Tensor]:
        """This process's parts of the gradients, summed over processes."""
        found = self._model.parameters_by_name()
        return {
            name: torch.zeros_like(self.weights[name]) if value.grad is None else _local(value.grad)
            for name, value in found.items()
        }

    def parameters(self) -> list[Tensor]:
        """What the backward pass leaves gradients on."""
        return list(self._model.parameters())

    def norm(self, gradients: Weights) -> Tensor:
        """The norm of the whole gradient, a scalar on the device, the same on every process."""
        squares = torch.stack([value.square().sum() for value in gradients.values()]).sum()
        dist.all_reduce(squares)
        return squares.sqrt()

    def largest(self, count: int) -> int:
        """The largest of a number that each process has."""
        counts = torch.zeros(1, dtype=torch.int64).fill_(count)
        dist.all_reduce(counts, op=dist.ReduceOp.MAX)
        return int(counts)

    def whole(self, parts: Weights) -> dict[str, Tensor]:
        """Whole tensors on the host of rank 0 from parts in the shapes of the weights, one at a time; empty on the other ranks."""
        gathered = {}
        for name, part in parts.items():
            shape = torch.Size(self._shapes[name.split(".", 1)[1] if name.startswith("exp_avg") else name])
            stride = torch.empty(shape, device="meta").stride()
            full = DTensor.from_local(part, self._mesh, [Shard(0)], run_check=False, shape=shape, stride=stride).full_tensor()
            if self._rank == 0:
                gathered[name] = full.cpu()
        return gathered

    def read(self, path: Path, names: Mapping[str, str]) -> dict[str, Tensor]:
        """This process's parts of tensors in a file, float32, besides a step count; nothing where the file holds other tensors.

        Args:
            names: {name in the file: the weight that has its shape}.
        """
        found = {}
        with safe_open(path, framework="pt", device="cpu") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            shapes.pop("lm_head.weight", None)
            if "step" in shapes:
                found["step"] = file.get_tensor("step").to(self._device)
                del shapes["step"]
            if shapes != {stored: self._shapes[name] for stored, name in names.items()}:
                return {}
            for stored, name in names.items():
                rows = self._rows(self._shapes[name][0])
                found[stored] = file.get_slice(stored)[rows.start : rows.stop].float().to(self._device)
        return found

    def _part_of(self, whole: Tensor) -> Tensor:
        return whole[self._rows(len(whole))]

    def _rows(self, count: int) -> slice:
        """The rows of this process, as FSDP2 cuts: parts of one size, the last ones smaller or empty."""
        size = -(-count // self._size)
        return slice(min(count, self._rank * size), min(count, (self._rank + 1) * size))


def _local(value: Tensor) -> Tensor:
    return value.to_local().detach() if isinstance(value, DTensor) else value.detach()
