"""The MLX trainer: the GPU of a Mac where there is one, the CPU otherwise."""

import itertools
import os
import resource
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

from mlx_forget.adapters import file_name, initial_adapters, is_adapter, num_trainable, parameter_name, parameter_shapes
from mlx_forget.comparison import MEASURES, portions
from mlx_forget.distributed import Group
from mlx_forget.errors import OutOfMemory, UserError
from mlx_forget.ladder import linear_shapes, num_params, outputs_first
from mlx_forget.methods import NUM_SOURCES, NUM_TERMS, TERM_REPLAY_KL, TERM_REPLAY_NTP, TERM_TASK
from mlx_forget.mlx_backend import BLAS_NOTE, compare, gpt2, lora, optimizer
from mlx_forget.mlx_backend.decoder import build_decoder
from mlx_forget.mlx_backend.distributed import MLXGroup, join, num_local_ranks
from mlx_forget.mlx_backend.operators import operators
from mlx_forget.mlx_backend.packed import widened
from mlx_forget.mlx_backend.reference import penalty_gradients, pull_to_reference
from mlx_forget.mlx_backend.warmup import compile_loops
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
_GIGABYTE = 1e9
# A thread that gets fewer logits at a time would multiply by a few rows.
_LEAST_LOGITS = 64
# The key of the loss sums beside the gradients: both are added up over micro-batches and ranks.
SUMS = "loss_sums"

Arrays = dict[str, mx.array]


class MLXStep(StepResult):
    """A step whose numbers may not be computed yet."""

    def __init__(self, packed: mx.array, counts: npt.NDArray[np.float64]) -> None:
        self._packed = packed
        self._counts = counts

    def read(self) -> StepReading:
        return unpack_step(np.array(self._packed).astype(np.float64), self._counts)


class MLXTrainer(Trainer):
    """A model with AdamW. On a CPU the rows of a batch are shared among threads, each an MLX stream."""

    def __init__(self, spec: TrainerSpec) -> None:
        runtime = spec.runtime
        self.spec = spec
        self._notes: list[str] = []
        self._on_cpu = self._choose_device(runtime.device)
        self._limit_memory()
        self.group = join()
        self._streams = self._make_streams()
        can_compile = self._can_compile()
        dtype = mx.bfloat16 if runtime.precision == "bf16" else mx.float32
        self._operators = operators(dtype=dtype, on_cpu=self._on_cpu, fused=can_compile)
        if can_compile and self._on_cpu:
            compile_loops()
        self._chunk = gpt2.chunk_rows(spec.model.vocab_size, on_cpu=self._on_cpu)
        self._portions = portions(
            spec.model,
            compare.most(spec.model.vocab_size, on_cpu=self._on_cpu),
            limit_gb=runtime.memory_limit_gb if runtime.reads_only else None,
            used_bytes=self.used_memory_bytes(),
        )
        self._outputs_first = outputs_first(spec.model)
        self._check_quantised()
        self._decoder = build_decoder(spec.model, self._operators, self._streams, reads_only=runtime.reads_only)
        self._weights: Arrays = {} if runtime.reads_only else dict(self._decoder.start_weights(spec.seed))
        if spec.adapter is not None and not runtime.reads_only:
            self._weights = self._with_new_adapters(self._weights)
        self._trained = _trained_names(self._weights, spec)
        self._num_calls = 0
        self._moments = optimizer.initial_moments(spec.optim, self._trained_weights())
        self._step = mx.array(0.0)
        self._hyper = optimizer.hyperparameters(spec.optim)
        self._reference: Arrays | None = None
        self._fisher: Arrays | None = None
        method = spec.method
        strengths = {"anchor_decay": method.anchor_decay, "l2_sp": method.l2_sp, "ewc": method.ewc}
        self._strengths = {name: mx.array(value, dtype=mx.float32) for name, value in strengths.items()}
        self._in_flight: mx.array = self._step
        self.num_traces = 0
        # On a CPU the whole graph is compiled on demand only: each new loop costs a run of the C++ compiler (see operators.py).
        whole = can_compile and (not self._on_cpu or runtime.compile is True)
        self._gradient = self._traced(self._batch_gradient, compiled=whole)
        self._nll = self._traced(self._batch_nll, compiled=whole)
        # Adafactor's loops are many and run over rows and columns: compiling them takes half a minute and gains little on a CPU.
        fusing = can_compile and (not self._on_cpu or spec.optim.name == "adamw")
        self._update = self._traced(optimizer.update_of(spec.optim), compiled=fusing)

    @classmethod
    def describe(cls) -> Capabilities:
        gpu = _gpu_available()
        return Capabilities(
            precisions=("fp32", "bf16"),
            terms=(TERM_TASK, TERM_REPLAY_NTP, TERM_REPLAY_KL),
            adapters=("lora", "dora"),
            anchor=True,
            fisher=True,
            sample=True,
            distributed=True,
            stack=True,
            bitwise_resume=not gpu,
            accelerator=gpu,
            fast_bf16=gpu,
        )

    @classmethod
    def join(cls) -> Group:
        return join()

    @classmethod
    def stack(cls, spec: TrainerSpec, seeds: Sequence[int]) -> Stack:
        from mlx_forget.mlx_backend.stack import MLXStack

        return MLXStack(spec, seeds)

    @property
    def device(self) -> str:
        if self._on_cpu:
            return f"cpu ({len(self._streams)} threads)"
        return str(_device_info().get("device_name", "gpu"))

    @property
    def notes(self) -> tuple[str, ...]:
        return tuple(self._notes)

    def train_step(self, batch: Batch, learning_rate: float) -> StepResult:
        method = self.spec.method
        check_reference(
            self.spec.method, reference=self._reference is not None or batch.reference is not None, fisher=self._fisher is not None
        )
        counts = self.group.all_sum(group_counts(batch, method))
        token_weight, kl_weight = token_weights(batch, counts, method), kl_weights(batch, counts, method)
        groups = np.eye(NUM_TERMS * NUM_SOURCES, dtype=np.float32)[batch.term.astype(np.int64) * NUM_SOURCES + batch.source]
        # A rank may have no rows.
        size = self.spec.runtime.micro_batch_size or max(1, len(batch.tokens))
        total: Arrays | None = None
        for start in range(0, len(batch.tokens), size):
            rows = slice(start, start + size)
            part = self._gradient(
                self._weights,
                mx.array(batch.tokens[rows]),
                mx.array(token_weight[rows]),
                mx.array(batch.loss_mask[rows]),
                mx.array(groups[rows]),
                None if batch.segment is None else mx.array(batch.segment[rows]),
                self._kl_terms(batch, rows, None if kl_weight is None else kl_weight[rows]),
                self._dropout_key(start),
            )
            total = part if total is None else {name: value + part[name] for name, value in total.items()}
            if size < len(batch.tokens):
                mx.eval(total)
        gradients = total or self._no_gradient()
        if isinstance(self.group, MLXGroup):
            gradients = self.group.sum_arrays(gradients)
        sums = gradients.pop(SUMS)
        rate = mx.array(learning_rate, dtype=mx.float32)
        if self._reference is not None and (method.l2_sp or method.ewc):
            gradients = penalty_gradients(self._weights, gradients, self._reference, self._fisher, self._strengths)
        scalars, self._step, outcome = optimizer.step_scalars(self._step, gradients, rate, self._hyper)
        weights = self._trained_weights()
        if self._reference is not None and method.anchor_decay:
            weights = pull_to_reference(weights, self._reference, rate, self._strengths["anchor_decay"], scalars["finite"])
        state = self._update(weights, self._moments, gradients, scalars)
        trained, self._moments = state
        self._weights = {**self._weights, **trained}
        self._num_calls += 1
        packed = mx.concatenate([sums, outcome])
        # One step runs while the host prepares the next; more would only hold memory.
        mx.eval(self._in_flight)
        mx.async_eval(state, self._step, packed)  # type: ignore[no-untyped-call]
        self._in_flight = packed
        self._check_memory()
        return MLXStep(packed, counts)

    def token_losses(self, tokens: npt.NDArray[np.int32], segment: npt.NDArray[np.int32] | None = None) -> npt.NDArray[np.float32]:
        losses = np.empty((len(tokens), tokens.shape[1] - 1), np.float32)
        for rows in self._eval_slices(tokens):
            own = None if segment is None else mx.array(segment[rows])
            losses[rows] = np.array(self._nll(self._weights, mx.array(tokens[rows]), own))
        return losses

    def log_probs(
        self, tokens: npt.NDArray[np.int32], segment: npt.NDArray[np.int32] | None = None, *, from_reference: bool = False
    ) -> npt.NDArray[np.float32]:
        weights = self._reference if from_reference else self._folded()
        if weights is None:
            raise UserError("Log-probabilities of the reference need one: call set_reference first.")
        weights = {name: value.astype(mx.float32) for name, value in weights.items()}
        own = None if segment is None else mx.array(segment)
        logits = self._decoder.logits(weights, mx.array(tokens[:, :-1]), own)
        return np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))

    def compare(self, tokens: npt.NDArray[np.int32], mask: npt.NDArray[np.uint8]) -> Comparison:
        if self._reference is None:
            raise UserError("compare needs a reference: call set_reference first.")
        reference = {name: widened(value) for name, value in self._reference.items()}
        weights = self._folded()
        shared = self._decoder.num_shared_blocks(weights, reference)
        measures = np.zeros((len(MEASURES), len(tokens), tokens.shape[1] - 1), np.float32)
        for rows in self._eval_slices(tokens, self._portions.num_tokens):
            measures[:, rows] = np.array(self._measures(weights, reference, mx.array(tokens[rows]), shared))
        return Comparison(*(measures * mask))

    def set_reference(self, reference: Literal["start", "adapters_off"] | Path | None) -> None:
        if reference is None:
            self._reference = None
        elif reference == "adapters_off":
            if self.spec.adapter is None:
                raise UserError("The reference 'adapters_off' needs adapters, and this model has none.")
            self._reference = {name: value for name, value in self._weights.items() if not is_adapter(name)}
        elif reference == "start":
            # Arrays never change in place: a reference shares them until the next step replaces them.
            self._reference = dict(self._folded())
        else:
            self._reference = self._read_weights(reference)
        if self._reference is not None and self.spec.method.anchor_precision == "bf16":
            self._reference = {name: value.astype(mx.bfloat16) for name, value in self._reference.items()}

    def set_fisher(
        self, tokens: npt.NDArray[np.int32], mask: npt.NDArray[np.uint8], segment: npt.NDArray[np.int32] | None = None
    ) -> None:
        if self.spec.adapter is not None:
            raise UserError("Fisher information is measured of models without adapters.")
        fisher = {name: mx.zeros_like(value) for name, value in self._weights.items()}
        for row in range(len(tokens)):
            one = slice(row, row + 1)
            weight = mx.array(mask[one].astype(np.float32))
            _, gradients = self._decoder.gradients(
                self._weights,
                mx.array(tokens[one, :-1]),
                mx.array(tokens[one, 1:]),
                weight,
                None if segment is None else mx.array(segment[one]),
                chunk=self._chunk,
            )
            fisher = {name: value + gradients[name].square() for name, value in fisher.items()}
            mx.eval(fisher)
        scale = mx.array(1 / max(1, int(mask.sum())), dtype=mx.float32)
        self._fisher = {name: value * scale for name, value in fisher.items()}

    def save(self, path: Path, *, trainable_only: bool = False) -> None:
        adapter, weights = self.spec.adapter, _to_numpy(self._weights)
        if trainable_only and adapter is not None:
            weights = {file_name(name): weights[name] for name in self._trained}
        elif adapter is not None:
            weights = dict(lora.whole(weights, adapter, outputs_first=self._outputs_first))
        save_file(weights, path, metadata={"format": "pt"})

    def load(self, path: Path) -> None:
        weights = self._read_weights(path, or_adapters=True)
        if self.spec.adapter is None or self.spec.runtime.reads_only:
            self._weights = weights
        elif any(map(is_adapter, weights)):
            self._weights = {**self._weights, **weights}
        else:
            self._weights = self._with_new_adapters(weights)
        self._trained = _trained_names(self._weights, self.spec)

    def save_state(self, path: Path) -> None:
        save_file(_to_numpy(self._moments | {"step": self._step.reshape(1)}), path)

    def load_state(self, path: Path) -> None:
        state = _read(path)
        shapes = {name: value.shape for name, value in self._moments.items()}
        if {name: value.shape for name, value in state.items() if name != "step"} != shapes or "step" not in state:
            raise UserError(f"{path} is not the training state of this model and optimiser.")
        self._moments = {name: state[name] for name in shapes}
        self._step = state["step"][0]
        self._num_calls = int(np.array(self._step))
        mx.eval(self._moments, self._step)

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
            return self._decoder.sample(weights, prompts, u, temperature=temperature)
        except RuntimeError as error:
            if any(words in str(error) for words in ("to allocate", "Insufficient Memory")):
                raise MemoryError(f"sampling {len(prompts)} rows") from error
            raise

    @classmethod
    def memory_bytes(cls) -> int | None:
        size = _device_info().get("max_recommended_working_set_size") if _gpu_available() else None
        return None if size is None else int(size)

    @classmethod
    def kept_bytes(cls, model: ModelSpec | PretrainedSpec, precision: Precision) -> int:
        if isinstance(model, PretrainedSpec):
            return model.kept_bytes(precision)
        # The gradient that is written out keeps both norms in float32 too, and the inner derivative of the GELU. A CPU attends in float32
        # and keeps its weights.
        per_width = {"gpt2": {"fp32": 80, "bf16": 56}, "qknorm": {"fp32": 112, "bf16": 76}}
        attended = 0 if _gpu_available() else 4 * model.num_heads * model.context_length
        return per_width[model.architecture][precision] * model.width + attended

    @property
    def micro_batch_size(self) -> int | None:
        return self.spec.runtime.micro_batch_size

    def peak_memory_bytes(self) -> int:
        if not self._on_cpu:
            return int(mx.get_peak_memory())
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024

    def used_memory_bytes(self) -> int:
        """Memory in use now: of the device where it has its own, else of the process at its highest so far."""
        return self.peak_memory_bytes() if self._on_cpu else int(mx.get_active_memory())

    def _choose_device(self, wanted: str | None) -> bool:
        """Make the device MLX's default; returns whether it is a CPU."""
        gpu = _gpu_available()
        if wanted in ("gpu", "metal") and not gpu:
            raise UserError(f"--device {wanted}: MLX sees no GPU here. Leave --device out to run on the CPU.")
        if wanted not in (None, "cpu", "gpu", "metal"):
            raise UserError(f"--device {wanted}: MLX knows no such device; use cpu or gpu.")
        on_cpu = wanted == "cpu" or not gpu
        if wanted is not None:
            mx.set_default_device(mx.Device(mx.cpu if on_cpu else mx.gpu))
        if on_cpu:
            self._notes.append("MLX runs on the CPU." if gpu else "MLX sees no GPU: it runs on the CPU.")
            self._notes.extend([BLAS_NOTE] if BLAS_NOTE else [])
        return on_cpu

    def _make_streams(self) -> list[mx.Stream]:
        """One stream per thread on Linux; Apple's BLAS and a GPU have threads of their own."""
        first = mx.default_stream(mx.default_device())
        if not self._on_cpu or sys.platform != "linux":
            return [first]
        count = self.spec.runtime.num_threads or max(1, len(os.sched_getaffinity(0)) // num_local_ranks())
        return [first, *_extra_cpu_streams(count - 1)]

    def _can_compile(self) -> bool:
        if self.spec.runtime.compile is False:
            return False
        if self._on_cpu and shutil.which("g++") is None:
            self._notes.append("No C++ compiler (g++) is found, so mx.compile is off and the step runs eagerly.")
            return False
        return True

    def _traced(self, function: Callable[..., Any], *, compiled: bool) -> Callable[..., Any]:
        if not compiled:
            return function

        def traced(*args: Any) -> Any:
            self.num_traces += 1
            return function(*args)

        result: Callable[..., Any] = mx.compile(traced)
        return result

    def _limit_memory(self) -> None:
        limit = self.spec.runtime.memory_limit_gb
        if limit is None:
            return
        # Weights, and gradients and two moments of what is trained, 4 bytes each: no batch is small enough to need less.
        model, adapter = self.spec.model, self.spec.adapter
        trained = num_params(model) if adapter is None else num_trainable(linear_shapes(model), adapter)
        need = (4 * num_params(model) + 12 * trained) / _GIGABYTE
        if limit < need and not self.spec.runtime.reads_only:
            raise UserError(
                f"--memory-limit-gb {limit:g} is below what this model needs: {need:.3g} GB for weights, gradients and moments alone."
            )
        mx.set_memory_limit(int(limit * _GIGABYTE))
        mx.set_cache_limit(int(limit * _GIGABYTE / 4))
        mx.reset_peak_memory()

    def _check_memory(self) -> None:
        limit = self.spec.runtime.memory_limit_gb
        if limit is None:
            return
        mx.eval(self._in_flight)
        need = mx.get_peak_memory() / _GIGABYTE
        if need > limit:
            raise OutOfMemory(
                f"A step needs {need:.3g} GB, --memory-limit-gb is {limit:g}: lower --micro-batch-size, or use --grad-checkpoint."
            )

    def _batch_gradient(
        self,
        weights: Arrays,
        tokens: mx.array,
        token_weight: mx.array,
        mask: mx.array,
        groups: mx.array,
        segment: mx.array | None,
        kl_terms: "list[gpt2.KLTerm] | None" = None,
        dropout_key: mx.array | None = None,
    ) -> Arrays:
        """Gradients of the weighted token losses of some rows, and their loss sums; each thread takes its share of the rows.

        Everything may have the leading dimension of a stack; the threads share the rows of every member.
        """

        parts: list[Arrays] = []
        adapter, shares = self.spec.adapter, _shares(tokens.shape[-2], len(self._streams))
        weights = lora.folded(weights, adapter, outputs_first=self._outputs_first)
        keys = None if dropout_key is None else mx.random.split(dropout_key, len(shares))
        for number, rows in enumerate(shares):
            kl_term = None if kl_terms is None else kl_terms[number]
            with mx.stream(self._streams[number]):
                losses, gradients = self._decoder.gradients(
                    weights if adapter is None or keys is None else lora.with_key(weights, adapter, keys[number]),
                    tokens[..., rows, :-1],
                    tokens[..., rows, 1:],
                    token_weight[..., rows, :],
                    None if segment is None else segment[..., rows, :],
                    chunk=self._chunk,
                    grad_checkpoint=self.spec.runtime.grad_checkpoint,
                    penalty=kl_term,
                )
                row_mask, row_groups = mask[..., rows, :], groups[..., rows, :]
                if kl_term is not None:
                    both = mx.concatenate([kl_term["nll_rows"], kl_term["kl_rows"]])
                    row_mask = row_mask[both]
                    row_groups = mx.concatenate([row_groups[kl_term["nll_rows"]], kl_term["kl_groups"]])
                per_row = (losses * row_mask).sum(axis=-1, keepdims=True)
                parts.append({**gradients, SUMS: (row_groups * per_row).sum(axis=-2)})
        total = parts[0]
        for part in parts[1:]:
            total = {name: value + part[name] for name, value in total.items()}
        sums = total.pop(SUMS)
        return {**lora.parameter_gradients(total, weights, adapter), SUMS: sums}

    def _kl_terms(self, batch: Batch, part: slice, kl_weight: npt.NDArray[np.float32] | None) -> "list[gpt2.KLTerm] | None":
        """What each thread's share of some rows needs for their KL term; None where no row has one."""
        term, source = batch.term[part], batch.source[part]
        if kl_weight is None and not (term == TERM_REPLAY_KL).any():
            return None
        weight = np.zeros((len(term), 0), np.float32) if kl_weight is None else kl_weight
        terms: list[gpt2.KLTerm] = []
        for rows in _shares(len(term), len(self._streams)):
            kl_rows = np.flatnonzero(weight[rows].any(axis=1))
            groups = TERM_REPLAY_KL * NUM_SOURCES + source[rows][kl_rows].astype(np.int64)
            if batch.reference is None:
                reference: dict[str, Any] = {"reference": self._reference}
            else:
                kept = batch.reference_of(part.start + rows.start + kl_rows)
                arrays = {"log_probs": kept.log_probs, "top": kept.top, "tail": kept.tail}
                reference = {"stored": {name: mx.array(value) for name, value in arrays.items() if value is not None}}
            terms.append(
                {
                    "nll_rows": mx.array(np.flatnonzero(term[rows] != TERM_REPLAY_KL).astype(np.int32)),
                    "kl_rows": mx.array(kl_rows.astype(np.int32)),
                    "kl_groups": mx.array(np.eye(NUM_TERMS * NUM_SOURCES, dtype=np.float32)[groups]),
                    "kl_weight": mx.array(weight[rows][kl_rows]),
                    **reference,
                }
            )
        return terms

    def _no_gradient(self) -> Arrays:
        """What a rank without rows adds."""
        zeros = {name: mx.zeros_like(self._weights[name]) for name in self._trained}
        return {**zeros, SUMS: mx.zeros(NUM_TERMS * NUM_SOURCES)}

    def _batch_nll(self, weights: Arrays, tokens: mx.array, segment: mx.array | None) -> mx.array:
        """Next-token losses float32[B, T] of int32[B, T+1]."""
        parts = []
        weights = lora.folded(weights, self.spec.adapter, outputs_first=self._outputs_first)
        for stream, rows in zip(self._streams, _shares(len(tokens), len(self._streams)), strict=False):
            with mx.stream(stream):
                own = None if segment is None else segment[rows]
                labels = tokens[rows, 1:].reshape(-1)
                parts.append(self._decoder.token_nll(weights, tokens[rows, :-1], labels, own, chunk=self._chunk))
        return mx.concatenate(parts).reshape(len(tokens), -1)

    def _measures(self, weights: Arrays, reference: Arrays, tokens: mx.array, shared: int) -> mx.array:
        """The measures of `Comparison`, float32[10, B, T], of int32[B, T+1]; each thread takes its share of the rows."""
        parts = []
        streams = self._streams[: max(1, self._portions.num_logits // _LEAST_LOGITS)]
        for stream, rows in zip(streams, _shares(len(tokens), len(streams)), strict=False):
            with mx.stream(stream):
                found = self._decoder.measures(
                    weights,
                    reference,
                    tokens[rows, :-1],
                    tokens[rows, 1:].reshape(-1),
                    shared=shared,
                    chunk=max(1, self._portions.num_logits // len(streams)),
                )
                parts.append(found.reshape(len(MEASURES), -1, tokens.shape[1] - 1))
        return mx.concatenate(parts, axis=1)

    def _eval_slices(self, tokens: npt.NDArray[np.int32], num_tokens: int = _EVAL_TOKENS) -> list[slice]:
        size = max(1, num_tokens // (tokens.shape[1] - 1))
        return [slice(start, start + size) for start in range(0, len(tokens), size)]

    def _check_quantised(self) -> None:
        """Refuse to train packed weights.

        Raises:
            UserError: the ways out.
        """
        model, adapter = self.spec.model, self.spec.adapter
        if not isinstance(model, PretrainedSpec) or model.bits is None or self.spec.runtime.reads_only:
            return
        if adapter is None:
            raise UserError(
                f"{model.folder} is quantised to {model.bits} bits: give --fine-tune-type lora, or its original, to train it."
            )
        if adapter.kind != "lora":
            raise UserError(f"{adapter.kind} needs whole weights, and {model.folder} is quantised: give --fine-tune-type lora.")

    def _with_new_adapters(self, base: Arrays) -> Arrays:
        """A base's weights and adapters that start on it."""
        adapter, linears = self.spec.adapter, linear_shapes(self.spec.model)
        assert adapter is not None
        start = {name: mx.array(value) for name, value in initial_adapters(linears, adapter, self.spec.seed)}
        weights = {**base, **start}
        weights |= lora.start_magnitudes(weights, adapter, outputs_first=self._outputs_first)
        return {**base, **{name: weights[name] for name in parameter_shapes(linears, adapter)}}

    def _trained_weights(self) -> Arrays:
        return {name: self._weights[name] for name in self._trained}

    def _folded(self) -> Arrays:
        """The weights as the model reads them."""
        return lora.folded(self._weights, self.spec.adapter, outputs_first=self._outputs_first)

    def _dropout_key(self, first_row: int) -> mx.array | None:
        """What decides which inputs the adapters of a pass drop; None where they drop none."""
        if self.spec.adapter is None or not self.spec.adapter.dropout:
            return None
        return lora.dropout_key(self.spec.seed, self._num_calls, first_row, self.group.rank)

    def _read_weights(self, path: Path, *, or_adapters: bool = False) -> Arrays:
        found: Arrays = {}
        wanted: Mapping[str, tuple[int, ...]] = self._decoder.shapes
        for file in weight_files(path):
            stored = _read(file)
            if or_adapters and self.spec.adapter is not None and any(map(is_adapter, map(parameter_name, stored))):
                stored = {parameter_name(name): value for name, value in stored.items()}
                wanted = parameter_shapes(linear_shapes(self.spec.model), self.spec.adapter)
            found |= {name: stored[old] for old, name in names_in_files(stored, wanted).items()}
        if {name: tuple(value.shape) for name, value in found.items()} != wanted:
            raise UserError(f"{path} does not hold the weights of this model: names or shapes differ.")
        return {name: widened(found[name]) for name in wanted}


_EXTRA_STREAMS: list[mx.Stream] = []


def _extra_cpu_streams(count: int) -> list[mx.Stream]:
    """Streams beside the default one, made once per process: each is a thread that lives as long."""
    while len(_EXTRA_STREAMS) < count:
        _EXTRA_STREAMS.append(mx.new_stream(mx.Device(mx.cpu)))
    return _EXTRA_STREAMS[:count]


def _gpu_available() -> bool:
    """Whether MLX has a GPU here, by the documented check of its version."""
    return bool(mx.is_available(mx.Device(mx.gpu)) if hasattr(mx, "is_available") else mx.metal.is_available())


def _device_info() -> dict[str, Any]:
    info: dict[str, Any] = mx.device_info() if hasattr(mx, "device_info") else mx.metal.device_info()
    return info


def _trained_names(weights: Iterable[str], spec: TrainerSpec) -> list[str]:
    """The names of what a step changes."""
    return [name for name in weights if spec.adapter is None or is_adapter(name)]


def _shares(num_rows: int, num_shares: int) -> list[slice]:
    """Contiguous shares of the rows, as even as can be; never an empty one."""
    bounds = np.linspace(0, num_rows, min(num_shares, num_rows) + 1).round().astype(int).tolist()
    return [slice(start, stop) for start, stop in itertools.pairwise(bounds)]


def _read(path: Path) -> Arrays:
    arrays = mx.load(str(path), format="safetensors")
    assert isinstance(arrays, dict)
    mx.eval(arrays)
    return arrays


def _to_numpy(arrays: Arrays) -> dict[str, npt.NDArray[np.float32]]:
    return {name: np.array(value.astype(mx.float32)) for name, value in arrays.items()}
