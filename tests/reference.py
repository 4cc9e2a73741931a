"""NumPy float64 references: GPT-2's forward pass and gradients, AdamW, Adafactor, clipping. Written for clarity, from the equations."""

import numpy as np

from mlx_forget.ladder import ModelSpec, decays
from mlx_forget.trainer import OptimSpec


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def gelu_grad(x):
    inner = np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)
    return 0.5 * (1 + np.tanh(inner)) + 0.5 * x / np.cosh(inner) ** 2 * np.sqrt(2 / np.pi) * (1 + 3 * 0.044715 * x**2)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def positions(inputs, segment):
    """Places [B, T], counted from the start of each segment."""
    place = np.broadcast_to(np.arange(inputs.shape[1]), inputs.shape).copy()
    if segment is not None:
        for row, own in zip(place, segment, strict=True):
            for t in range(1, len(row)):
                row[t] = row[t - 1] + 1 if own[t] == own[t - 1] else 0
    return place


class GPT2:
    """Forward and backward of the ladder's GPT-2 for one weight dict in float64."""

    def __init__(self, weights, spec: ModelSpec):
        self.w = {name: np.asarray(value, np.float64) for name, value in weights.items()}
        self.spec = spec

    def norm(self, x, name):
        mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        normed = (x - mean) / np.sqrt(var + 1e-5)
        return normed * self.w[name + ".weight"] + self.w[name + ".bias"], (normed, np.sqrt(var + 1e-5))

    def norm_backward(self, grad, name, kept, grads):
        normed, std = kept
        axes = tuple(range(grad.ndim - 1))
        grads[name + ".weight"] = (grad * normed).sum(axes)
        grads[name + ".bias"] = grad.sum(axes)
        g = grad * self.w[name + ".weight"]
        return (g - g.mean(-1, keepdims=True) - normed * (g * normed).mean(-1, keepdims=True)) / std

    def linear(self, x, name):
        return x @ self.w[name + ".weight"] + self.w[name + ".bias"]

    def linear_backward(self, grad, x, name, grads):
        flat_x, flat_g = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        grads[name + ".weight"] = flat_x.T @ flat_g
        grads[name + ".bias"] = flat_g.sum(0)
        return grad @ self.w[name + ".weight"].T

    def forward(self, inputs, segment=None):
        """Logits [B, T, V] and what the backward pass needs."""
        B, T = inputs.shape
        H, hd = self.spec.num_heads, self.spec.head_dim
        x = self.w["transformer.wte.weight"][inputs] + self.w["transformer.wpe.weight"][positions(inputs, segment)]
        allowed = np.tril(np.ones((T, T), bool))[None, None]
        if segment is not None:
            allowed = allowed & (segment[:, None, :, None] == segment[:, None, None, :])
        tape = []
        for i in range(self.spec.num_layers):
            p = f"transformer.h.{i}."
            n1, kept1 = self.norm(x, p + "ln_1")
            q, k, v = np.split(self.linear(n1, p + "attn.c_attn"), 3, -1)
            q, k, v = (t.reshape(B, T, H, hd).transpose(0, 2, 1, 3) for t in (q, k, v))
            a = softmax(np.where(allowed, q @ k.transpose(0, 1, 3, 2) / np.sqrt(hd), -np.inf))
            mixed = (a @ v).transpose(0, 2, 1, 3).reshape(B, T, -1)
            x = x + self.linear(mixed, p + "attn.c_proj")
            n2, kept2 = self.norm(x, p + "ln_2")
            pre = self.linear(n2, p + "mlp.c_fc")
            x = x + self.linear(gelu(pre), p + "mlp.c_proj")
            tape.append((n1, kept1, q, k, v, a, mixed, n2, kept2, pre))
        final, kept = self.norm(x, "transformer.ln_f")
        return final @ self.w["transformer.wte.weight"].T, (inputs, tape, final, kept)

    def losses(self, tokens, segment=None):
        """Next-token losses float64[B, T]."""
        logits, _ = self.forward(tokens[:, :-1], segment)
        logits = logits - logits.max(-1, keepdims=True)
        logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        return -np.take_along_axis(logp, tokens[:, 1:, None].astype(int), -1)[..., 0]

    def gradients(self, tokens, token_weight, segment=None):
        """Gradients of sum(token_weight * loss)."""
        logits, (inputs, tape, final, kept) = self.forward(tokens[:, :-1], segment)
        B, T = inputs.shape
        H, hd = self.spec.num_heads, self.spec.head_dim
        grads = {}
        grad = softmax(logits)
        np.put_along_axis(
            grad,
            tokens[:, 1:, None].astype(int),
            np.take_along_axis(grad, tokens[:, 1:, None].astype(int), -1) - 1,
            -1,
        )
        grad = grad * token_weight[..., None]
        embedding = self.w["transformer.wte.weight"]
        grads["transformer.wte.weight"] = np.einsum("btv,btd->vd", grad, final)
        g = self.norm_backward(grad @ embedding, "transformer.ln_f", kept, grads)
        for i in reversed(range(self.spec.num_layers)):
            p = f"transformer.h.{i}."
            n1, kept1, q, k, v, a, mixed, n2, kept2, pre = tape[i]
            d = self.linear_backward(g, gelu(pre), p + "mlp.c_proj", grads) * gelu_grad(pre)
            g = g + self.norm_backward(self.linear_backward(d, n2, p + "mlp.c_fc", grads), p + "ln_2", kept2, grads)
            d = self.linear_backward(g, mixed, p + "attn.c_proj", grads).reshape(B, T, H, hd).transpose(0, 2, 1, 3)
            dv = a.transpose(0, 1, 3, 2) @ d
            da = d @ v.transpose(0, 1, 3, 2)
            ds = a * (da - (da * a).sum(-1, keepdims=True)) / np.sqrt(hd)
            dq, dk = ds @ k, ds.transpose(0, 1, 3, 2) @ q
            dqkv = np.concatenate([t.transpose(0, 2, 1, 3).reshape(B, T, -1) for t in (dq, dk, dv)], -1)
            g = g + self.norm_backward(self.linear_backward(dqkv, n1, p + "attn.c_attn", grads), p + "ln_1", kept1, grads)
        np.add.at(grads["transformer.wte.weight"], inputs, g)
        position = np.zeros_like(self.w["transformer.wpe.weight"])
        np.add.at(position, positions(inputs, segment), g)
        grads["transformer.wpe.weight"] = position
        return grads


class QKNorm:
    """Forward of the ladder's second architecture for one weight dict in float64 (PAPERS' description of Marek et al. 2026)."""

    def __init__(self, weights, spec: ModelSpec):
        self.w = {name: np.asarray(value, np.float64) for name, value in weights.items()}
        self.spec = spec

    @staticmethod
    def norm(x):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)

    def rotate(self, x, place):
        """As complex numbers: entry i and entry i + E / 2 of a head turn by place * 10000^(-2i / E)."""
        half = self.spec.head_dim // 2
        turn = np.exp(1j * place[:, None, :, None] * 10_000.0 ** (-np.arange(half) / half))
        turned = (x[..., :half] + 1j * x[..., half:]) * turn
        return np.concatenate([turned.real, turned.imag], -1)

    def logits(self, inputs, segment=None):
        B, T = inputs.shape
        H, hd = self.spec.num_heads, self.spec.head_dim
        place = positions(inputs, segment)
        x = self.w["decoder.embed_in.weight"][inputs]
        allowed = np.tril(np.ones((T, T), bool))[None, None]
        if segment is not None:
            allowed = allowed & (segment[:, None, :, None] == segment[:, None, None, :])
        for i in range(self.spec.num_layers):
            p = f"decoder.h.{i}."
            q, k, v = (
                t.reshape(B, T, H, hd).transpose(0, 2, 1, 3) for t in np.split(self.norm(x) @ self.w[p + "attn.qkv.weight"], 3, -1)
            )
            q, k = (self.rotate(self.norm(t), place) for t in (q, k))
            a = softmax(np.where(allowed, q @ k.transpose(0, 1, 3, 2) / np.sqrt(hd), -np.inf))
            x = x + (a @ v).transpose(0, 2, 1, 3).reshape(B, T, -1) @ self.w[p + "attn.out.weight"]
            x = x + gelu(self.norm(x) @ self.w[p + "mlp.up.weight"]) @ self.w[p + "mlp.down.weight"]
        return self.norm(x) @ self.w["decoder.embed_out.weight"].T

    def losses(self, tokens, segment=None):
        """Next-token losses float64[B, T]."""
        p = softmax(self.logits(tokens[:, :-1], segment))
        return -np.log(np.take_along_axis(p, tokens[:, 1:, None].astype(int), -1)[..., 0])


class AdamW:
    """AdamW with bias correction and global-norm clipping, float64, on a dict of arrays."""

    def __init__(self, optim: OptimSpec):
        self.optim, self.m, self.v, self.step = optim, {}, {}, 0

    def update(self, weights, grads, learning_rate, decays=decays):
        """Returns the new weights and the gradient norm before clipping."""
        o = self.optim
        norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
        scale = max(1.0, norm / o.max_grad_norm) if o.max_grad_norm else 1.0
        self.step += 1
        new = {}
        for name, w in weights.items():
            g = grads[name] / scale
            self.m[name] = o.beta1 * self.m.get(name, 0) + (1 - o.beta1) * g
            self.v[name] = o.beta2 * self.v.get(name, 0) + (1 - o.beta2) * g**2
            mhat = self.m[name] / (1 - o.beta1**self.step)
            vhat = self.v[name] / (1 - o.beta2**self.step)
            decay = o.weight_decay if decays(name) else 0.0
            new[name] = w - learning_rate * decay * w - learning_rate * mhat / (np.sqrt(vhat) + o.epsilon)
        return new, norm


class Adafactor:
    """Adafactor of Shazeer and Stern (2018) without first moments, absolute rate, float64, on a dict of arrays."""

    def __init__(self, optim: OptimSpec):
        self.optim, self.moments, self.step = optim, {}, 0

    def update(self, weights, grads, learning_rate, decays=decays):
        """Returns the new weights and the gradient norm before clipping."""
        o = self.optim
        norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
        scale = max(1.0, norm / o.max_grad_norm) if o.max_grad_norm else 1.0
        self.step += 1
        rest = self.step**-0.8
        new = {}
        for name, w in weights.items():
            g = grads[name] / scale
            squares = g**2 + 1e-30
            if w.ndim == 2:
                row = self._mean("exp_avg_sq_row." + name, squares.mean(1), rest)
                column = self._mean("exp_avg_sq_col." + name, squares.mean(0), rest)
                update = g / np.sqrt(np.outer(row, column) / row.mean())
            else:
                update = g / np.sqrt(self._mean("exp_avg_sq." + name, squares, rest))
            update = update / max(1.0, np.sqrt((update**2).mean()))
            new[name] = w * (1 - learning_rate * (o.weight_decay if decays(name) else 0.0)) - learning_rate * update
        return new, norm

    def _mean(self, name, value, rest):
        self.moments[name] = (1 - rest) * self.moments.get(name, 0) + rest * value
        return self.moments[name]
