"""Estimates before a run: memory against what is really kept, rows that fit, hours and what they are taken from, refusals."""

import dataclasses
import json

import numpy as np
import pytest

from mlx_forget.adapters import num_trainable
from mlx_forget.backends import available_backends, load_backend
from mlx_forget.costs import DEVICES, USABLE_SHARE, Rate, Step, device_like, fitting_rows, memory_bytes, refuse_what_cannot_fit
from mlx_forget.errors import OutOfMemory, UserError
from mlx_forget.ladder import initial_weights, linear_shapes, model_spec, num_params, param_shapes
from mlx_forget.methods import method_spec
from mlx_forget.trainer import AdapterSpec, Batch, OptimSpec, RuntimeSpec, Trainer, TrainerSpec

XL = model_spec("xl", 32_000, 1024)


def step_of(model=XL, **changes):
    base = Step(model=model, optim=OptimSpec(), method=method_spec("plain"), precision="bf16", rows=112, row_length=1024)
    return dataclasses.replace(base, **changes)


def kept(model, precision, *, on_cpu):
    return Trainer.kept_bytes(model, precision, on_cpu=on_cpu)


@pytest.mark.parametrize("name", ["LAYERSx64", "qknorm-LAYERSx64"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("grad_checkpoint", [False, True])
def test_pytorch_keeps_what_the_estimate_says(name, precision, grad_checkpoint):
    """Within 5%, by the tensors that autograd saves of one more block: a formula, not a clock."""
    torch = pytest.importorskip("torch")
    from cuda_backend.architectures import hidden_states

    rows, found = 2, []
    for layers in (2, 3):
        spec = model_spec(name.replace("LAYERS", str(layers)), 61, 48)
        weights = {key: torch.from_numpy(value).requires_grad_() for key, value in initial_weights(spec, 0)}
        sizes = {value.numel() for value in weights.values()}
        kept_storages = {}

        def note(tensor, sizes=sizes, kept_storages=kept_storages):
            # Neither weights nor their narrow copies, which the estimate counts by themselves.
            if tensor.numel() not in sizes:
                kept_storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with (
            torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
            torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"),
        ):
            x = hidden_states(weights, spec, torch.zeros(rows, 48, dtype=torch.long), grad_checkpoint=grad_checkpoint)
        found.append(sum(kept_storages.values()))
        del x
    expected = 4 * spec.width if grad_checkpoint else load_backend("cuda").kept_bytes(spec, precision, on_cpu=True)
    assert (found[1] - found[0]) / (rows * 48) == pytest.approx(expected, rel=0.05)


def test_the_state_of_a_trainer_is_what_the_estimate_says():
    backend = load_backend(available_backends()[0])
    for optimizer in ("adamw", "adafactor"):
        spec = TrainerSpec(
            model=model_spec("2x64", 97, 16), optim=OptimSpec(name=optimizer), runtime=RuntimeSpec(device="cpu", num_threads=1)
        )
        trainer = backend(spec)
        state = trainer._optimizer.moments if hasattr(trainer, "_optimizer") else trainer._moments
        parts = memory_bytes(step_of(spec.model, optim=spec.optim), backend.kept_bytes)
        assert parts["moments"] == sum(value.nbytes for value in state.values())
        assert parts["weights"] == sum(value.nbytes for value in trainer._weights.values()) == 4 * num_params(spec.model)


def mlx_peak(name, *, rows, grad_checkpoint=False):
    """The highest memory use of a step after the first, by MLX's own count, and the shape."""
    import mlx.core as mx

    spec = model_spec(name, 512, 128)
    runtime = RuntimeSpec(device="cpu", num_threads=1, grad_checkpoint=grad_checkpoint)
    trainer = load_backend("mlx")(TrainerSpec(model=spec, runtime=runtime))
    tokens, zeros = np.ones((rows, 129), np.int32), np.zeros(rows, np.uint8)
    batch = Batch(tokens=tokens, loss_mask=np.ones((rows, 128), np.uint8), segment=None, term=zeros, source=zeros)
    trainer.train_step(batch, 1e-3).read()
    mx.clear_cache()
    mx.reset_peak_memory()
    trainer.train_step(batch, 1e-3).read()
    return mx.get_peak_memory(), spec


MLX = pytest.mark.skipif("mlx" not in available_backends(), reason="needs MLX, whose allocator counts")


@MLX
@pytest.mark.parametrize("name", ["4x128", "qknorm-4x128"])
def test_a_step_of_mlx_takes_about_the_memory_of_the_estimate(name):
    """Within 25%."""
    peak, spec = mlx_peak(name, rows=16)
    step = step_of(spec, precision="fp32", rows=16, row_length=128, on_cpu=True)
    assert peak == pytest.approx(memory_bytes(step, load_backend("mlx").kept_bytes)["total"], rel=0.25)


@MLX
def test_recomputing_saves_mlx_what_it_saves_pytorch():
    """Beside its state, four more blocks take a small part of what they take when all is kept."""
    state = 4 * 12 * 128 * 128 * 20
    growth = {}
    for lean in (False, True):
        peaks = [mlx_peak(name, rows=8, grad_checkpoint=lean)[0] for name in ("2x128", "6x128")]
        growth[lean] = peaks[1] - peaks[0] - state
    assert growth[True] < 0.2 * growth[False]


def test_rows_are_halved_until_they_fit():
    step = step_of()
    need = memory_bytes(step, kept)["total"]
    assert fitting_rows(step, kept, need / USABLE_SHARE + 1) == 112
    rows = fitting_rows(step, kept, 80e9)
    assert rows in (56, 28, 14, 7, 4, 2, 1)
    assert memory_bytes(step, kept, rows=rows)["total"] <= 0.9 * 80e9 < memory_bytes(step, kept, rows=2 * rows)["total"]
    assert fitting_rows(step, kept, 10e9) is None


def test_what_does_not_fit_is_refused_with_the_estimate_and_what_would():
    with pytest.raises(UserError) as refused:
        refuse_what_cannot_fit(step_of(), kept, 24e9, "the device")
    sentence = str(refused.value)
    assert "1,276,235,776 parameters does not fit: one row of 1,024 tokens needs about" in sentence
    assert "the device has 24 GB" in sentence
    assert "--optimizer adafactor --grad-checkpoint or" in sentence
    assert "2 such devices with --shard --grad-checkpoint" in sentence
    refuse_what_cannot_fit(step_of(), kept, 80e9, "the device")


def test_devices_and_methods_change_the_estimate_as_they_should():
    alone = memory_bytes(step_of(), kept)
    shared = memory_bytes(step_of(num_shards=8, num_devices=8), kept)
    assert shared["moments"] == alone["moments"] // 8
    assert memory_bytes(step_of(method=method_spec("anchored-adamw")), kept)["reference"] == 4 * num_params(XL)
    narrow = dataclasses.replace(method_spec("anchored-adamw"), anchor_precision="bf16")
    assert memory_bytes(step_of(method=narrow), kept)["reference"] == 2 * num_params(XL)
    assert step_of(kl_rows=28).flops == pytest.approx(step_of().flops * (1 + 28 / 112 / 3))
    assert sum(np.prod(shape) for shape in param_shapes(XL).values()) == num_params(XL)


def test_a_device_is_known_by_its_data_sheet():
    assert device_like("NVIDIA H100 80GB HBM3") is DEVICES["h100"]
    assert device_like("NVIDIA GeForce RTX 4090") is DEVICES["rtx-4090"]
    assert device_like("Quadro") is device_like(None) is None
    rate = Rate.assumed(DEVICES["h100"], "bf16", 8)
    assert rate.flops_per_second == 8 * 0.4 * 989e12
    assert "assumed: 40% of 989 TFLOP/s" in rate.says


DRY = ("train", "--init", "scratch", "--target", "prose", "--pretrain", "none", "--dry-run")


def test_a_dry_run_says_what_a_run_will_cost(run_forget, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paper = ("--model", "xl", "--max-seq-length", "512", "--batch-size", "128", "--tokens-per-param", "100")
    code, out, err = run_forget(*DRY, *paper, "--on", "a100", "--devices", "8", "--json")
    assert code == 0, err
    plan = json.loads(out)
    assert plan["precision"] == "bf16"
    assert plan["num_devices"] == 8
    assert plan["num_tokens"] == pytest.approx(100 * plan["num_params"], rel=1e-3)
    assert plan["hours"] == pytest.approx(plan["train_flops"] / (8 * 0.4 * 312e12) / 3600, rel=0.03)
    assert plan["memory_bytes_per_device"]["total"] <= 0.9 * 80e9
    assert plan["disk_bytes"] == 44 * plan["num_params"]
    code, out, _ = run_forget(*DRY, "--measure", "5")
    assert code == 0
    assert "measured: after 5 steps the rate was" in out
    assert not (tmp_path / "runs").exists()


@pytest.mark.skipif("cuda" not in available_backends(), reason="needs PyTorch")
def test_a_gpu_is_planned_for_as_a_gpu_from_a_machine_without_one(run_forget):
    """In bf16 a CPU attends over short rows in float32 and keeps more; neither a GPU elsewhere nor one that is not used changes that."""
    activations = {}
    for where in (("--on", "a100"), ("--device", "cpu")):
        options = ("--backend", "cuda", "--model", "2x48", "--max-seq-length", "64", "--batch-size", "8", "--precision", "bf16")
        code, out, err = run_forget(*DRY, *options, *where, "--json")
        assert code == 0, err
        activations[where[0]] = json.loads(out)["memory_bytes_per_device"]["activations"]
    assert activations == {"--on": 8 * 64 * 2 * 36 * 48, "--device": 8 * 64 * 2 * 46 * 48}


@pytest.mark.parametrize(
    "options, sentence",
    [
        (("--dry-run", "--on", "h101"), "Unknown device 'h101'. Did you mean 'h100'?"),
        (("--measure", "5"), "are for --dry-run"),
        (("--dry-run", "--on", "h100", "--measure", "5"), "give one of them"),
        (("--dry-run", "--model", "xl", "--init", "scratch", "--max-seq-length", "512", "--on", "rtx-4090"), "does not fit"),
    ],
)
def test_a_wrong_question_is_refused(run_forget, options, sentence):
    code, _, err = run_forget("train", *options)
    assert code == 2
    assert sentence in err.replace("\n", " ")


# --- micro-batches that choose themselves ---


@pytest.mark.skipif("cuda" not in available_backends(), reason="needs PyTorch")
def test_a_device_that_runs_out_of_memory_is_given_half_the_rows_and_the_result_stays(monkeypatch):
    import torch

    from cuda_backend.trainer import TorchTrainer

    def small_device(self, batch, rows, *rest, real=TorchTrainer._accumulate_gradient):
        if len(batch.tokens[rows]) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return real(self, batch, rows, *rest)

    spec = TrainerSpec(model=model_spec("2x32", 53, 16), runtime=RuntimeSpec(device="cpu", num_threads=1))
    tokens = np.random.default_rng(0).integers(0, 53, (7, 17)).astype(np.int32)
    zeros = np.zeros(7, np.uint8)
    batch = Batch(tokens=tokens, loss_mask=np.ones((7, 16), np.uint8), segment=None, term=zeros, source=zeros)
    whole = TorchTrainer(spec).train_step(batch, 1e-3).read()
    monkeypatch.setattr(TorchTrainer, "_accumulate_gradient", small_device)
    monkeypatch.setattr(TorchTrainer, "room", 2, raising=False)
    trainer = TorchTrainer(spec)
    assert trainer.micro_batch_size is None
    halved = trainer.train_step(batch, 1e-3).read()
    assert trainer.micro_batch_size == 2
    assert halved.grad_norm == pytest.approx(whole.grad_norm, rel=1e-5)
    np.testing.assert_allclose(halved.loss_sums, whole.loss_sums, rtol=1e-6)
    monkeypatch.setattr(TorchTrainer, "room", 0)
    with pytest.raises(OutOfMemory, match="One row at a time is more than the device holds"):
        trainer.train_step(batch, 1e-3)


def test_a_run_takes_as_many_rows_as_fit_and_records_it(run_forget, tmp_path, monkeypatch):
    """The memory of an accelerator is told; the losses are those of whole batches."""
    options = ("train", "--init", "scratch", "--target", "prose", "--pretrain", "none", "--iters", "6", "--model", "2x48")
    assert run_forget(*options, "--output", tmp_path / "whole")[0] == 0
    backend = load_backend("cuda" if "cuda" in available_backends() else "mlx")
    monkeypatch.setattr(backend, "memory_bytes", classmethod(lambda cls: 8_000_000))
    code, _, err = run_forget(*options, "--output", tmp_path / "pieces")
    assert code == 0, err
    whole, pieces = (json.loads((tmp_path / name / "record.json").read_text()) for name in ("whole", "pieces"))
    assert whole["micro_batch_size"] is None
    assert pieces["micro_batch_size"] in (1, 2, 4)
    assert whole["run_id"] == pieces["run_id"]
    for moment in ("best", "end"):
        assert pieces["losses"][moment]["target_val"] == pytest.approx(whole["losses"][moment]["target_val"], abs=1e-5)
    monkeypatch.setattr(backend, "memory_bytes", classmethod(lambda cls: 1_000_000))
    code, _, err = run_forget(*options, "--output", tmp_path / "none")
    assert code == 2
    assert "does not fit" in err
    assert not (tmp_path / "none").exists()


def test_adapters_take_neither_gradients_nor_moments_of_the_base_nor_a_reference():
    adapter = AdapterSpec(rank=8, target_modules=("all-linear",))
    full, small = (memory_bytes(step_of(adapter=own, method=method_spec("kl-replay")), kept) for own in (None, adapter))
    trained = num_trainable(linear_shapes(XL), adapter)
    assert small["gradients"] == 4 * trained
    assert small["moments"] == 8 * trained
    assert small["weights"] == full["weights"] + 4 * trained
    assert (full["reference"], small["reference"]) == (4 * num_params(XL), 0)
    assert step_of(adapter=adapter).flops == pytest.approx(step_of().flops * 2 / 3)
    with pytest.raises(UserError, match="--fine-tune-type lora"):
        refuse_what_cannot_fit(step_of(rows=1), kept, 12e9, "this device")
