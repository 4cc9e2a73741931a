"""A training loop in nanoGPT's style, written from its description: modules with Linear, GELU, LayerNorm and scaled-dot-product attention,
one cross-entropy over all logits, AdamW with two groups, clipping at 1, batches stacked from a memory map as int64."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from mlx_forget.ladder import ModelSpec


class Block(nn.Module):
    def __init__(self, spec: ModelSpec, gelu: str) -> None:
        super().__init__()
        d, self.heads = spec.width, spec.num_heads
        self.ln_1, self.ln_2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.c_attn, self.c_proj = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.c_fc, self.c_out, self.gelu = nn.Linear(d, 4 * d), nn.Linear(4 * d, d), nn.GELU(gelu)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, T, D = x.shape
        q, k, v = (t.view(B, T, self.heads, D // self.heads).transpose(1, 2) for t in self.c_attn(self.ln_1(x)).split(D, 2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.c_proj(y.transpose(1, 2).contiguous().view(B, T, D))
        return x + self.c_out(self.gelu(self.c_fc(self.ln_2(x))))


class NanoStyle(nn.Module):
    """The baseline: model, optimiser and loop.

    Args:
        gelu: "none" is nanoGPT's, by the error function; "tanh" is GPT-2's, and ours, of more operations.
    """

    def __init__(
        self,
        spec: ModelSpec,
        tokens: np.ndarray,
        *,
        batch_size: int,
        bf16: bool,
        compiled: bool,
        device: str = "cpu",
        gelu: str = "none",
    ) -> None:
        super().__init__()
        self.device = device
        self.spec, self.tokens, self.batch_size, self.bf16 = spec, tokens, batch_size, bf16
        self.wte, self.wpe = nn.Embedding(spec.vocab_size, spec.width), nn.Embedding(spec.context_length, spec.width)
        self.blocks = nn.ModuleList(Block(spec, gelu) for _ in range(spec.num_layers))
        self.ln_f, self.head = nn.LayerNorm(spec.width), nn.Linear(spec.width, spec.vocab_size, bias=False)
        self.head.weight = self.wte.weight
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)
        self.to(device)
        groups = [
            {"params": [p for p in self.parameters() if p.dim() > 1], "weight_decay": 0.1},
            {"params": [p for p in self.parameters() if p.dim() < 2], "weight_decay": 0.0},
        ]
        self.optimiser = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), fused=True if device == "cuda" else None)
        self.call = torch.compile(self) if compiled else self

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        h = self.wte(x) + self.wpe(torch.arange(x.shape[1], device=x.device))
        for block in self.blocks:
            h = block(h)
        logits = self.head(self.ln_f(h))
        return F.cross_entropy(logits.view(-1, logits.size(-1)), y.view(-1), ignore_index=-1)

    def batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        T = self.spec.context_length
        starts = torch.randint(len(self.tokens) - T - 1, (self.batch_size,))
        x = torch.stack([torch.from_numpy(self.tokens[i : i + T].astype(np.int64)) for i in starts])
        y = torch.stack([torch.from_numpy(self.tokens[i + 1 : i + 1 + T].astype(np.int64)) for i in starts])
        if self.device == "cuda":
            x, y = (t.pin_memory().to(self.device, non_blocking=True) for t in (x, y))
        return x, y

    def step(self) -> torch.Tensor:
        x, y = self.batch()
        with torch.autocast(self.device, dtype=torch.bfloat16, enabled=self.bf16):
            loss = self.call(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters(), 1.0)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        return loss
