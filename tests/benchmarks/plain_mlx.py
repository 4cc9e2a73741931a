"""The plain loop that `bench_mlx.py` compares with: GPT-2 as the MLX documentation would write it, on MLX as it is installed.

Run in a process of its own, so that nothing has loaded another BLAS before MLX: prints one JSON line.
"""

import argparse
import json
import statistics
import time

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np


class Block(nn.Module):
    def __init__(self, width, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.c_fc, self.c_out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def __call__(self, x):
        B, T, D = x.shape
        heads = (B, T, self.num_heads, D // self.num_heads)
        q, k, v = (t.reshape(heads).transpose(0, 2, 1, 3) for t in mx.split(self.c_attn(self.ln_1(x)), 3, axis=-1))
        scale = (D // self.num_heads) ** -0.5
        mixed = mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask="causal")
        x = x + self.c_proj(mixed.transpose(0, 2, 1, 3).reshape(B, T, D))
        return x + self.c_out(nn.gelu(self.c_fc(self.ln_2(x))))


class GPT2(nn.Module):
    def __init__(self, num_layers, width, num_heads, vocab_size, context):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocab_size, width), nn.Embedding(context, width)
        self.blocks = [Block(width, num_heads) for _ in range(num_layers)]
        self.ln_f = nn.LayerNorm(width)

    def __call__(self, tokens):
        x = self.wte(tokens) + self.wpe(mx.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.wte.as_linear(self.ln_f(x))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--shape", default="4x128")
    args = parser.parse_args()
    num_layers, width = map(int, args.shape.split("x"))
    model = GPT2(num_layers, width, width // 32, args.vocab, args.context)
    optimizer = optim.AdamW(learning_rate=1e-3, betas=[0.9, 0.95], weight_decay=0.1, bias_correction=True)
    tokens = mx.array(np.random.default_rng(0).integers(0, args.vocab, (args.batch, args.context + 1)).astype(np.int32))

    def loss(model, tokens):
        return nn.losses.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:], reduction="mean")

    step = nn.value_and_grad(model, loss)
    seconds, cpu_seconds = [], []
    for _ in range(1 + args.steps):
        start, cpu_start = time.perf_counter(), time.process_time()
        value, gradients = step(model, tokens)
        gradients, _ = optim.clip_grad_norm(gradients, 5.0)
        optimizer.update(model, gradients)
        mx.eval(model.parameters(), optimizer.state, value)
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - cpu_start)
    tokens = args.batch * args.context
    result = {
        "tokens_per_second": tokens / statistics.median(seconds[1:]),
        "tokens_per_cpu_second": tokens / statistics.median(cpu_seconds[1:]),
        "loss": value.item(),
        "mlx": mx.__version__,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
