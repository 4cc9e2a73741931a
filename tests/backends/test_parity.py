"""MLX against PyTorch, each measurement held to its band (see `parity.py`)."""

import pytest

from mlx_forget.backends import available_backends
from tests.backends import parity

pytestmark = pytest.mark.skipif(not {"mlx", "cuda"} <= set(available_backends()), reason="parity needs both MLX and PyTorch")


def check(*measurements):
    for m in measurements:
        assert m.value <= m.band, f"{m.what}: {m.value:.3g} {m.unit}, band {m.band:g}"


def test_logits_after_each_block():
    check(parity.block_logits())


def test_token_losses():
    check(parity.losses())


def test_gradients():
    check(parity.gradients())


def test_twenty_clipped_and_decayed_steps():
    check(parity.twenty_steps())


def test_a_finetune_with_injection():
    check(*parity.finetune())


@pytest.mark.full
def test_the_minimum_of_the_u_curve():
    check(parity.u_curve())


def test_accumulation_and_recomputation():
    check(parity.micro_batches())


def test_bf16():
    check(parity.bf16())


@pytest.mark.parametrize("first, second", [("mlx", "cuda"), ("cuda", "mlx")])
def test_either_backend_continues_the_others_checkpoint(first, second):
    check(parity.switch(first, second))


def test_the_same_uniforms_give_the_same_rows():
    check(parity.samples())


def test_logits_against_transformers():
    pytest.importorskip("transformers")
    check(parity.transformers_logits())


def test_operators_of_a_gpu_agree_with_those_of_a_cpu():
    check(parity.operators_agree())
