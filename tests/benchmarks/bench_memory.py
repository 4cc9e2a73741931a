"""How much memory a finetuning step takes: the peak of two steps on a small Llama checkpoint, each case in a process of its own.

    python -m tests.benchmarks.bench_memory [--layers 8] [--width 128] [--rows 4] [--length 256]

On MLX the allocator counts (what is in use at its highest, weights included); of PyTorch on a CPU it is the process's resident memory at
its highest less what it was before the model was made (Linux). Quantised bases are MLX's.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.small_checkpoints import write_checkpoint

CASES = {
    "all weights": ("--type", "full"),
    "all weights, recomputed activations": ("--type", "full", "--grad-checkpoint"),
    "last 2 blocks": ("--type", "full", "--num-layers", "2"),
    "LoRA": ("--type", "lora"),
    "LoRA, recomputed activations": ("--type", "lora", "--grad-checkpoint"),
}
QUANTISED = {
    "LoRA on a 4-bit base": ("--type", "lora"),
    "LoRA on a 4-bit base, recomputed activations": ("--type", "lora", "--grad-checkpoint"),
}


def write_base(folder: Path, *, layers: int, width: int, vocab_size: int = 512) -> Path:
    """A Llama checkpoint with random weights."""
    import transformers

    shape = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": layers, "vocab_size": vocab_size}
    heads = {"num_attention_heads": width // 32, "num_key_value_heads": width // 64, "max_position_embeddings": 2048}
    return write_checkpoint(folder, "llama", config=transformers.LlamaConfig(**shape, **heads))


def quantise(folder: Path) -> Path:
    """The same in 4 bits, as mlx-lm writes it."""
    from mlx_lm.utils import load_model, quantize_model, save_config, save_model

    model, config = load_model(folder)
    model, config = quantize_model(model, config, 32, 4)
    target = folder.with_name(folder.name + "-4bit")
    target.mkdir()
    save_model(target, model)
    save_config(config, config_path=target / "config.json")
    return target


def measure(backend: str, folder: Path, arguments: Sequence[str], *, rows: int, length: int) -> int:
    """Peak bytes of a case."""
    command = [sys.executable, "-m", "tests.benchmarks.bench_memory", "--child", backend, "--model", str(folder)]
    sizes = ["--rows", str(rows), "--length", str(length)]
    done = subprocess.run([*command, *sizes, *arguments], capture_output=True, text=True, check=True)
    return int(json.loads(done.stdout.splitlines()[-1])["peak_bytes"])


def _child(given: argparse.Namespace) -> int:
    import numpy as np

    from mlx_forget.backends import load_backend
    from mlx_forget.pretrained import read_pretrained
    from mlx_forget.trainer import AdapterSpec, Batch, RuntimeSpec, TrainerSpec

    spec = TrainerSpec(
        model=read_pretrained(Path(given.model)),
        adapter=AdapterSpec(target_modules=("all-linear",)) if given.type == "lora" else None,
        num_layers=given.num_layers,
        runtime=RuntimeSpec(num_threads=1, device="cpu", grad_checkpoint=given.grad_checkpoint),
    )
    trainer_class = load_backend(given.child)
    tokens = np.random.default_rng(0).integers(0, spec.model.vocab_size, (given.rows, given.length + 1)).astype(np.int32)
    zeros = np.zeros(given.rows, np.uint8)
    batch = Batch(tokens, np.ones((given.rows, given.length), np.uint8), None, zeros, zeros)
    before = 0
    if given.child == "cuda":
        import transformers  # noqa: F401

        before = _resident("VmRSS")
    trainer = trainer_class(spec)
    if given.child == "mlx":
        import mlx.core as mx

        mx.reset_peak_memory()
    else:
        # Of the process's highest resident memory, forget what loading took.
        Path("/proc/self/clear_refs").write_text("5")
    for _ in range(2):
        trainer.train_step(batch, 1e-4).read()
    return int(mx.get_peak_memory()) if given.child == "mlx" else _resident("VmHWM") - before


def _resident(which: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(which))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--child")
    parser.add_argument("--model")
    parser.add_argument("--type", default="full")
    parser.add_argument("--num-layers", type=int)
    parser.add_argument("--grad-checkpoint", action="store_true")
    given = parser.parse_args()
    if given.child:
        print(json.dumps({"peak_bytes": _child(given)}))
        return
    from mlx_forget.backends import available_backends

    with tempfile.TemporaryDirectory() as folder:
        base = write_base(Path(folder) / "base", layers=given.layers, width=given.width)
        for backend in available_backends():
            bases = [(base, CASES)] + ([(quantise(base), QUANTISED)] if backend == "mlx" else [])
            first = 0
            for place, cases in bases:
                for name, arguments in cases.items():
                    peak = measure(backend, place, arguments, rows=given.rows, length=given.length)
                    first = first or peak
                    print(f"{backend}: {name}: {peak / 1e6:.0f} MB, {peak / first:.2f} of all weights", flush=True)


if __name__ == "__main__":
    main()
