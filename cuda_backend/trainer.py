"""The PyTorch trainer: CUDA where a GPU is, the CPU otherwise (announced)."""

import math
import sys
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cuda_backend import compare, devices, lora
from cuda_backend.allocator import keep_freed_memory
from cuda_backend.decoder import build_decoder
from cuda_backend.distributed import TorchGroup, join
from cuda_backend.optimizer import make_optimizer
from cuda_backend.passes import Passes
from cuda_backend.reference import add_penalty_gradients, pull_to_reference
from cuda_backend.step import TorchStep
from cuda_backend.weights import new_adapters, read_weights, start_weights
from mlx_forget.adapter_dropout import row_keys
from mlx_forget.adapters import file_name, is_adapter, trained_names
from mlx_forget.comparison import MEASURES, portions
from mlx_forget.distributed import Group
from mlx_forget.errors import OutOfMemory, UserError
from mlx_forget.ladder import outputs_first
from mlx_forget.methods import NUM_SOURCES, NUM_TERMS, TERM_REPLAY_KL
from mlx_forget.pretrained import PretrainedSpec
from mlx_forget.trainer import (
    Batch,
    Capabilities,
    Comparison,
    ModelSpec,
    Precision,
    StepResult,
    Trainer,
    TrainerSpec,
    check_reference,
    group_counts,
    kl_weights,
    token_weights,
)

_EVAL_TOKENS = 1 << 13


class TorchTrainer(Trainer):
    """A model and its optimiser on one device, or on one device of each process of a run."""

    def __init__(self, spec: TrainerSpec) -> None:
        runtime = spec.runtime
        self.spec = spec
        self._notes: list[str] = []
        self.group = join()
        self._torch_device = devices.choose_device(runtime.device, self.group, self._notes)
        if runtime.num_threads is not None:
            torch.set_num_threads(runtime.num_threads)
        elif self._torch_device.type == "cpu" and "mlx.core" in sys.modules and torch.get_num_threads() == 1:
            # The two share one BLAS, which MLX wants on one thread; PyTorch takes over its number when it is imported.
            self._notes.append("PyTorch runs on one thread, because MLX was loaded before it in this process: give num_threads.")
        if runtime.shard and self.group.size == 1:
            self._notes.append("One process has nobody to share weights with: --shard does nothing.")
        if runtime.memory_limit_gb is not None and not runtime.reads_only:
            devices.limit_memory(self._torch_device, spec, self.group.size, runtime.memory_limit_gb)
        if self._torch_device.type == "cpu" and runtime.memory_limit_gb is None:
            keep_freed_memory()
        self._compiled = devices.compiler(runtime, self._torch_device, self._notes)
        self._portions = portions(
            spec.model,
            compare.most(spec.model.vocab_size, self._torch_device),
            limit_gb=runtime.memory_limit_gb if runtime.reads_only else None,
            used_bytes=self.used_memory_bytes(),
        )
        self._outputs_first = outputs_first(spec.model)
        self._decoder = build_decoder(spec.model, self._torch_device, reads_only=runtime.reads_only)
        self._passes = Passes(spec, self._decoder, self._torch_device, self._compiled)
        self._weights = self._start_weights()
        self._trained = trained_names(self._weights, spec.adapter, spec.num_layers)
        self._micro_batch_size = runtime.micro_batch_size
        self._optimizer = make_optimizer(spec.optim, self._trained_weights())
        self._reference: dict[str, Tensor] | None = None
        self._fisher: dict[str, Tensor] | None = None

    @classmethod
    def describe(cls) -> Capabilities:
        return devices.capabilities()

    @classmethod
    def join(cls) -> Group:
        return join()

    @property
    def device(self) -> str:
        if self._torch_device.type == "cuda":
            return torch.cuda.get_device_name(self._torch_device)
        return f"cpu ({torch.get_num_threads()} threads)"

    @property
    def notes(self) -> tuple[str, ...]:
        return tuple(self._notes)

    def train_step(self, batch: Batch, learning_rate: float) -> StepResult:
        counts = self.group.all_sum(group_counts(batch, self.spec.method))
        token_weight, kl_weight = token_weights(batch, counts, self.spec.method), kl_weights(batch, counts, self.spec.method)
        check_reference(
            self.spec.method, reference=self._reference is not None or batch.reference is not None, fisher=self._fisher is not None
        )
        sums = self._gradients_that_fit(batch, token_weight, kl_weight)
        gradients, sums = self._summed_gradients(sums)
        norm, skipped = self._update(gradients, learning_rate)
        return TorchStep(torch.cat([sums, torch.stack([norm, skipped])]), counts)

    def _summed_gradients(self, sums: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Gradients and loss sums of all processes."""
        gradients = {n: torch.zeros_like(v) if v.grad is None else v.grad for n, v in self._trained_weights().items()}
        *summed, sums = self._summed([*gradients.values(), sums])
        return dict(zip(gradients, summed, strict=True)), sums

    def _summed(self, tensors: list[Tensor]) -> list[Tensor]:
        return self.group.sum_tensors(tensors) if isinstance(self.group, TorchGroup) else tensors

    def _gradients_that_fit(
        self, batch: Batch, token_weight: npt.NDArray[np.float32], kl_weight: npt.NDArray[np.float32] | None
    ) -> Tensor:
        """`_batch_gradients` in micro-batches that the device holds: where it runs out of memory, from then on in half as many rows."""
        while True:
            try:
                return self._batch_gradients(batch, token_weight, kl_weight)
            except torch.OutOfMemoryError as error:
                rows = self._micro_batch_size or len(batch.tokens)
                if rows <= 1:
                    raise OutOfMemory(
                        f"One row at a time is more than the device holds ({str(error).splitlines()[0]}): use --grad-checkpoint, "
                        "--shard with more processes, or a smaller model."
                    ) from None
            # Here the error is gone, and with it the activations that its traceback held.
            self._micro_batch_size = math.ceil(rows / 2)
            self._clear_gradients()
            if self._torch_device.type == "cuda":
                torch.cuda.empty_cache()

    def _batch_gradients(
        self, batch: Batch, token_weight: npt.NDArray[np.float32], kl_weight: npt.NDArray[np.float32] | None
    ) -> Tensor:
        """Add the gradients of all rows of this rank to those of the weights; returns the loss sums, float32[terms * sources]."""
        group = self._passes.on_device(batch.term.astype(np.int64) * NUM_SOURCES + batch.source)
        kl_group = self._passes.on_device(batch.source.astype(np.int64) + TERM_REPLAY_KL * NUM_SOURCES)
        sums = torch.zeros(NUM_TERMS * NUM_SOURCES, device=self._torch_device)
        # A rank may have no rows.
        size = self._micro_batch_size or max(1, len(batch.tokens))
        for start in range(0, len(batch.tokens), size):
            rows = slice(start, start + size)
            nll, kl = self._accumulate_gradient(batch, rows, token_weight[rows], None if kl_weight is None else kl_weight[rows])
            mask = self._passes.on_device(batch.loss_mask[rows])
            sums.index_add_(0, group[rows], (nll * mask).sum(1))
            if kl is not None:
                sums.index_add_(0, kl_group[rows], (kl * mask).sum(1))
        return sums

    def _accumulate_gradient(
        self, batch: Batch, rows: slice, weight: npt.NDArray[np.float32], kl_weight: npt.NDArray[np.float32] | None
    ) -> tuple[Tensor, Tensor | None]:
        weights = self._folded(keys=self._dropout_keys(batch, rows))
        return self._passes.accumulate_gradient(weights, self._reference, batch, rows, weight, kl_weight)

    def _dropout_keys(self, batch: Batch, rows: slice) -> Tensor | None:
        """What decides which inputs the adapters of a pass drop, int32[modules, rows]; None where they drop none."""
        if self.spec.adapter is None or not self.spec.adapter.dropout:
            return None
        modules = lora.modules_of(self._weights)
        keys = row_keys(self.spec.seed, batch.step, self.group.rank, num_rows=len(batch.tokens), modules=modules)
        return self._passes.on_device(np.ascontiguousarray(keys[:, rows]).view(np.int32))

    def token_losses(self, tokens: npt.NDArray[np.int32], segment: npt.NDArray[np.int32] | None = None) -> npt.NDArray[np.float32]:
        found = np.empty((len(tokens), tokens.shape[1] - 1), np.float32)
        weights = self._folded()
        for rows in self._eval_slices(tokens):
            inputs, labels = self._passes.split(tokens[rows])
            own = None if segment is None else self._passes.on_device(segment[rows])
            found[rows] = self._token_nll(weights, inputs, labels, own).view(inputs.shape).cpu().numpy()
        return found

    def _token_nll(self, weights: dict[str, Tensor], inputs: Tensor, labels: Tensor, segment: Tensor | None) -> Tensor:
        return self._passes.token_nll(weights, inputs, labels, segment)

    def log_probs(
        self, tokens: npt.NDArray[np.int32], segment: npt.NDArray[np.int32] | None = None, *, from_reference: bool = False
    ) -> npt.NDArray[np.float32]:
        weights = self._reference if from_reference else self._folded()
        if weights is None:
            raise UserError("Log-probabilities of the reference need one: call set_reference first.")
        weights = {name: value.float() for name, value in weights.items()}
        inputs, _ = self._passes.split(tokens)
        own = None if segment is None else self._passes.on_device(segment)
        return self._passes.log_probs(weights, inputs, own).cpu().numpy()

    def compare(self, tokens: npt.NDArray[np.int32], mask: npt.NDArray[np.uint8]) -> Comparison:
        if self._reference is None:
            raise UserError("compare needs a reference: call set_reference first.")
        reference = {name: value.float() for name, value in self._reference.items()}
        weights, sizes = self._folded(), self._portions
        shared = self._decoder.num_shared_blocks(weights, reference)
        measures = np.zeros((len(MEASURES), len(tokens), tokens.shape[1] - 1), np.float32)
        for rows in self._eval_slices(tokens, sizes.num_tokens):
            inputs, labels = self._passes.split(tokens[rows])
            found = self._passes.measures(weights, reference, inputs, labels, shared=shared, chunk=sizes.num_logits)
            measures[:, rows] = found.cpu().numpy()
        return Comparison(*(measures * mask))

    def set_reference(self, reference: Literal["start", "adapters_off"] | Path | None) -> None:
        if reference is None:
            self._reference = None
        elif reference == "adapters_off":
            if self.spec.adapter is None:
                raise UserError("The reference 'adapters_off' needs adapters, and this model has none.")
            self._reference = {name: value for name, value in self._weights.items() if not is_adapter(name)}
        elif reference == "start":
            # What is frozen is not copied.
            copies = {name: self._weights[name].detach().clone() for name in self._trained}
            now = {name: copies.get(name, value) for name, value in self._weights.items()}
            self._reference = lora.folded(now, self.spec.adapter, outputs_first=self._outputs_first)
        else:
            self._reference = self._read_weights(reference)
        if self._reference is not None and self.spec.method.anchor_precision == "bf16":
            self._reference = {name: value.bfloat16() for name, value in self._reference.items()}

    def set_fisher(
        self, tokens: npt.NDArray[np.int32], mask: npt.NDArray[np.uint8], segment: npt.NDArray[np.int32] | None = None
    ) -> None:
        if self.spec.adapter is not None:
            raise UserError("Fisher information is measured of models without adapters.")
        fisher = {name: torch.zeros_like(value) for name, value in self._trained_weights().items()}
        zeros = np.zeros(1, np.uint8)
        for row in range(len(tokens)):
            one = slice(row, row + 1)
            own = None if segment is None else segment[one]
            batch = Batch(tokens=tokens[one], loss_mask=mask[one], segment=own, term=zeros, source=zeros)
            self._accumulate_gradient(batch, slice(0, 1), mask[one].astype(np.float32), None)
            for name, value in self._trained_weights().items():
                assert value.grad is not None
                fisher[name].addcmul_(value.grad, value.grad, value=1 / max(1, int(mask.sum())))
                value.grad = None
        self._fisher = fisher

    def save(self, path: Path, *, trainable_only: bool = False) -> None:
        adapter = self.spec.adapter
        weights = self._own_weights()
        if trainable_only and adapter is not None:
            weights = {file_name(name): weights[name] for name in self._trained}
        elif adapter is not None:
            weights = dict(lora.whole(weights, adapter, outputs_first=self._outputs_first))
        save_file({name: value.detach().contiguous() for name, value in weights.items()}, path, metadata={"format": "pt"})

    def _own_weights(self) -> dict[str, Tensor]:
        """Whole weights, to be written."""
        return self._weights

    def load(self, path: Path) -> None:
        weights = self._read_weights(path, or_adapters=True)
        if self.spec.runtime.reads_only:
            self._weights, self._trained = weights, trained_names(weights, self.spec.adapter, self.spec.num_layers)
            return
        adapters_alone = any(map(is_adapter, weights))
        if self.spec.adapter is not None and not adapters_alone:
            weights |= new_adapters(self.spec, self._torch_device)
        for name, value in weights.items():
            self._weights[name].data.copy_(value)
        if not adapters_alone:
            lora.restart_magnitudes(self._weights, outputs_first=self._outputs_first)

    def save_state(self, path: Path) -> None:
        save_file(self._own_state(), path)

    def _own_state(self) -> dict[str, Tensor]:
        """The whole state of the optimiser, to be written."""
        return self._optimizer.state()

    def load_state(self, path: Path) -> None:
        if not self._optimizer.load(self._read_state(path)):
            raise UserError(f"{path} is not the training state of this model and optimiser.")

    def sample(
        self,
        prompts: npt.NDArray[np.int32],
        u: npt.NDArray[np.float64],
        *,
        temperature: float = 1.0,
        from_reference: bool = False,
        num_ids: int | None = None,
    ) -> npt.NDArray[np.int32]:
        weights = self._reference if from_reference else self._folded()
        if weights is None:
            raise UserError("Sampling the reference needs one: call set_reference first.")
        # The last token is never an input.
        if prompts.shape[1] + u.shape[1] - 1 > self.spec.model.context_length:
            raise UserError(f"Prompt and sample together exceed the context of {self.spec.model.context_length} tokens.")
        try:
            out = self._decoder.sample(
                weights,
                torch.from_numpy(prompts.astype(np.int64)).to(self._torch_device),
                torch.from_numpy(u).to(self._torch_device),
                temperature,
                self._passes.dtype,
                num_ids=num_ids,
            )
        except RuntimeError as error:
            # On a CPU it is no OutOfMemoryError.
            if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
                raise MemoryError(f"sampling {len(prompts)} rows") from error
            raise
        return out.cpu().numpy().astype(np.int32)

    @classmethod
    def memory_bytes(cls) -> int | None:
        return torch.cuda.mem_get_info(devices.own_gpu())[0] if torch.cuda.is_available() else None

    @classmethod
    def hardware(cls) -> str | None:
        return torch.cuda.get_device_name() if torch.cuda.is_available() else None

    @classmethod
    def kept_bytes(cls, model: ModelSpec | PretrainedSpec, precision: Precision, *, on_cpu: bool) -> int:
        return devices.kept_bytes(model, precision, on_cpu=on_cpu)

    @property
    def micro_batch_size(self) -> int | None:
        return self._micro_batch_size

    def peak_memory_bytes(self) -> int:
        return devices.peak_memory_bytes(self._torch_device)

    def used_memory_bytes(self) -> int:
        return devices.used_memory_bytes(self._torch_device)

    def _update(self, gradients: dict[str, Tensor], learning_rate: float) -> tuple[Tensor, Tensor]:
        """Clip, step and clear the gradients; returns (gradient norm, 1 if the step was masked), both on the device."""
        optim, method = self.spec.optim, self.spec.method
        if self._reference is not None and (method.l2_sp or method.ewc):
            add_penalty_gradients(method, self._weights, gradients, self._reference, self._fisher)
        norm = self._norm(gradients)
        skipped = (~torch.isfinite(norm)).float()
        limit = optim.max_grad_norm
        scale = torch.clamp(norm / limit, min=1.0) if limit > 0 else torch.ones_like(norm)
        if self._reference is not None and method.anchor_decay:
            pull_to_reference(self._weights, self._reference, method.anchor_decay, learning_rate, skipped)
        self._optimizer.step(self._trained_weights(), gradients, learning_rate, scale, skipped)
        self._clear_gradients()
        return norm, skipped

    def _norm(self, gradients: dict[str, Tensor]) -> Tensor:
        norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(gradients.values()))))
        return norm

    def _clear_gradients(self) -> None:
        for name in self._trained:
            self._weights[name].grad = None

    def _eval_slices(self, tokens: npt.NDArray[np.int32], num_tokens: int = _EVAL_TOKENS) -> list[slice]:
        size = max(1, num_tokens // (tokens.shape[1] - 1))
        return [slice(start, start + size) for start in range(0, len(tokens), size)]

    def _trained_weights(self) -> dict[str, Tensor]:
        return {name: self._weights[name] for name in self._trained}

    def _folded(self, *, keys: Tensor | None = None) -> dict[str, Tensor]:
        """The weights as the model reads them."""
        return lora.folded(self._weights, self.spec.adapter, keys=keys, outputs_first=self._outputs_first)

    def _start_weights(self) -> dict[str, Tensor]:
        return start_weights(self.spec, self._decoder, self._torch_device)

    def _read_weights(self, path: Path, *, or_adapters: bool = False) -> dict[str, Tensor]:
        return read_weights(path, self.spec, self._decoder, self._torch_device, or_adapters=or_adapters)

    def _read_state(self, path: Path) -> dict[str, Tensor]:
        return load_file(path, device=str(self._torch_device))
