"""What is compiled on a GPU computes what is not: PyTorch's step with torch.compile, on the CPU."""

import numpy as np
import pytest

from mlx_forget.backends import load_backend
from mlx_forget.ladder import model_spec
from mlx_forget.trainer import Batch, RuntimeSpec, TrainerSpec

torch = pytest.importorskip("torch")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_softmax_that_is_compiled_is_that_of_the_fused_cross_entropy(dtype):
    from cuda_backend import cross_entropy

    rng = torch.Generator().manual_seed(0)
    x = torch.randn(37, 16, generator=rng).to(getattr(torch, dtype)).requires_grad_()
    head = torch.randn(50, 16, generator=rng, requires_grad=True)
    labels, weight = torch.randint(0, 50, (37,), generator=rng), torch.rand(37, generator=rng)
    found = []
    for softmax in ((), (cross_entropy.softmax_gradient,)):
        objective, nll = cross_entropy.FusedCrossEntropy.apply(x, head, labels, weight, 16, *softmax)
        found.append([nll, *torch.autograd.grad(objective, (x, head))])
    for left, right in zip(*found, strict=True):
        np.testing.assert_allclose(left.detach().float(), right.detach().float(), atol=1e-5 if dtype == "float32" else 2e-2)


@pytest.mark.full
@pytest.mark.parametrize("model", ["2x32", "qknorm-2x32"])
def test_a_compiled_step_is_the_eager_step(model):
    spec = model_spec(model, vocab_size=61, context_length=12)
    tokens = np.random.default_rng(0).integers(0, 61, (5, 13)).astype(np.int32)
    zeros = np.zeros(5, np.uint8)
    batch = Batch(tokens=tokens, loss_mask=np.ones((5, 12), np.uint8), segment=None, term=zeros, source=zeros)
    readings = []
    for compiled in (False, True):
        runtime = RuntimeSpec(device="cpu", num_threads=1, compile=compiled)
        trainer = load_backend("cuda")(TrainerSpec(model=spec, runtime=runtime))
        readings.append([trainer.train_step(batch, 1e-2).read() for _ in range(3)])
    for eager, fused in zip(*readings, strict=True):
        np.testing.assert_allclose(fused.loss_sums, eager.loss_sums, rtol=1e-5)
        assert fused.grad_norm == pytest.approx(eager.grad_norm, rel=1e-4)
