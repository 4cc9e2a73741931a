"""An output matrix that does not learn costs no gradient: with adapters, a chunk of logits takes two products, not three."""

import numpy as np
import pytest

from mlx_forget.backends import available_backends, load_backend
from mlx_forget.checkpoint import find_checkpoint
from mlx_forget.ladder import model_spec
from mlx_forget.methods import MethodSpec
from mlx_forget.pipeline.reference_rows import ReferenceRows
from mlx_forget.trainer import AdapterSpec, Batch, RuntimeSpec, TrainerSpec

SPEC = model_spec("2x32", vocab_size=61, context_length=12)
KL_REPLAY = MethodSpec(name="kl-replay", coefficients=(1.0, 0.0, 0.7), reference="start")


def trainer_of(name, *, adapted, model=SPEC):
    adapter = AdapterSpec(rank=4) if adapted else None
    runtime = RuntimeSpec(device="cpu", num_threads=1, compile=False)
    return load_backend(name)(TrainerSpec(model=model, adapter=adapter, method=KL_REPLAY, runtime=runtime))


def kl_batch(term, stored_by=None, top=None):
    tokens = np.random.default_rng(0).integers(0, 61, (4, 13)).astype(np.int32)
    term = np.array(term, np.uint8)
    kept = None if stored_by is None else ReferenceRows.of(stored_by.log_probs(tokens[term == 2]), top)
    return Batch(tokens, np.ones((4, 12), np.uint8), None, term, np.zeros(4, np.uint8), kept)


@pytest.mark.skipif("cuda" not in available_backends(), reason="needs PyTorch")
@pytest.mark.parametrize("reference", ["none", "live", "stored", "likeliest"])
def test_pytorch_makes_no_tensor_of_the_shape_of_a_frozen_head(reference):
    from torch.utils._python_dispatch import TorchDispatchMode

    made = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            result = operator(*args, **(kwargs or {}))
            # A transposed head is a view of it.
            made.append((getattr(result, "shape", None), operator.is_view))
            return result

    term = [0] * 4 if reference == "none" else [2] * 4
    for adapted in (True, False):
        trainer = trainer_of("cuda", adapted=adapted)
        trainer.set_reference("start")
        batch = kl_batch(term, trainer if reference in ("stored", "likeliest") else None, 7 if reference == "likeliest" else None)
        made.clear()
        with Watch():
            trainer._accumulate_gradient(batch, slice(0, 4), *weights_of(trainer, batch))
        assert ((61, 32), False) in made or adapted
        assert ((61, 32), False) not in made or not adapted


def weights_of(trainer, batch):
    from mlx_forget.trainer import group_counts, kl_weights, token_weights

    counts = group_counts(batch, trainer.spec.method)
    return token_weights(batch, counts, trainer.spec.method), kl_weights(batch, counts, trainer.spec.method)


@pytest.mark.skipif("mlx" not in available_backends(), reason="needs MLX")
@pytest.mark.parametrize("other_tool", [False, True], ids=["ladder", "checkpoint"])
@pytest.mark.parametrize("reference", ["none", "live", "stored"])
def test_mlx_takes_two_products_a_chunk_where_the_head_is_frozen(reference, other_tool, tmp_path):
    import mlx.core as mx

    model = SPEC
    if other_tool:
        pytest.importorskip("transformers")
        from tests.small_checkpoints import write_checkpoint

        model = find_checkpoint(write_checkpoint(tmp_path / "llama", "llama")).model_spec()
    for adapted, products_a_chunk in ((True, 2), (False, 3)):
        trainer = trainer_of("mlx", adapted=adapted, model=model)
        trainer.set_reference("start")
        batch = kl_batch([0] * 4 if reference == "none" else [2] * 4, trainer if reference == "stored" else None)
        token_weight, kl_weight = weights_of(trainer, batch)
        terms = trainer._passes.kl_terms(batch, slice(0, 4), kl_weight, trainer._reference)
        counts = []
        # 48 tokens: one chunk, or two.
        for chunk in (48, 24):
            arrays = (mx.array(part) for part in (batch.tokens[:, :-1], batch.tokens[:, 1:], token_weight))
            own = trainer._folded()
            losses, gradients = trainer._decoder.gradients(own, *arrays, chunk=chunk, penalty=terms and terms[0])
            mx.export_to_dot(str(tmp_path / "graph.dot"), losses, *gradients.values())
            graph = (tmp_path / "graph.dot").read_text()
            counts.append(graph.count('label ="Matmul"') + graph.count('label ="AddMM"'))
        # The reference's own logits are one more.
        assert counts[1] - counts[0] == products_a_chunk + (reference == "live")
