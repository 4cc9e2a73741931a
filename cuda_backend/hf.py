"""Checkpoints of other tools as a `Decoder`: the module that transformers builds, called as a function of its weights.

The parameters to train are the module's own, so there is one copy of them; a reference or another checkpoint takes their place for the
length of a call. Losses are computed from hidden states and the output matrix, a chunk of logits at a time, where that product (times
a constant) is what the module computes: a probe with large logits finds out. Otherwise its own logits are taken.

Shapes: B rows, T tokens, D width, V vocabulary.
"""

import inspect
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from cuda_backend import lora
from cuda_backend.sample import draw
from cuda_backend.segments import segment_positions
from mlx_forget.adapters import VECTOR, A
from mlx_forget.errors import UserError
from mlx_forget.pretrained import PretrainedSpec

Weights = Mapping[str, Tensor]

_PROBE_LENGTH = 8
# The probe makes logits this large: soft caps lie between 15 and 50.
_PROBE_LOGIT = 200.0
_PROBE_TOLERANCE = 1e-4


class Pretrained:
    """A causal language model of transformers."""

    def __init__(self, spec: PretrainedSpec, device: torch.device, *, reads_only: bool) -> None:
        if spec.bits is not None:
            raise UserError(
                f"{spec.folder} is quantised to {spec.bits} bits, which PyTorch does not train here: give its original."
            )
        self.spec = spec
        self.module = _load(spec, device)
        own = {name: tuple(value.shape) for name, value in self.module.named_parameters()}
        if own != dict(spec.shapes):
            raise UserError(spec.mismatch(own, "transformers", "this architecture is not supported"))
        for layer in self.module.modules():
            if isinstance(layer, nn.Embedding):
                # The padding token is often one that rows contain: its embedding learns like any other.
                layer.padding_idx = None
        self._names = set(own)
        self._base_prefix = self.module.base_model_prefix + "."
        self._base: nn.Module = self.module.base_model
        self._keeps_last = "logits_to_keep" in inspect.signature(self.module.forward).parameters
        self._segments_work: bool | None = None
        self._recomputes = False
        self._head_name = self._find_head()
        self._scale = self._find_scale()
        # The trainer says which of them learn.
        self.module.requires_grad_(False)
        self._parameters = dict(self.module.named_parameters())
        # Folded adapters of the pass that is under way, or whose gradient is: recomputed activations read them again.
        self._adapters: Weights = {}
        self._hooked = False
        if reads_only:
            for value in self._parameters.values():
                value.data = torch.empty(0, device=device)
            self._parameters = {}

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return dict(self.spec.shapes)

    def start_weights(self, seed: int) -> Iterable[tuple[str, Tensor]]:
        """Those of the checkpoint, whatever the seed."""
        return self._parameters.items()

    def hidden_states(
        self, weights: Weights, tokens_BT: Tensor, segment_BT: Tensor | None = None, *, grad_checkpoint: bool = False
    ) -> Tensor:
        inputs: dict[str, Any] = {"input_ids": tokens_BT, "use_cache": False}
        if segment_BT is not None:
            self._check_segments()
            # Places that begin again are what tells transformers to keep documents apart.
            inputs["position_ids"] = segment_positions(segment_BT)
        # The only thing that the training mode changes, all dropout being off.
        self.module.train(grad_checkpoint and torch.is_grad_enabled())
        if grad_checkpoint and not self._recomputes:
            enable = getattr(self.module, "activation_checkpointing_enable", None) or self.module.gradient_checkpointing_enable
            enable({"use_reentrant": False})
            self._recomputes = True
        if self._scale is None:
            logits: Tensor = self._call(self.module, "", weights, inputs).logits
            return logits
        states: Tensor = self._call(self._base, self._base_prefix, weights, inputs)[0]
        return states if self._scale == 1.0 else states * self._scale

    def hidden_states_of_two(
        self, weights: Weights, reference: Weights, tokens_BT: Tensor, *, shared: int
    ) -> tuple[Tensor, Tensor]:
        return self.hidden_states(weights, tokens_BT), self.hidden_states(reference, tokens_BT)

    def num_shared_blocks(self, weights: Weights, reference: Weights) -> int:
        return -1

    def head(self, weights: Weights) -> Tensor | None:
        return None if self._scale is None else weights[self._head_name]

    @torch.no_grad()
    def sample(
        self, weights: Weights, prompts_BP: Tensor, u_BT: Tensor, temperature: float, dtype: torch.dtype, *, num_ids: int | None
    ) -> Tensor:
        from transformers import DynamicCache

        self.module.eval()
        cache, token = DynamicCache(config=self.module.config), prompts_BP
        out = torch.empty(u_BT.shape, dtype=torch.int64, device=u_BT.device)
        last = {"logits_to_keep": 1} if self._keeps_last else {}
        with torch.autocast(u_BT.device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            for position in range(u_BT.shape[1]):
                inputs = {"input_ids": token, "past_key_values": cache, "use_cache": True, **last}
                logits = self._call(self.module, "", weights, inputs).logits[:, -1, :num_ids].float()
                token = draw(logits, u_BT[:, position], temperature)[:, None]
                out[:, position] = token[:, 0]
        return out

    def _call(self, module: nn.Module, prefix: str, weights: Weights, inputs: dict[str, Any]) -> Any:
        """The module's output with these weights in the place of its own, and with the adapters that are among them."""
        base = {name: value for name, value in weights.items() if name in self._names}
        before, self._adapters = self._adapters, {name: value for name, value in weights.items() if name not in self._names}
        if self._adapters and not self._hooked:
            self._hook_linear_maps()
        try:
            if all(self._parameters.get(name) is value for name, value in base.items()):
                return module(**inputs)
            own = {name.removeprefix(prefix): value for name, value in base.items() if name.startswith(prefix)}
            return functional_call(module, own, args=(), kwargs=inputs, tie_weights=True)
        finally:
            if not torch.is_grad_enabled():
                self._adapters = before

    def _hook_linear_maps(self) -> None:
        """Let every linear map of the blocks compute with its adapter, where the weights of a call have one."""
        from transformers.pytorch_utils import Conv1D

        for name, layer in self.module.named_modules():
            if isinstance(layer, (nn.Linear, Conv1D)):
                layer.register_forward_pre_hook(partial(self._scale_input, name))
                layer.register_forward_hook(partial(self._add_adapter, name))
        self._hooked = True

    def _scale_input(self, name: str, layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        vector = self._adapters.get(name + VECTOR)
        return inputs if vector is None or vector.shape[0] != 1 else (inputs[0] * vector[0], *inputs[1:])

    def _add_adapter(self, name: str, layer: nn.Module, inputs: tuple[Tensor, ...], product: Tensor) -> Tensor:
        vector = self._adapters.get(name + VECTOR)
        if vector is not None and vector.shape[1] == 1:
            return product * vector[:, 0]
        if name + A not in self._adapters:
            return product
        bias: Any = layer.bias
        return lora.adapted(product, inputs[0], self._adapters, name, bias)

    def _find_head(self) -> str:
        """The name of the output matrix; empty where the module has none of its own."""
        layer = self.module.get_output_embeddings()
        weight = getattr(layer, "weight", None)
        return next((name for name, value in self.module.named_parameters() if value is weight), "")

    @torch.no_grad()
    def _find_scale(self) -> float | None:
        """What the product of hidden states and output matrix is multiplied by to give the logits; None where they are not of this form."""
        if not self._head_name or self._base is self.module:
            return None
        self.module.eval()
        tokens = torch.arange(_PROBE_LENGTH, device=next(self.module.parameters()).device)[None] % self.spec.vocab_size
        head = self.module.get_output_embeddings().weight
        states = self._base(input_ids=tokens, use_cache=False)[0]
        product = states @ head.T
        # Larger by the output matrix alone: where it is tied, the embeddings stay as they are.
        factor = _PROBE_LOGIT / max(float(product.abs().max()), 1e-9)
        layer = self.module.get_output_embeddings()
        kept, layer.weight = layer.weight, nn.Parameter(head * factor, requires_grad=False)
        hidden = self._base(input_ids=tokens, use_cache=False)[0]
        logits = self.module(input_ids=tokens, use_cache=False).logits
        layer.weight = kept
        product = hidden @ (head * factor).T
        scale = float((product * logits).sum() / (product * product).sum())
        close = float((logits - scale * product).abs().max()) <= _PROBE_TOLERANCE * float(logits.abs().max())
        if not close:
            return None
        return 1.0 if abs(scale - 1) < _PROBE_TOLERANCE else scale

    @torch.no_grad()
    def _check_segments(self) -> None:
        """Refuse document masks where the module does not keep documents apart.

        Raises:
            UserError: what to do instead.
        """
        if self._segments_work is None:
            length = _PROBE_LENGTH // 2
            tokens = torch.arange(_PROBE_LENGTH, device=self.module.device)[None] % self.spec.vocab_size
            places = torch.arange(_PROBE_LENGTH, device=self.module.device)[None] % length
            self._segments_work = "position_ids" in inspect.signature(self._base.forward).parameters
            if self._segments_work and self._parameters:
                self.module.eval()
                both = self._base(input_ids=tokens, position_ids=places, use_cache=False)[0]
                alone = self._base(input_ids=tokens[:, length:], use_cache=False)[0]
                self._segments_work = torch.allclose(both[:, length:], alone, atol=1e-4, rtol=1e-3)
        if not self._segments_work:
            raise UserError(f"{self.spec.architecture} does not keep the documents of a row apart: give --rows padded.")


def _load(spec: PretrainedSpec, device: torch.device) -> Any:
    """The module with its weights, float32, without dropout.

    Raises:
        UserError: no transformers, or one that does not know the architecture or the files.
    """
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers.utils import logging
    except ImportError:
        raise UserError(f"{spec.folder} needs transformers: pip install 'mlx-forget[hf]'") from None
    shown, chatty = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    trust = spec.trust_remote_code
    try:
        config = AutoConfig.from_pretrained(spec.folder, trust_remote_code=trust, local_files_only=True)
        for name, value in config.to_dict().items():
            if isinstance(value, float) and ("dropout" in name or name.endswith("pdrop")):
                setattr(config, name, 0.0)
        module: Any = AutoModelForCausalLM.from_pretrained(
            spec.folder, config=config, dtype=torch.float32, use_safetensors=True, trust_remote_code=trust, local_files_only=True
        )
    # What transformers finds wrong with somebody's files may be any Python error.
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        if not trust and "trust_remote_code" in str(error):
            raise UserError(f"{spec.folder} comes with code: read it, then give --trust-remote-code to run it.") from None
        raise UserError(f"transformers cannot load {spec.architecture} from {spec.folder}: {reason}") from None
    finally:
        logging.set_verbosity(shown)
        if chatty:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
    return module.to(device)
