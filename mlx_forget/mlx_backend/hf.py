"""Checkpoints of other tools as a `Decoder`: the module that mlx-lm builds, called as a function of its weights.

Losses are computed from hidden states and the output matrix, a chunk of logits at a time, where that product (times a constant) is what
the module computes: a probe with large logits finds out. Otherwise its own logits are taken. mlx-lm's modules take no document mask.

Shapes: B rows, T tokens, D width, V vocabulary, N = B * T.
"""

import inspect
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from mlx.utils import tree_flatten, tree_unflatten

from mlx_forget.adapters import A
from mlx_forget.errors import UserError
from mlx_forget.mlx_backend import compare, cross_entropy, lora, losses
from mlx_forget.mlx_backend.hf_layers import ADAPTER_PARTS, adapted, checkpointed, within_module
from mlx_forget.mlx_backend.losses import KLTerm
from mlx_forget.mlx_backend.operators import Operators
from mlx_forget.mlx_backend.packed import is_floating, widened
from mlx_forget.mlx_backend.sample import draw
from mlx_forget.pretrained import PretrainedSpec, older_keys, read_config

Weights = Mapping[str, mx.array]
Arrays = dict[str, mx.array]

_PROBE_LENGTH = 8
# The probe makes logits this large: soft caps lie between 15 and 50.
_PROBE_LOGIT = 200.0
_PROBE_TOLERANCE = 1e-4


class Pretrained:
    """A causal language model of mlx-lm."""

    def __init__(self, spec: PretrainedSpec, operators: Operators, *, reads_only: bool) -> None:
        self.spec = spec
        self._operators = operators
        self.module = _load(spec)
        loaded: Arrays = dict(tree_flatten(self.module.parameters()))
        self._check_names(loaded)
        self._tied = "lm_head" not in self.module
        self._head_name = "lm_head.weight" if not self._tied else _embedding_name(loaded)
        start = {name: widened(loaded[name]) for name, _ in spec.shapes}
        # Nothing but these stays in the module between calls; and what switches adapters off.
        self._empty = {name: mx.zeros(()) for name in loaded}
        self._off: Arrays = {}
        self._scale = self._find_scale(start)
        self._longest = self._ignored_window()
        self._put(self._empty)
        self._start = {} if reads_only else start

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return dict(self.spec.shapes)

    def start_weights(self, seed: int) -> Iterable[tuple[str, mx.array]]:
        """Those of the checkpoint, whatever the seed; given once."""
        start, self._start = self._start, {}
        mx.eval(start)
        return start.items()

    def gradients(
        self,
        weights: Weights,
        tokens_BT: mx.array,
        labels_BT: mx.array,
        weight_BT: mx.array,
        segment_BT: mx.array | None = None,
        *,
        chunk: int,
        grad_checkpoint: bool = False,
        penalty: KLTerm | None = None,
    ) -> tuple[mx.array, Arrays]:
        self._refuse_segments(segment_BT)
        if grad_checkpoint:
            self._checkpoint_layers()
        ref_x: mx.array | None = None
        if penalty is not None and penalty["kl_rows"].size and "reference" in penalty:
            ref_x = mx.stop_gradient(self._states(penalty["reference"], tokens_BT[penalty["kl_rows"]]))

        names = lora.trained_entries(weights) or list(weights)

        def objective(trained: Arrays) -> tuple[mx.array, mx.array]:
            now = {**weights, **trained}
            x, head = self._states(now, tokens_BT), self._head(now)
            if head is None:
                return losses.plain_objective(x, labels_BT, weight_BT, penalty, ref_x)

            def reference_states(weights: Weights, tokens: mx.array, segment: mx.array | None) -> mx.array:
                assert ref_x is not None
                return ref_x

            def with_gradients(x: mx.array, head: mx.array) -> tuple[mx.array, ...]:
                nll, grad_x, grad_head = losses.objective(
                    x,
                    head,
                    self._head_name,
                    tokens_BT,
                    labels_BT,
                    weight_BT,
                    None,
                    penalty,
                    chunk,
                    self._operators,
                    reference_states,
                )
                return nll.sum(), nll, grad_x, grad_head

            return _with_own_gradient(with_gradients, x, head, trains_head=self._head_name in names)

        with self._emptied():
            (_, nll), grads = mx.value_and_grad(objective)({name: weights[name] for name in names})
        return nll, {name: value.astype(mx.float32) for name, value in grads.items()}

    def token_nll(
        self, weights: Weights, tokens_BT: mx.array, labels_N: mx.array, segment: mx.array | None, *, chunk: int
    ) -> mx.array:
        self._refuse_segments(segment)
        with self._emptied():
            x = self._states(weights, tokens_BT)
        x, head = x.reshape(-1, x.shape[-1]), self._head(weights)
        if head is None:
            return losses.plain_nll(x, labels_N)
        return cross_entropy.token_nll(x, head, labels_N, chunk=chunk, operators=self._operators)

    def logits(self, weights: Weights, tokens_BT: mx.array, segment: mx.array | None) -> mx.array:
        self._refuse_segments(segment)
        with self._emptied():
            x = self._states(weights, tokens_BT)
        head = self._head(weights)
        narrow = self._operators.dtype
        logits = x if head is None else self._operators.matmul(x.astype(narrow), head.astype(narrow).T)
        return logits.astype(mx.float32)

    def measures(
        self, weights: Weights, reference: Weights, tokens_BT: mx.array, labels_N: mx.array, *, shared: int, chunk: int
    ) -> mx.array:
        with self._emptied():
            x, ref_x = (self._states(own, tokens_BT) for own in (weights, reference))
        x, ref_x = x.reshape(-1, x.shape[-1]), ref_x.reshape(-1, ref_x.shape[-1])
        head, ref_head = self._head(weights), self._head(reference)
        if head is None or ref_head is None:
            return compare.of_logits(x.astype(mx.float32), ref_x.astype(mx.float32), labels_N[:, None], self._operators)
        return compare.measures(x, head, ref_x, ref_head, labels_N, chunk=chunk, operators=self._operators)

    def num_shared_blocks(self, weights: Weights, reference: Weights) -> int:
        return -1

    def sample(
        self,
        weights: Weights,
        prompts_BP: npt.NDArray[np.int32],
        u_BT: npt.NDArray[np.float64],
        *,
        temperature: float,
        num_ids: int | None,
    ) -> npt.NDArray[np.int32]:
        from mlx_lm.models.cache import make_prompt_cache

        cache = make_prompt_cache(self.module)
        out = np.empty(u_BT.shape, np.int32)
        tokens = mx.array(prompts_BP)
        with self._emptied():
            self._put(self._narrow(weights))
            for position in range(u_BT.shape[1]):
                logits = self.module(tokens, cache=cache)[:, -1, :num_ids].astype(mx.float32)
                mx.eval(logits)
                out[:, position] = draw(np.array(logits), u_BT[:, position], temperature)
                tokens = mx.array(out[:, position : position + 1])
        return out

    def _states(self, weights: Weights, tokens_BT: mx.array) -> mx.array:
        """Final hidden states [B, T, D], times what makes the product with the head the logits; logits [B, T, V] where there is no head."""
        if self._longest is not None and tokens_BT.shape[1] > self._longest:
            raise UserError(
                f"mlx-lm computes {self.spec.architecture} without its sliding window of {self._longest} tokens: give --max-seq-length "
                f"{self._longest} or less, or --backend cuda (PyTorch)."
            )
        self._put(self._narrow(weights))
        if self._scale is None:
            return self._run(tokens_BT)
        states: mx.array = self.module.model(tokens_BT)
        return states.astype(mx.float32) if self._scale == 1.0 else states.astype(mx.float32) * self._scale

    def _head(self, weights: Weights) -> mx.array | None:
        return None if self._scale is None else weights[self._head_name]

    def _narrow(self, weights: Weights) -> Arrays:
        """The weights in the type of products; DoRA's factors stay as they are."""
        narrow = self._operators.dtype
        return {
            name: value.astype(narrow) if is_floating(value) and not name.endswith(lora.FACTOR) else value
            for name, value in weights.items()
        }

    def _put(self, weights: Weights) -> None:
        """Let the module compute with these weights, and with the folded adapters that are among them."""
        adapters = {name: value for name, value in weights.items() if name not in self._empty}
        self._adapt(adapters)
        base = {name: value for name, value in weights.items() if name in self._empty}
        own = {within_module(name): value for name, value in adapters.items() if not name.endswith(lora.LENGTH)}
        self.module.update(tree_unflatten(list({**base, **self._off, **own}.items())))

    def _adapt(self, adapters: Weights) -> None:
        """Let the linear maps that have adapters add what those add; a 0-d entry stands for none."""
        modules = dict(self.module.named_modules())
        for name in adapters:
            module = name.removesuffix(A)
            if module == name or f"{module}.lora_A" in self._off:
                continue
            layer = modules[module]
            layer.__class__ = type(f"Adapted{type(layer).__name__}", (type(layer),), {"__call__": adapted(type(layer))})
            for part in ADAPTER_PARTS:
                layer[part] = mx.zeros(())
                self._off[f"{module}.{part}"] = mx.zeros(())

    @contextmanager
    def _emptied(self) -> Any:
        """Let go of the weights afterwards: a step replaces them, and two sets of them would be in memory."""
        try:
            yield
        finally:
            self._put(self._empty)

    def _find_scale(self, weights: Arrays) -> float | None:
        """What the product of hidden states and output matrix is multiplied by to give the logits; None where they are not of this form."""
        if "model" not in self.module or self._head_name not in weights or not is_floating(weights[self._head_name]):
            return None
        if not _takes_tokens_alone(self.module.model):
            return None
        tokens = mx.arange(_PROBE_LENGTH)[None] % self.spec.vocab_size
        self._put(weights)
        largest = _number(mx.abs(self._run(tokens)).max())
        head = weights[self._head_name] * (_PROBE_LOGIT / max(largest, 1e-9))
        self._put({**weights, self._head_name: head})
        logits, product = self._run(tokens), self.module.model(tokens) @ head.T
        scale = _number((product * logits).sum() / (product * product).sum())
        apart = _number(mx.abs(logits - scale * product).max() / mx.abs(logits).max())
        if not apart <= _PROBE_TOLERANCE:
            return None
        return 1.0 if abs(scale - 1) < _PROBE_TOLERANCE else scale

    def _run(self, tokens_BT: mx.array) -> mx.array:
        """Logits, as the module gives them.

        Raises:
            UserError: its code fails on this checkpoint.
        """
        try:
            logits: mx.array = self.module(tokens_BT)
        except (TypeError, ValueError, IndexError, KeyError, AttributeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"mlx-lm cannot run {self.spec.architecture} from {self.spec.folder}: {reason}. The other backend may: --backend cuda."
            ) from None
        return logits

    def _ignored_window(self) -> int | None:
        """The sliding window of a model whose module knows of none; None where it has one or needs none."""
        from mlx_lm.models.cache import RotatingKVCache, make_prompt_cache

        config = read_config(self.spec.folder)
        window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
        if window is None or any(isinstance(cache, RotatingKVCache) for cache in make_prompt_cache(self.module)):
            return None
        return int(window)

    def _check_names(self, loaded: Arrays) -> None:
        """Refuse an architecture whose weights mlx-lm holds in another form than the files do.

        Raises:
            UserError: which weight, and the way out.
        """
        own = {name: tuple(value.shape) for name, value in loaded.items()}
        wanted = dict(self.spec.shapes)
        if own == wanted and hasattr(self.module, "sanitize"):
            # Lazy zeros: they take no memory, and what comes through unchanged is the same object.
            probe = {name: mx.zeros(shape) for name, shape in wanted.items()}
            passed = type(self.module)(self.module.args).sanitize(dict(probe))
            own = {name: shape if passed.get(name) is probe[name] else () for name, shape in wanted.items()}
        if own != wanted:
            raise UserError(self.spec.mismatch(own, "mlx-lm", "train it with --backend cuda (PyTorch)"))

    def _refuse_segments(self, segment: mx.array | None) -> None:
        if segment is not None:
            raise UserError(f"{self.spec.architecture} takes no document mask on MLX: give --rows padded.")

    def _checkpoint_layers(self) -> None:
        """Make every block recompute its activations in the backward pass."""
        for layer in self.module.layers:
            kind = type(layer)
            if not kind.__name__.startswith("Checkpointed"):
                layer.__class__ = type(f"Checkpointed{kind.__name__}", (kind,), {"__call__": checkpointed(kind)})


def _with_own_gradient(
    with_gradients: Callable[[mx.array, mx.array], tuple[mx.array, ...]], x: mx.array, head: mx.array, *, trains_head: bool
) -> tuple[mx.array, mx.array]:
    """(scalar, losses) of a function that also returns the objective's gradients of x and head: autograd takes them as the scalar's.

    All that such a function returns is computed: of a frozen head, its gradient is left out.
    """
    results = 4 if trains_head else 3
    function: Any = mx.custom_function(lambda *primals: with_gradients(*primals, *(() if trains_head else (head,)))[:results])

    @function.vjp  # type: ignore[untyped-decorator]
    def _(primals: Any, cotangents: Any, outputs: Any) -> Any:
        grads = tuple(grad * cotangents[0] for grad in outputs[2:])
        return grads if trains_head else grads[0]

    scalar, nll, *_ = function(x, head) if trains_head else function(x)
    return scalar, mx.stop_gradient(nll)


def _takes_tokens_alone(module: Any) -> bool:
    """Whether a module is called with tokens and nothing else."""
    required = [p for p in inspect.signature(module.__call__).parameters.values() if p.default is p.empty]
    return len([p for p in required if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]) <= 1


def _number(scalar: mx.array) -> float:
    value: Any = scalar.item()
    return float(value)


def _embedding_name(loaded: Arrays) -> str:
    """The name of the embedding matrix, which is the output matrix too."""
    known = ("model.embed_tokens.weight", "model.wte.weight", "model.tok_embeddings.weight", "model.word_embeddings.weight")
    return next((name for name in known if name in loaded), "")


def _load(spec: PretrainedSpec) -> Any:
    """The module with its weights, read when they are needed.

    Raises:
        UserError: no mlx-lm, or one that does not know the architecture or the files.
    """
    # Without PyTorch, transformers says that models are not available; these are mlx-lm's.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    try:
        from mlx_lm.utils import load_model
    except ImportError:
        raise UserError(f"{spec.folder} needs mlx-lm: pip install 'mlx-forget[mlx]'") from None
    config = older_keys(read_config(spec.folder))
    config["tie_word_embeddings"] = "lm_head.weight" not in dict(spec.shapes)
    options: dict[str, Any] = {"trust_remote_code": True} if spec.trust_remote_code else {}
    try:
        module, _ = load_model(spec.folder, lazy=True, model_config=config, **options)
    # What mlx-lm finds wrong with somebody's files may be any Python error.
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"mlx-lm cannot load {spec.architecture} from {spec.folder}: {reason} The other backend may: --backend cuda."
        ) from None
    return module
