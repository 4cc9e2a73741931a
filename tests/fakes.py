"""A NumPy bigram model behind the trainer interface: loop, sweep and command-line tests take milliseconds with it."""

from dataclasses import replace

import numpy as np
from safetensors.numpy import load_file, save_file

from mlx_forget.backends import BACKENDS, Backend
from mlx_forget.errors import UserError
from mlx_forget.methods import NUM_SOURCES, NUM_TERMS, TERM_REPLAY_KL
from mlx_forget.trainer import (
    Capabilities,
    Comparison,
    NoStep,
    Stack,
    StepResult,
    Trainer,
    TrainerSpec,
    check_reference,
    group_counts,
    kl_weights,
    token_weights,
    unpack_step,
)
from tests.reference import AdamW, softmax

NAME = "bigram.weight"
# A table of logits needs larger steps than a network.
RATE = 20


def kept_probability(kept, own):
    """The kept reference float64[n, T, V]; tokens that are not kept share its tail in the proportions of `own`."""
    if kept.top is None:
        return softmax(kept.log_probs.astype(np.float64))
    rest = own.copy()
    np.put_along_axis(rest, kept.top, 0, -1)
    tail = np.exp(kept.tail.astype(np.float64))[..., None]
    reference = rest / rest.sum(-1, keepdims=True) * tail
    np.put_along_axis(reference, kept.top, np.exp(kept.log_probs.astype(np.float64)), -1)
    return reference / reference.sum(-1, keepdims=True)


class FakeStep(StepResult):
    def __init__(self, packed, counts):
        self.packed, self.counts = packed, counts

    def read(self):
        return unpack_step(self.packed, self.counts)


class BigramTrainer(Trainer):
    """Logits of the next token are a row of one [V, V] table."""

    def __init__(self, spec: TrainerSpec):
        self.spec = spec
        size = spec.model.vocab_size
        self.weight = np.random.Generator(np.random.Philox(key=[spec.seed, 0])).normal(0, 0.02, (size, size))
        assert spec.optim.name == "adamw"
        self.adamw = AdamW(spec.optim)
        self.adamw.m[NAME] = np.zeros_like(self.weight)
        self.adamw.v[NAME] = np.zeros_like(self.weight)
        self.reference = None
        self.fisher = None
        self.num_steps = 0
        self.spoil_step = None

    @classmethod
    def describe(cls):
        return Capabilities(precisions=("fp32",), terms=(0, 1, 2), anchor=True, fisher=True, sample=True, stack=True)

    @classmethod
    def stack(cls, spec, seeds):
        return BigramStack(spec, seeds)

    @property
    def device(self):
        return "numpy"

    def train_step(self, batch, learning_rate):
        method = self.spec.method
        kept = batch.reference
        check_reference(method, reference=self.reference is not None or kept is not None, fisher=self.fisher is not None)
        counts = group_counts(batch, method)
        weights, kl_weight = token_weights(batch, counts, method).astype(np.float64), kl_weights(batch, counts, method)
        inputs, labels = batch.tokens[:, :-1], batch.tokens[:, 1:]
        probability = softmax(self.weight[inputs])
        nll = -np.log(np.take_along_axis(probability, labels[..., None], -1)[..., 0])
        sums = np.zeros(NUM_TERMS * NUM_SOURCES)
        own = batch.term != TERM_REPLAY_KL
        np.add.at(sums, (batch.term.astype(int) * NUM_SOURCES + batch.source)[own], (nll * batch.loss_mask).sum(1)[own])
        kl_gradient = 0
        if kl_weight is not None:
            if kept is None:
                reference = softmax(self.reference[inputs])
            else:
                reference = probability.copy()
                reference[batch.term == TERM_REPLAY_KL] = kept_probability(kept, probability[batch.term == TERM_REPLAY_KL])
            kl = (reference * (np.log(reference) - np.log(probability))).sum(-1)
            rows = kl_weight.any(1)
            np.add.at(sums, (TERM_REPLAY_KL * NUM_SOURCES + batch.source)[rows], (kl * batch.loss_mask).sum(1)[rows])
            kl_gradient = (probability - reference) * kl_weight[..., None]
        np.put_along_axis(probability, labels[..., None], np.take_along_axis(probability, labels[..., None], -1) - 1, -1)
        gradient = np.zeros_like(self.weight)
        np.add.at(gradient, inputs, probability * weights[..., None] + kl_gradient)
        if method.l2_sp or method.ewc:
            strength = method.l2_sp + (method.ewc * self.fisher if method.ewc else 0)
            gradient += strength * (self.weight - self.reference)
        self.num_steps += 1
        if self.spoil_step == self.num_steps:
            gradient[0, 0] = np.nan
        norm = np.sqrt((gradient**2).sum())
        skipped = not np.isfinite(norm)
        if not skipped:
            if method.anchor_decay:
                self.weight = self.weight + min(1, learning_rate * RATE * method.anchor_decay) * (self.reference - self.weight)
            new, _ = self.adamw.update({NAME: self.weight}, {NAME: gradient}, learning_rate * RATE)
            self.weight = new[NAME]
        return FakeStep(np.concatenate([sums, [norm, float(skipped)]]), counts)

    def token_losses(self, tokens, segment=None):
        probability = softmax(self.weight[tokens[:, :-1]])
        return -np.log(np.take_along_axis(probability, tokens[:, 1:, None], -1)[..., 0]).astype(np.float32)

    def log_probs(self, tokens, segment=None, *, from_reference=False):
        weight = self.reference if from_reference else self.weight
        return np.log(softmax(weight[tokens[:, :-1]])).astype(np.float32)

    def compare(self, tokens, mask):
        if self.reference is None:
            raise UserError("compare needs a reference: call set_reference first.")
        labels = tokens[:, 1:, None].astype(int)
        logp, ref = (np.log(softmax(w[tokens[:, :-1]])) for w in (self.weight, self.reference))
        top = ref.argmax(-1)
        hits = [(w.argmax(-1) == labels[..., 0]) for w in (logp, ref)]
        measures = (
            -np.take_along_axis(logp, labels, -1)[..., 0],
            -np.take_along_axis(ref, labels, -1)[..., 0],
            (np.exp(ref) * (ref - logp)).sum(-1),
            -(np.exp(ref) * logp).sum(-1),
            -np.take_along_axis(logp, top[..., None], -1)[..., 0],
            (logp.argmax(-1) == top),
            *hits,
            np.exp(logp.max(-1)),
            np.exp(ref.max(-1)),
        )
        return Comparison(*((m * mask).astype(np.float32) for m in measures))

    def set_reference(self, reference):
        if reference == "adapters_off":
            raise UserError("The reference 'adapters_off' needs adapters, and this model has none.")
        if reference is None:
            self.reference = None
        else:
            self.reference = self.weight.copy() if reference == "start" else load_file(reference)[NAME]

    def set_fisher(self, tokens, mask, segment=None):
        self.fisher = np.zeros_like(self.weight)
        for row, row_mask in zip(tokens, mask, strict=True):
            gradient = np.zeros_like(self.weight)
            error = softmax(self.weight[row[:-1]])
            error[np.arange(len(row) - 1), row[1:]] -= 1
            np.add.at(gradient, row[:-1], error * row_mask[:, None])
            self.fisher += gradient**2 / mask.sum()

    def save(self, path, *, trainable_only=False):
        save_file({NAME: self.weight}, path)

    def load(self, path):
        weight = load_file(path).get(NAME)
        if weight is None or weight.shape != self.weight.shape:
            raise UserError(f"{path} does not hold the weights of this model: names or shapes differ.")
        self.weight = weight

    def save_state(self, path):
        moments = {f"exp_avg.{NAME}": self.adamw.m[NAME], f"exp_avg_sq.{NAME}": self.adamw.v[NAME]}
        save_file(moments | {"step": np.array([self.adamw.step], np.float32)}, path)

    def load_state(self, path):
        state = load_file(path)
        if set(state) != {f"exp_avg.{NAME}", f"exp_avg_sq.{NAME}", "step"}:
            raise UserError(f"{path} is not the training state of this model.")
        self.adamw.m[NAME], self.adamw.v[NAME] = state[f"exp_avg.{NAME}"], state[f"exp_avg_sq.{NAME}"]
        self.adamw.step = int(state["step"][0])

    def sample(self, prompts, u, *, temperature=1.0, from_reference=False, num_ids=None):
        weight = self.reference if from_reference else self.weight
        if weight is None:
            raise UserError("Sampling the reference needs one: call set_reference first.")
        if prompts.shape[1] + u.shape[1] - 1 > self.spec.model.context_length:
            raise UserError(f"Prompt and sample together exceed the context of {self.spec.model.context_length} tokens.")
        token, out = prompts[:, -1], np.empty(u.shape, np.int32)
        for t in range(u.shape[1]):
            cumulative = softmax(weight[token, :num_ids] / temperature).cumsum(-1)
            token = np.minimum((cumulative <= u[:, t, None] * cumulative[:, -1:]).sum(-1), cumulative.shape[1] - 1)
            out[:, t] = token
        return out

    def peak_memory_bytes(self):
        return self.weight.nbytes


class BigramStack(Stack):
    """Tables side by side."""

    def __init__(self, spec, seeds):
        self.members = [BigramTrainer(replace(spec, seed=seed)) for seed in seeds]

    def train_step(self, batches, learning_rates, active):
        steps = zip(self.members, batches, learning_rates, active, strict=True)
        return [member.train_step(batch, rate) if on else NoStep() for member, batch, rate, on in steps]


def add_fake_backend(patch, name="fake"):
    """Put the NumPy backend into the registry for as long as the patch lasts."""
    patch.setitem(BACKENDS, name, Backend("tests.fakes:BigramTrainer", "numpy", "nothing to install"))
