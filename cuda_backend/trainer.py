"""The PyTorch trainer: CUDA where a GPU is, the CPU otherwise (announced)."""

import math
import os
import resource
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cuda_backend import compare, gpt2, lora, losses
from cuda_backend.allocator import keep_freed_memory
from cuda_backend.decoder import Ladder, build_decoder
from cuda_backend.distributed import TorchGroup, join, local_rank
from cuda_backend.optimizer import make_optimizer
from cuda_backend.reference import add_penalty_gradients, pull_to_reference
from cuda_backend.stored_reference import FusedStoredKL
from mlx_forget.adapters import file_name, initial_adapters, is_adapter, num_trainable, parameter_name, parameter_shapes
from mlx_forget.comparison import MEASURES, portions
from mlx_forget.distributed import Group
from mlx_forget.errors import OutOfMemory, UserError
from mlx_forget.ladder import linear_shapes, num_params, outputs_first
from mlx_forget.methods import NUM_SOURCES, NUM_TERMS, TERM_REPLAY_KL, TERM_REPLAY_NTP, TERM_TASK
from mlx_forget.pretrained import PretrainedSpec, names_in_files, weight_files
from mlx_forget.trainer import (
    Batch,
    Capabilities,
    Comparison,
    ModelSpec,
    Precision,
    Stack,
    StepReading,
    StepResult,
    Trainer,
    TrainerSpec,
    check_reference,
    group_counts,
    kl_weights,
    token_weights,
    unpack_step,
)

_EVAL_TOKENS = 1 << 13


class TorchStep(StepResult):
    """A step whose numbers are still on the device."""

    def __init__(self, packed: Tensor, counts: npt.NDArray[np.float64]) -> None:
        self._packed = packed
        self._counts = counts

    def read(self) -> StepReading:
        return unpack_step(self._packed.double().cpu().numpy(), self._counts)


class TorchTrainer(Trainer):
    """A model and its optimiser on one device, or on one device of each process of a run."""

    def __new__(cls, spec: TrainerSpec | None = None) -> "TorchTrainer":
        # A copy is made without a spec.
        if cls is TorchTrainer and spec is not None and spec.runtime.shard and not spec.runtime.reads_only and join().size > 1:
            from cuda_backend.sharded_trainer import ShardedTrainer

            return super().__new__(ShardedTrainer)
        return super().__new__(cls)

    def __init__(self, spec: TrainerSpec) -> None:
        runtime = spec.runtime
        self.spec = spec
        self._notes: list[str] = []
        self.group = join()
        self._torch_device = self._choose_device(runtime.device)
        if runtime.num_threads is not None:
            torch.set_num_threads(runtime.num_threads)
        elif self._torch_device.type == "cpu" and "mlx.core" in sys.modules and torch.get_num_threads() == 1:
            # The two share one BLAS, which MLX wants on one thread; PyTorch takes over its number when it is imported.
            self._notes.append("PyTorch runs on one thread, because MLX was loaded before it in this process: give num_threads.")
        if runtime.shard and self.group.size == 1:
            self._notes.append("One process has nobody to share weights with: --shard does nothing.")
        if runtime.memory_limit_gb is not None and not runtime.reads_only:
            self._limit_memory(runtime.memory_limit_gb)
        if self._torch_device.type == "cpu" and runtime.memory_limit_gb is None:
            keep_freed_memory()
        self._dtype = torch.bfloat16 if runtime.precision == "bf16" else torch.float32
        self._chunk = gpt2.chunk_rows(spec.model.vocab_size, self._torch_device)
        self._portions = portions(
            spec.model,
            compare.most(spec.model.vocab_size, self._torch_device),
            limit_gb=runtime.memory_limit_gb if runtime.reads_only else None,
            used_bytes=self.used_memory_bytes(),
        )
        self._outputs_first = outputs_first(spec.model)
        self._decoder = build_decoder(spec.model, self._torch_device, reads_only=runtime.reads_only)
        self._weights = self._start_weights()
        self._trained = _trained_names(self._weights, spec)
        self._num_calls = 0
        self._micro_batch_size = runtime.micro_batch_size
        self._optimizer = make_optimizer(spec.optim, self._trained_weights())
        self._reference: dict[str, Tensor] | None = None
        self._fisher: dict[str, Tensor] | None = None
        # What transformers builds branches on Python values; it is not compiled.
        run = self._decoder.hidden_states
        self._hidden_states = self._maybe_compiled(run) if isinstance(self._decoder, Ladder) else run
        softmax = self._maybe_compiled(gpt2.softmax_gradient)
        # Eagerly, what FusedCrossEntropy does by itself makes fewer passes.
        self._softmax = None if softmax is gpt2.softmax_gradient else softmax

    @classmethod
    def describe(cls) -> Capabilities:
        return Capabilities(
            precisions=("fp32", "bf16"),
            terms=(TERM_TASK, TERM_REPLAY_NTP, TERM_REPLAY_KL),
            adapters=("lora", "dora"),
            anchor=True,
            fisher=True,
            sample=True,
            distributed=True,
            shard=True,
            document_masks=True,
            stack=True,
            bitwise_resume=not torch.cuda.is_available(),
            accelerator=torch.cuda.is_available(),
            fast_bf16=torch.cuda.is_bf16_supported() if torch.cuda.is_available() else torch.cpu._is_amx_tile_supported(),
            gpus=_gpus(),
            gpu_variable="CUDA_VISIBLE_DEVICES",
        )

    @classmethod
    def join(cls) -> Group:
        return join()

    @classmethod
    def stack(cls, spec: TrainerSpec, seeds: Sequence[int]) -> Stack:
        from cuda_backend.stack import TorchStack

        return TorchStack(spec, seeds)

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
        self._num_calls += 1
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
        group = self._on_device(batch.term.astype(np.int64) * NUM_SOURCES + batch.source)
        kl_group = self._on_device(batch.source.astype(np.int64) + TERM_REPLAY_KL * NUM_SOURCES)
        sums = torch.zeros(NUM_TERMS * NUM_SOURCES, device=self._torch_device)
        # A rank may have no rows.
        size = self._micro_batch_size or max(1, len(batch.tokens))
        for start in range(0, len(batch.tokens), size):
            rows = slice(start, start + size)
            if self.spec.adapter is not None and self.spec.adapter.dropout:
                lora.seed_dropout(self.spec.seed, self._num_calls, start, self.group.rank)
            nll, kl = self._accumulate_gradient(batch, rows, token_weight[rows], None if kl_weight is None else kl_weight[rows])
            mask = self._on_device(batch.loss_mask[rows])
            sums.index_add_(0, group[rows], (nll * mask).sum(1))
            if kl is not None:
                sums.index_add_(0, kl_group[rows], (kl * mask).sum(1))
        return sums

    def token_losses(self, tokens: npt.NDArray[np.int32], segment: npt.NDArray[np.int32] | None = None) -> npt.NDArray[np.float32]:
        found = np.empty((len(tokens), tokens.shape[1] - 1), np.float32)
        weights = self._folded()
        for rows in self._eval_slices(tokens):
            inputs, labels = self._split(tokens[rows])
            own = None if segment is None else self._on_device(segment[rows])
            found[rows] = self._token_nll(weights, inputs, labels, own).view(inputs.shape).cpu().numpy()
        return found

    @torch.no_grad()
    def _token_nll(self, weights: dict[str, Tensor], inputs: Tensor, labels: Tensor, segment: Tensor | None) -> Tensor:
        """Losses float32[N] of the labels of some rows."""
        return losses.token_nll(self._forward(weights, inputs, segment), self._decoder.head(weights), labels, self._chunk)

    def log_probs(
        self, tokens: npt.NDArray[np.int32], segment: npt.NDArray[np.int32] | None = None, *, from_reference: bool = False
    ) -> npt.NDArray[np.float32]:
        weights = self._reference if from_reference else self._folded()
        if weights is None:
            raise UserError("Log-probabilities of the reference need one: call set_reference first.")
        weights = {name: value.float() for name, value in weights.items()}
        inputs, _ = self._split(tokens)
        own = None if segment is None else torch.from_numpy(segment).to(self._torch_device)
        with torch.no_grad():
            x = self._forward(weights, inputs, own)
            head = self._decoder.head(weights)
            logits = (x if head is None else x @ head.to(x.dtype).T).float()
            logits.sub_(logits.logsumexp(1, keepdim=True))
        return logits.view(*inputs.shape, -1).cpu().numpy()

    def compare(self, tokens: npt.NDArray[np.int32], mask: npt.NDArray[np.uint8]) -> Comparison:
        if self._reference is None:
            raise UserError("compare needs a reference: call set_reference first.")
        reference = {name: value.float() for name, value in self._reference.items()}
        weights, sizes = self._folded(), self._portions
        heads = [self._decoder.head(own) for own in (weights, reference)]
        shared = self._decoder.num_shared_blocks(weights, reference)
        measures = np.zeros((len(MEASURES), len(tokens), tokens.shape[1] - 1), np.float32)
        for rows in self._eval_slices(tokens, sizes.num_tokens):
            inputs, labels = self._split(tokens[rows])
            with torch.no_grad(), self._autocast():
                pair = self._decoder.hidden_states_of_two(weights, reference, inputs, shared=shared)
            x, ref_x = (states.flatten(0, 1).to(self._dtype) for states in pair)
            found = losses.measures(x, heads[0], ref_x, heads[1], labels, chunk=sizes.num_logits)
            measures[:, rows] = found.view(-1, *inputs.shape).cpu().numpy()
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
        fisher = {name: torch.zeros_like(value) for name, value in self._weights.items()}
        zeros = np.zeros(1, np.uint8)
        for row in range(len(tokens)):
            one = slice(row, row + 1)
            own = None if segment is None else segment[one]
            batch = Batch(tokens=tokens[one], loss_mask=mask[one], segment=own, term=zeros, source=zeros)
            self._accumulate_gradient(batch, slice(0, 1), mask[one].astype(np.float32), None)
            for name, value in self._weights.items():
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
            self._weights, self._trained = weights, _trained_names(weights, self.spec)
            return
        adapters_alone = any(map(is_adapter, weights))
        if self.spec.adapter is not None and not adapters_alone:
            weights |= self._initial_adapters()
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
        self._num_calls = self._optimizer.num_steps()

    def sample(
        self, prompts: npt.NDArray[np.int32], u: npt.NDArray[np.float64], *, temperature: float = 1.0, from_reference: bool = False
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
                self._dtype,
            )
        except RuntimeError as error:
            # On a CPU it is no OutOfMemoryError.
            if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
                raise MemoryError(f"sampling {len(prompts)} rows") from error
            raise
        return out.cpu().numpy().astype(np.int32)

    @classmethod
    def memory_bytes(cls) -> int | None:
        return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else None

    @classmethod
    def hardware(cls) -> str | None:
        return torch.cuda.get_device_name() if torch.cuda.is_available() else None

    @classmethod
    def kept_bytes(cls, model: ModelSpec | PretrainedSpec, precision: Precision) -> int:
        if isinstance(model, PretrainedSpec):
            return model.kept_bytes(precision)
        # Inputs of both norms in float32; queries, keys, values, mixture and both sides of the GELU in the type of products, what enters
        # a product besides. Norms of queries and keys are float32 and keep their own.
        per_width = {"gpt2": {"fp32": 64, "bf16": 36}, "qknorm": {"fp32": 76, "bf16": 50}}
        return per_width[model.architecture][precision] * model.width

    @property
    def micro_batch_size(self) -> int | None:
        return self._micro_batch_size

    def peak_memory_bytes(self) -> int:
        if self._torch_device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._torch_device)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024

    def used_memory_bytes(self) -> int:
        """Memory in use now: of the device where it has its own, else of the process at its highest so far."""
        if self._torch_device.type == "cuda":
            return torch.cuda.memory_allocated(self._torch_device)
        return self.peak_memory_bytes()

    def _choose_device(self, wanted: str | None) -> torch.device:
        if wanted is None:
            if torch.cuda.is_available():
                return torch.device("cuda", self._choose_gpu())
            self._notes.append("PyTorch sees no CUDA device: it runs on the CPU.")
            return torch.device("cpu")
        if wanted.startswith("cuda") and not torch.cuda.is_available():
            raise UserError(f"--device {wanted}: PyTorch sees no CUDA device here. Leave --device out to run on the CPU.")
        try:
            return torch.device(wanted)
        except RuntimeError:
            raise UserError(f"--device {wanted}: PyTorch knows no such device; use cpu, cuda or cuda:1.") from None

    def _choose_gpu(self) -> int:
        """One GPU a process: the current one, or that of this process's number on this machine."""
        if self.group.size == 1:
            return torch.cuda.current_device()
        if local_rank() >= torch.cuda.device_count():
            raise UserError(
                f"This machine has {torch.cuda.device_count()} GPUs and at least {local_rank() + 1} processes of this run: "
                "start one process a GPU, or give --device cpu."
            )
        torch.cuda.set_device(local_rank())
        return local_rank()

    def _limit_memory(self, limit_gb: float) -> None:
        if self._torch_device.type != "cuda":
            raise UserError("PyTorch cannot limit its memory on a CPU: leave --memory-limit-gb out.")
        # Weights in fp32, gradients and two moments of what is trained, before any activation.
        model, adapter = self.spec.model, self.spec.adapter
        trained = num_params(model) if adapter is None else num_trainable(linear_shapes(model), adapter)
        need_gb = (4 * num_params(model) + 12 * trained) / 1e9 / (self.group.size if self.spec.runtime.shard else 1)
        if need_gb > limit_gb:
            raise UserError(f"--memory-limit-gb {limit_gb:g}: the weights and their optimiser alone need {need_gb:.2f} GB.")
        total = torch.cuda.get_device_properties(self._torch_device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit_gb * 1e9 / total), self._torch_device)

    def _maybe_compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        on_gpu = self._torch_device.type == "cuda"
        if self.spec.runtime.compile is False or (self.spec.runtime.compile is None and not on_gpu):
            return function
        if shutil.which("c++") is None and shutil.which("g++") is None and shutil.which("clang++") is None:
            note = "No C++ compiler is found, so torch.compile is off and the step runs eagerly."
            self._notes += [note] * (note not in self._notes)
            return function
        compiled: Callable[..., Any] = torch.compile(function, dynamic=False)
        return compiled

    def _forward(self, weights: dict[str, Tensor], inputs: Tensor, segment: Tensor | None = None) -> Tensor:
        """Hidden states [N, D] without gradients, always eager: evaluation shapes vary."""
        with self._autocast():
            return self._decoder.hidden_states(weights, inputs, segment).flatten(0, 1).to(self._dtype)

    def _accumulate_gradient(
        self, batch: Batch, rows: slice, weight: npt.NDArray[np.float32], kl_weight: npt.NDArray[np.float32] | None
    ) -> tuple[Tensor, Tensor | None]:
        """Add the gradient of the weighted token losses of some rows.

        Returns their nll and their KL to the reference, float32[B, T]: 0 where a row has no such term, None where no row has.
        """
        inputs, labels = self._split(batch.tokens[rows])
        segment = None if batch.segment is None else self._on_device(batch.segment[rows])
        with self._autocast():
            checkpointed = self.spec.runtime.grad_checkpoint
            weights = self._folded(training=True)
            x = self._hidden_states(weights, inputs, segment, grad_checkpoint=checkpointed)
        head, x = self._decoder.head(weights), x.to(self._dtype)
        nll_rows, kl_rows = self._rows_of(np.asarray(batch.term[rows] != TERM_REPLAY_KL)), None
        if kl_weight is not None and kl_weight.any():
            kl_rows = self._rows_of(np.asarray(kl_weight.any(axis=1)))
        objective, nll = losses.cross_entropy(
            x[nll_rows].flatten(0, 1),
            head,
            labels.view(inputs.shape)[nll_rows].flatten(),
            self._on_device(weight)[nll_rows].flatten(),
            self._chunk,
            self._softmax,
        )
        kl_BT = None
        if kl_rows is not None and batch.reference is not None:
            kl_objective, kl = self._stored_divergence(batch, rows.start, x[kl_rows].flatten(0, 1), head, kl_weight)
            objective = objective + kl_objective
            kl_BT = _in_rows(kl, kl_rows, inputs)
        elif kl_rows is not None:
            assert self._reference is not None
            assert kl_weight is not None
            with torch.no_grad(), self._autocast():
                part = None if segment is None else segment[kl_rows]
                ref_x = self._hidden_states(self._reference, inputs[kl_rows], part).to(self._dtype)
            kl_objective, kl = losses.kl_divergence(
                x[kl_rows].flatten(0, 1),
                head,
                ref_x.flatten(0, 1),
                self._decoder.head(self._reference),
                self._on_device(kl_weight)[kl_rows].flatten(),
                self._chunk,
            )
            objective = objective + kl_objective
            kl_BT = _in_rows(kl, kl_rows, inputs)
        objective.backward()  # type: ignore[no-untyped-call]
        return _in_rows(nll, nll_rows, inputs), kl_BT

    def _stored_divergence(
        self, batch: Batch, first_row: int, x: Tensor, head: Tensor | None, kl_weight: npt.NDArray[np.float32] | None
    ) -> tuple[Tensor, Tensor]:
        """The weighted KL to what is kept of the reference, and the KL float32[n * T], of the hidden states of a micro-batch's KL rows."""
        assert kl_weight is not None
        chosen = np.flatnonzero(kl_weight.any(axis=1))
        stored = batch.reference_of(first_row + chosen)
        log_probs, top, tail = (
            None if part is None else torch.from_numpy(part).to(self._torch_device).flatten(0, 1)
            for part in (stored.log_probs, stored.top, stored.tail)
        )
        weight = torch.from_numpy(kl_weight[chosen]).to(self._torch_device).flatten()
        top = None if top is None else top.long()
        if head is None:
            raise UserError("Log-probabilities are not kept for a model that caps its logits: leave reference_log_probs live.")
        result: tuple[Tensor, Tensor] = FusedStoredKL.apply(x, head, log_probs, top, tail, weight, self._chunk)  # type: ignore[no-untyped-call]
        return result

    def _rows_of(self, chosen: npt.NDArray[np.bool_]) -> slice | Tensor:
        """The chosen rows as an index; a slice, which copies nothing, where it is all of them."""
        return slice(None) if chosen.all() else self._on_device(np.flatnonzero(chosen))

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

    def _on_device(self, array: npt.NDArray[np.generic]) -> Tensor:
        """A copy on the device. From pinned memory a GPU fetches it while the host goes on; from pageable memory the host would wait."""
        tensor = torch.from_numpy(array)
        if self._torch_device.type != "cuda":
            return tensor.to(self._torch_device)
        return tensor.pin_memory().to(self._torch_device, non_blocking=True)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._torch_device.type, dtype=torch.bfloat16, enabled=self._dtype == torch.bfloat16)

    def _split(self, tokens: npt.NDArray[np.int32]) -> tuple[Tensor, Tensor]:
        on_device = self._on_device(tokens).long()
        return on_device[:, :-1], on_device[:, 1:].reshape(-1)

    def _eval_slices(self, tokens: npt.NDArray[np.int32], num_tokens: int = _EVAL_TOKENS) -> list[slice]:
        size = max(1, num_tokens // (tokens.shape[1] - 1))
        return [slice(start, start + size) for start in range(0, len(tokens), size)]

    def _start_weights(self) -> dict[str, Tensor]:
        """The weights of step 0, with new adapters where the spec has some; none of a trainer that only reads."""
        if self.spec.runtime.reads_only:
            return {}
        weights = dict(self._decoder.start_weights(self.spec.seed))
        if self.spec.adapter is not None:
            shapes = parameter_shapes(linear_shapes(self.spec.model), self.spec.adapter)
            weights |= {name: torch.empty(shape, device=self._torch_device) for name, shape in shapes.items()}
            weights |= self._initial_adapters()
            lora.restart_magnitudes(weights, outputs_first=self._outputs_first)
        for name, value in weights.items():
            value.requires_grad_(self.spec.adapter is None or is_adapter(name))
        return weights

    def _initial_adapters(self) -> dict[str, Tensor]:
        assert self.spec.adapter is not None
        start = initial_adapters(linear_shapes(self.spec.model), self.spec.adapter, self.spec.seed)
        return {name: torch.from_numpy(value).to(self._torch_device) for name, value in start}

    def _trained_weights(self) -> dict[str, Tensor]:
        return {name: self._weights[name] for name in self._trained}

    def _folded(self, *, training: bool = False) -> dict[str, Tensor]:
        """The weights as the model reads them."""
        return lora.folded(self._weights, self.spec.adapter, training=training, outputs_first=self._outputs_first)

    def _read_weights(self, path: Path, *, or_adapters: bool = False) -> dict[str, Tensor]:
        weights: dict[str, Tensor] = {}
        wanted: Mapping[str, tuple[int, ...]] = self._decoder.shapes
        for file in weight_files(path):
            stored = load_file(file, device=str(self._torch_device))
            if or_adapters and self.spec.adapter is not None and any(map(is_adapter, map(parameter_name, stored))):
                stored = {parameter_name(name): value for name, value in stored.items()}
                wanted = parameter_shapes(linear_shapes(self.spec.model), self.spec.adapter)
            weights |= {name: stored[old].float() for old, name in names_in_files(stored, wanted).items()}
        if {name: tuple(value.shape) for name, value in weights.items()} != wanted:
            raise UserError(f"{path} does not hold the weights of this model: names or shapes differ.")
        return weights

    def _read_state(self, path: Path) -> dict[str, Tensor]:
        return load_file(path, device=str(self._torch_device))


def _trained_names(weights: Iterable[str], spec: TrainerSpec) -> list[str]:
    """The names of what a step changes."""
    return [name for name in weights if spec.adapter is None or is_adapter(name)]


def _in_rows(values: Tensor, rows: slice | Tensor, inputs: Tensor) -> Tensor:
    """Values [n * T] of some rows as float32[B, T], 0 in the others."""
    if isinstance(rows, slice):
        return values.view(inputs.shape)
    out = torch.zeros(inputs.shape, device=inputs.device)
    out[rows] = values.view(-1, inputs.shape[1])
    return out


def _gpus() -> tuple[str, ...]:
    """The GPUs that this process sees, as CUDA_VISIBLE_DEVICES names them."""
    if not torch.cuda.is_available():
        return ()
    seen = tuple(name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip())
    return seen or tuple(map(str, range(torch.cuda.device_count())))
