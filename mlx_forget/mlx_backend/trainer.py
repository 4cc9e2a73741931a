"""The MLX trainer: the GPU of a Mac where there is one, the CPU otherwise."""

from pathlib import Path
from typing import Literal

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

from mlx_forget.adapter_dropout import row_keys
from mlx_forget.adapters import file_name, is_adapter, trained_names
from mlx_forget.comparison import MEASURES, portions
from mlx_forget.distributed import Group
from mlx_forget.errors import UserError
from mlx_forget.ladder import outputs_first
from mlx_forget.methods import NUM_SOURCES, NUM_TERMS
from mlx_forget.mlx_backend import compare, devices, lora, optimizer
from mlx_forget.mlx_backend.decoder import build_decoder
from mlx_forget.mlx_backend.distributed import MLXGroup, join
from mlx_forget.mlx_backend.operators import operators
from mlx_forget.mlx_backend.packed import widened
from mlx_forget.mlx_backend.passes import SUMS, Passes
from mlx_forget.mlx_backend.reference import penalty_gradients, pull_to_reference
from mlx_forget.mlx_backend.step import MLXStep
from mlx_forget.mlx_backend.warmup import compile_loops, compiler_errors
from mlx_forget.mlx_backend.weights import (
    check_quantised,
    read_arrays,
    read_weights,
    start_weights,
    to_numpy,
    with_new_adapters,
)
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

Arrays = dict[str, mx.array]


class MLXTrainer(Trainer):
    """A model and its optimiser. On a CPU the rows of a batch are shared among threads, each an MLX stream."""

    def __init__(self, spec: TrainerSpec) -> None:
        runtime = spec.runtime
        self.spec = spec
        self._notes: list[str] = []
        self._on_cpu = devices.choose_device(runtime.device, self._notes)
        devices.limit_memory(spec)
        self.group = join()
        self._streams = devices.make_streams(runtime.num_threads, on_cpu=self._on_cpu)
        can_compile = devices.can_compile(runtime, self._notes, on_cpu=self._on_cpu)
        dtype = mx.bfloat16 if runtime.precision == "bf16" else mx.float32
        ops = operators(dtype=dtype, on_cpu=self._on_cpu, fused=can_compile)
        if can_compile and self._on_cpu:
            compile_loops()
        self._portions = portions(
            spec.model,
            compare.most(spec.model.vocab_size, on_cpu=self._on_cpu),
            limit_gb=runtime.memory_limit_gb if runtime.reads_only else None,
            used_bytes=self.used_memory_bytes(),
        )
        self._outputs_first = outputs_first(spec.model)
        check_quantised(spec)
        self._decoder = build_decoder(spec.model, ops, self._streams, reads_only=runtime.reads_only)
        self._weights = start_weights(spec, self._decoder)
        self._trained = trained_names(self._weights, spec.adapter, spec.num_layers)
        self._moments = optimizer.initial_moments(spec.optim, self._trained_weights())
        self._step = mx.array(0.0)
        self._hyper = optimizer.hyperparameters(spec.optim)
        self._reference: Arrays | None = None
        self._fisher: Arrays | None = None
        method = spec.method
        strengths = {"anchor_decay": method.anchor_decay, "l2_sp": method.l2_sp, "ewc": method.ewc}
        self._strengths = {name: mx.array(value, dtype=mx.float32) for name, value in strengths.items()}
        self._in_flight: mx.array = self._step
        # On a CPU the whole graph is compiled on demand only: each new loop costs a run of the C++ compiler (see operators.py).
        whole = can_compile and (not self._on_cpu or runtime.compile is True)
        self._passes = Passes(spec, self._decoder, self._streams, on_cpu=self._on_cpu, compiled=whole)
        # Adafactor's loops are many and run over rows and columns: compiling them takes half a minute and gains little on a CPU.
        fusing = can_compile and (not self._on_cpu or spec.optim.name == "adamw")
        self._update = self._passes.traced(optimizer.update_of(spec.optim), compiled=fusing)

    @classmethod
    def describe(cls) -> Capabilities:
        return devices.capabilities()

    @classmethod
    def join(cls) -> Group:
        return join()

    @property
    def device(self) -> str:
        if self._on_cpu:
            return f"cpu ({len(self._streams)} threads)"
        return str(devices.device_info().get("device_name", "gpu"))

    @property
    def notes(self) -> tuple[str, ...]:
        return tuple(self._notes)

    @compiler_errors()
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
            part = self._passes.gradient(
                self._weights,
                mx.array(batch.tokens[rows]),
                mx.array(token_weight[rows]),
                mx.array(batch.loss_mask[rows]),
                mx.array(groups[rows]),
                None if batch.segment is None else mx.array(batch.segment[rows]),
                self._passes.kl_terms(batch, rows, None if kl_weight is None else kl_weight[rows], self._reference),
                self._dropout_keys(batch, rows),
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
        packed = mx.concatenate([sums, outcome])
        # One step runs while the host prepares the next; more would only hold memory.
        mx.eval(self._in_flight)
        mx.async_eval(state, self._step, packed)  # type: ignore[no-untyped-call]
        self._in_flight = packed
        devices.check_memory(self.spec.runtime.memory_limit_gb, self._in_flight)
        return MLXStep(packed, counts)

    @compiler_errors()
    def token_losses(self, tokens: npt.NDArray[np.int32], segment: npt.NDArray[np.int32] | None = None) -> npt.NDArray[np.float32]:
        losses = np.empty((len(tokens), tokens.shape[1] - 1), np.float32)
        for rows in self._eval_slices(tokens):
            own = None if segment is None else mx.array(segment[rows])
            losses[rows] = np.array(self._passes.nll(self._weights, mx.array(tokens[rows]), own))
        return losses

    @compiler_errors()
    def log_probs(
        self, tokens: npt.NDArray[np.int32], segment: npt.NDArray[np.int32] | None = None, *, from_reference: bool = False
    ) -> npt.NDArray[np.float32]:
        weights = self._reference if from_reference else self._folded()
        if weights is None:
            raise UserError("Log-probabilities of the reference need one: call set_reference first.")
        weights = {name: widened(value) for name, value in weights.items()}
        own = None if segment is None else mx.array(segment)
        logits = self._decoder.logits(weights, mx.array(tokens[:, :-1]), own)
        return np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))

    @compiler_errors()
    def compare(self, tokens: npt.NDArray[np.int32], mask: npt.NDArray[np.uint8]) -> Comparison:
        if self._reference is None:
            raise UserError("compare needs a reference: call set_reference first.")
        reference = {name: widened(value) for name, value in self._reference.items()}
        weights = self._folded()
        shared = self._decoder.num_shared_blocks(weights, reference)
        measures = np.zeros((len(MEASURES), len(tokens), tokens.shape[1] - 1), np.float32)
        for rows in self._eval_slices(tokens, self._portions.num_tokens):
            found = self._passes.measures(
                weights, reference, mx.array(tokens[rows]), shared=shared, chunk=self._portions.num_logits
            )
            measures[:, rows] = np.array(found)
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
            self._reference = read_weights(reference, self.spec, self._decoder)
        if self._reference is not None and self.spec.method.anchor_precision == "bf16":
            self._reference = {name: value.astype(mx.bfloat16) for name, value in self._reference.items()}

    @compiler_errors()
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
                chunk=self._passes.chunk,
            )
            fisher = {name: value + gradients[name].square() for name, value in fisher.items()}
            mx.eval(fisher)
        scale = mx.array(1 / max(1, int(mask.sum())), dtype=mx.float32)
        self._fisher = {name: value * scale for name, value in fisher.items()}

    @compiler_errors()
    def save(self, path: Path, *, trainable_only: bool = False) -> None:
        adapter, weights = self.spec.adapter, to_numpy(self._weights)
        if trainable_only and adapter is not None:
            weights = {file_name(name): weights[name] for name in self._trained}
        elif adapter is not None:
            weights = dict(lora.whole(weights, adapter, outputs_first=self._outputs_first))
        save_file(weights, path, metadata={"format": "pt"})

    def load(self, path: Path) -> None:
        weights = read_weights(path, self.spec, self._decoder, or_adapters=True)
        if self.spec.adapter is None or self.spec.runtime.reads_only:
            self._weights = weights
        elif any(map(is_adapter, weights)):
            self._weights = {**self._weights, **weights}
        else:
            self._weights = with_new_adapters(weights, self.spec)
        self._trained = trained_names(self._weights, self.spec.adapter, self.spec.num_layers)

    @compiler_errors()
    def save_state(self, path: Path) -> None:
        save_file(to_numpy(self._moments | {"step": self._step.reshape(1)}), path)

    def load_state(self, path: Path) -> None:
        state = read_arrays(path)
        shapes = {name: value.shape for name, value in self._moments.items()}
        if {name: value.shape for name, value in state.items() if name != "step"} != shapes or "step" not in state:
            raise UserError(f"{path} is not the training state of this model and optimiser.")
        self._moments = {name: state[name] for name in shapes}
        self._step = state["step"][0]
        mx.eval(self._moments, self._step)

    @compiler_errors()
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
            return self._decoder.sample(weights, prompts, u, temperature=temperature, num_ids=num_ids)
        except RuntimeError as error:
            if any(words in str(error) for words in ("to allocate", "Insufficient Memory")):
                raise MemoryError(f"sampling {len(prompts)} rows") from error
            raise

    @classmethod
    def memory_bytes(cls) -> int | None:
        return devices.memory_bytes()

    @classmethod
    def kept_bytes(cls, model: ModelSpec | PretrainedSpec, precision: Precision, *, on_cpu: bool) -> int:
        return devices.kept_bytes(model, precision, on_cpu=on_cpu)

    @property
    def micro_batch_size(self) -> int | None:
        return self.spec.runtime.micro_batch_size

    def peak_memory_bytes(self) -> int:
        return devices.peak_memory_bytes(on_cpu=self._on_cpu)

    def used_memory_bytes(self) -> int:
        return devices.used_memory_bytes(on_cpu=self._on_cpu)

    @property
    def num_traces(self) -> int:
        """How often a compiled function was traced."""
        return self._passes.num_traces

    def _no_gradient(self) -> Arrays:
        """What a rank without rows adds."""
        zeros = {name: mx.zeros_like(self._weights[name]) for name in self._trained}
        return {**zeros, SUMS: mx.zeros(NUM_TERMS * NUM_SOURCES)}

    def _eval_slices(self, tokens: npt.NDArray[np.int32], num_tokens: int = _EVAL_TOKENS) -> list[slice]:
        size = max(1, num_tokens // (tokens.shape[1] - 1))
        return [slice(start, start + size) for start in range(0, len(tokens), size)]

    def _trained_weights(self) -> Arrays:
        return {name: self._weights[name] for name in self._trained}

    def _folded(self) -> Arrays:
        """The weights as the model reads them."""
        return lora.folded(self._weights, self.spec.adapter, outputs_first=self._outputs_first)

    def _dropout_keys(self, batch: Batch, rows: slice) -> mx.array | None:
        """What decides which inputs the adapters of a pass drop, uint32[modules, rows]; None where they drop none."""
        if self.spec.adapter is None or not self.spec.adapter.dropout:
            return None
        modules = lora.modules_of(self._weights)
        keys = row_keys(self.spec.seed, batch.step, self.group.rank, num_rows=len(batch.tokens), modules=modules)
        return mx.array(np.ascontiguousarray(keys[:, rows]))
