"""Distances and ranks of a weight change, against constructions whose answer is known."""

import numpy as np
import pytest

from mlx_forget.audit.models import open_model
from mlx_forget.audit.weights import _squares, compare_weights, rank_of


@pytest.mark.parametrize("shape", [(30, 50), (50, 30)])
def test_the_rank_counts_the_directions_that_hold_nine_tenths_of_the_variance(shape):
    random = np.random.default_rng(0)
    left = np.linalg.qr(random.normal(size=(shape[0], 6)))[0]
    right = np.linalg.qr(random.normal(size=(shape[1], 6)))[0]

    def matrix(*squares):
        whole = left[:, : len(squares)] * np.sqrt(squares) @ right[:, : len(squares)].T
        return whole.T @ whole

    assert rank_of(matrix(1.0)) == 1
    assert rank_of(matrix(0.91, 0.09)) == 1
    assert rank_of(matrix(0.89, 0.11)) == 2
    assert rank_of(matrix(1, 1, 1, 1, 1, 1)) == 6
    assert rank_of(matrix(0.9, 0.1)) == 1
    assert rank_of(np.zeros((4, 4))) == 0


def test_distances_add_up_over_matrices_layers_and_the_model(make_checkpoint, tmp_path):
    base, tuned = make_checkpoint(tmp_path / "base"), make_checkpoint(tmp_path / "tuned", moved=0.05)
    found = compare_weights(open_model(tmp_path / "base"), open_model(tmp_path / "tuned"))
    change = {name: tuned[name].astype(np.float64) - base[name] for name in base}
    whole = np.sqrt(sum((value**2).sum() for value in change.values()))
    assert found.distance == pytest.approx(whole)
    assert found.relative == pytest.approx(whole / np.sqrt(sum((value.astype(np.float64) ** 2).sum() for value in base.values())))
    assert [layer.name for layer in found.layers] == ["embeddings", "block 0", "block 1", "final norm"]
    assert np.sqrt(sum(layer.distance**2 for layer in found.layers)) == pytest.approx(whole)
    tensors = {tensor.name: tensor for tensor in found.tensors}
    name = "transformer.h.1.mlp.c_fc.weight"
    singular = np.linalg.svd(change[name], compute_uv=False) ** 2
    assert tensors[name].rank == 1 + int((np.cumsum(singular) < 0.9 * singular.sum()).sum())
    assert (tensors[name].layer, tensors[name].full_rank) == (1, 32)
    assert tensors["transformer.h.1.mlp.c_fc.bias"].rank is None
    assert tensors["transformer.h.1.mlp.c_fc.bias"].relative is None


def test_weights_of_more_than_two_dimensions_have_norms_and_no_rank():
    """Such as the kernels of short convolutions."""
    before = np.random.default_rng(0).standard_normal((6, 1, 3)).astype(np.float32)
    square, change, _ = _squares(before, before + np.float32(0.5))
    assert square == pytest.approx(float((before.astype(np.float64) ** 2).sum()))
    assert change == pytest.approx(18 * 0.25)
