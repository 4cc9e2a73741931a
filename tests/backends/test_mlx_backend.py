"""What only the MLX backend has: its BLAS, one trace, threads, memory limits, and installations that cannot work."""

import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mlx_forget.backends import available_backends, load_backend
from mlx_forget.errors import UserError
from mlx_forget.ladder import model_spec, num_params
from mlx_forget.methods import MethodSpec, method_spec
from mlx_forget.trainer import Batch, RuntimeSpec, TrainerSpec

pytestmark = pytest.mark.skipif("mlx" not in available_backends(), reason="MLX is not installed")
ROOT = Path(__file__).parents[2]
SPEC = model_spec("2x32", vocab_size=53, context_length=16)
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="Linux wheels alone link the reference BLAS")


def trainer_of(spec=SPEC, method=None, **runtime):
    runtime_spec = RuntimeSpec(device="cpu", **runtime)
    return load_backend("mlx")(TrainerSpec(model=spec, method=method or MethodSpec(), runtime=runtime_spec, seed=3))


def make_batch(seed=0, rows=6):
    tokens = np.random.default_rng(seed).integers(0, SPEC.vocab_size, (rows, 17)).astype(np.int32)
    zeros = np.zeros(rows, np.uint8)
    return Batch(tokens, np.ones((rows, 16), np.uint8), None, zeros, zeros)


def run_python(code, *, path=(), check=True):
    """Run code in a process of its own; returns its output."""
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join([*map(str, path), str(ROOT)])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0 or not check, done.stderr
    return done.stdout + done.stderr


@LINUX
def test_a_tuned_blas_is_loaded_without_importing_torch():
    code = (
        "import mlx_forget.mlx_backend as b, sys, os, ctypes; print(b.BLAS_NOTE); print('torch' in sys.modules);"
        "print([k for k in os.environ if k.endswith('_NUM_THREADS')]); process = ctypes.CDLL(None); print(hasattr(process, 'sgemm_'))"
    )
    note, torch_imported, variables, product = run_python(code).splitlines()
    assert torch_imported == "False"
    assert variables == "[]"
    if "No tuned BLAS" not in note:
        assert note.startswith("MLX's products on the CPU use the BLAS of ")
        assert product == "True"


@LINUX
def test_a_process_that_has_mlx_already_is_told_that_it_is_slow():
    assert "reference BLAS" in run_python("import mlx.core; import mlx_forget.mlx_backend as b; print(b.BLAS_NOTE)")


@LINUX
@pytest.mark.parametrize(
    "says, found",
    [
        ("Assembler messages: Fatal error: cannot write: No space left on device", "OSError 28 {folder}"),
        (
            "loop.cpp:3:1: error: no such header",
            "UserError MLX's C++ compiler failed (loop.cpp:3:1: error: no such header): give --no-compile",
        ),
    ],
)
def test_a_compiler_that_fails_is_one_sentence(says, found, tmp_path):
    """It writes into the temporary folder: a full one is said as any full disk is, and that is where to make room."""
    compiler = tmp_path / "g++"
    compiler.write_text(f"#!/bin/sh\n[ $1 = --version ] && exit 0\necho '{says}'\nexit 1\n")
    compiler.chmod(0o755)
    code = (
        f"import os, tempfile; os.environ['PATH'] = '{tmp_path}:' + os.environ['PATH']; os.environ['TMPDIR'] = '{tmp_path}';"
        "from mlx_forget.backends import load_backend; from mlx_forget.trainer import *; from mlx_forget.ladder import model_spec;"
        "spec = TrainerSpec(model=model_spec('1x16', 8, 4), runtime=RuntimeSpec(device='cpu'))\n"
        "try: load_backend('mlx')(spec)\n"
        "except Exception as error: print(type(error).__name__, *((error.errno, error.filename) if isinstance(error, OSError) else (error,)))"
    )
    assert found.format(folder=tmp_path) in run_python(code)


@LINUX
@pytest.mark.skipif("cuda" not in available_backends(), reason="PyTorch is not installed")
def test_pytorch_says_when_it_has_one_thread_because_mlx_came_first():
    code = (
        "from mlx_forget.backends import load_backend; from mlx_forget.trainer import *; from mlx_forget.ladder import model_spec;"
        "spec = TrainerSpec(model=model_spec('1x16', 8, 4), runtime=RuntimeSpec(device='cpu'));"
        "load_backend('mlx'); trainer = load_backend('cuda')(spec); import torch;"
        "print(torch.get_num_threads() == 1, any('MLX was loaded before it' in note for note in trainer.notes))"
    )
    few, said = run_python(code).splitlines()[-1].split()
    assert few == said


def test_the_trainer_announces_its_blas():
    if sys.platform == "linux":
        assert any("BLAS" in note for note in trainer_of().notes)


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.full)])
def test_no_step_is_traced_again_after_the_first(whole):
    """With the whole step compiled as on a GPU, and with the part of it that a CPU compiles."""
    trainer = trainer_of(compile=True if whole else None, num_threads=1)
    trainer.train_step(make_batch(), 1e-3).read()
    before = trainer.num_traces
    assert before == (2 if whole else 1)
    for step in range(50):
        trainer.train_step(make_batch(step), 1e-3 * (1 + step)).read()
    assert trainer.num_traces == before


@pytest.mark.parametrize("whole", [False, True])
def test_replay_and_penalties_are_not_traced_again_either(whole):
    """Weights of terms, lambda and the rate enter as arrays, and the rows of the KL term as an index."""
    trainer = trainer_of(compile=True if whole else None, num_threads=2, method=method_spec("kl-replay", 2.0))
    trainer.set_reference("start")
    batches = [make_batch(step, rows=5) for step in range(6)]
    batches = [dataclasses.replace(b, term=np.array([0, 2, 0, 2, 0], np.uint8)) for b in batches]
    trainer.train_step(batches[0], 1e-3).read()
    before = trainer.num_traces
    for step, batch in enumerate(batches):
        trainer.train_step(batch, 1e-3 * (1 + step)).read()
    assert trainer.num_traces == before


def test_threads_change_no_kl_term_but_by_rounding():
    single, several = (trainer_of(num_threads=n, method=method_spec("kl-replay", 2.0)) for n in (1, 3))
    for trainer in (single, several):
        trainer.set_reference("start")
    for step in range(3):
        batch = dataclasses.replace(make_batch(step, rows=7), term=np.array([0, 2, 0, 0, 2, 2, 2], np.uint8))
        left, right = (trainer.train_step(batch, 1e-2).read() for trainer in (single, several))
        np.testing.assert_allclose(left.loss_sums, right.loss_sums, rtol=1e-5, atol=1e-5)


def test_threads_change_nothing_but_rounding():
    single, several = trainer_of(num_threads=1), trainer_of(num_threads=3)
    for step in range(3):
        left, right = (trainer.train_step(make_batch(step, rows=7), 1e-3).read() for trainer in (single, several))
        np.testing.assert_allclose(left.loss_sums, right.loss_sums, rtol=1e-6)
    np.testing.assert_allclose(single.token_losses(make_batch(9).tokens), several.token_losses(make_batch(9).tokens), atol=1e-5)


def test_without_a_compiler_the_step_is_eager_and_says_so(monkeypatch):
    if sys.platform != "linux":
        pytest.skip("only MLX's CPU build calls a C++ compiler")
    usual = trainer_of()
    monkeypatch.setattr(shutil, "which", lambda name: None)
    eager = trainer_of()
    assert any("No C++ compiler" in note for note in eager.notes)
    left, right = (trainer.train_step(make_batch(), 1e-3).read() for trainer in (usual, eager))
    np.testing.assert_allclose(left.loss_sums, right.loss_sums, rtol=1e-6)
    assert left.grad_norm == pytest.approx(right.grad_norm, rel=1e-5)


@pytest.fixture
def memory_limits():
    import mlx.core as mx

    memory, cache = mx.set_memory_limit(1 << 34), mx.set_cache_limit(1 << 34)
    yield
    mx.set_memory_limit(memory)
    mx.set_cache_limit(cache)


def test_a_memory_limit_below_the_models_need_says_the_need(memory_limits):
    need = 16 * num_params(SPEC) / 1e9
    with pytest.raises(UserError, match=f"{need:.3g} GB for weights, gradients and moments"):
        trainer_of(memory_limit_gb=need / 2)


def test_a_memory_limit_below_a_steps_need_says_the_need(memory_limits):
    trainer = trainer_of(memory_limit_gb=16 * num_params(SPEC) / 1e9 * 1.01)
    with pytest.raises(UserError, match=r"A step needs .* GB, --memory-limit-gb is"):
        trainer.train_step(make_batch(rows=64), 1e-3).read()
    roomy = trainer_of(memory_limit_gb=1.0)
    assert roomy.train_step(make_batch(), 1e-3).read().skipped == 0


@pytest.mark.parametrize("device", ["cuda:1", "tpu"])
def test_a_device_that_mlx_does_not_know_is_refused(device):
    with pytest.raises(UserError, match="MLX knows no such device"):
        load_backend("mlx")(TrainerSpec(model=SPEC, runtime=RuntimeSpec(device=device)))


@pytest.mark.full
def test_memory_stays_flat():
    import resource

    trainer = trainer_of()
    peaks = []
    for step in range(200):
        trainer.train_step(make_batch(step), 1e-3)
        if step in (20, 199):
            trainer.train_step(make_batch(), 1e-3).read()
            peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    assert peaks[1] <= peaks[0] * 1.02


LOAD = "from mlx_forget.backends import load_backend\ntry:\n    load_backend('mlx')\nexcept Exception as e:\n    print(type(e).__name__, e)"


def fake_mlx(folder, core, version="0.32.0"):
    """A package called mlx whose core is the given code."""
    (folder / "mlx").mkdir()
    (folder / "mlx" / "__init__.py").write_text("")
    if core is not None:
        (folder / "mlx" / "core.py").write_text(core)
    info = folder / f"mlx-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: mlx\nVersion: {version}\n")
    return folder


def test_mlx_without_a_core_is_a_request_to_install_it(tmp_path):
    output = run_python(LOAD, path=[fake_mlx(tmp_path, None)])
    assert output.startswith("UserError")
    assert "pip install 'mlx-forget[mlx]'" in output


def test_mlx_without_a_backend_library_names_the_pip_line(tmp_path):
    core = "raise ImportError('libmlx.so: cannot open shared object file')"
    output = run_python(LOAD, path=[fake_mlx(tmp_path, core)])
    assert output.startswith("UserError")
    assert "pip install 'mlx[cpu]'" in output


def test_mlx_that_is_too_old_says_what_is_needed(tmp_path):
    output = run_python(LOAD, path=[fake_mlx(tmp_path, "", version="0.20.1")])
    assert output.startswith("UserError MLX 0.20.1 is too old, this needs 0.32")
