"""The data pipeline against named baselines, in one run: batches, resuming, tokenising, memory.

    python tests/benchmarks/bench_data.py [--rounds 9] [--tokens 100000000] [--text-mb 80] [--only batches tokenising memory]

Batches: two sources 0.99/0.01, 1,024 tokens, batch 32, one thread, page cache warm. The limit is a loop that copies rows of a flat
array (uint16 to uint16) in the same order. `datasets.interleave_datasets` and mosaicml-streaming are timed where they are installed, over
the same rows. Rates of batches are by processor time, which is what the code costs even on a shared machine.
Tokenising: the built-in prose, against SentencePiece's own threads on the same texts, by the clock and by processor time.
Memory: ten passes over a store, and `forget prepare` of a gigabyte of text, in processes of their own.
"""

import argparse
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mlx_forget.pipeline.batches import BatchStream
from mlx_forget.pipeline.mixture import Mixture, parse_share
from mlx_forget.pipeline.sides import RowSubset
from mlx_forget.pipeline.store import Split, StoreWriter
from tests.benchmarks.measure import interleaved, print_ratios, rate

LENGTH, BATCH, SHARE = 1024, 32, "1%"
TOKENIZER = Path(__file__).resolve().parents[1] / "pipeline" / "samples" / "store-v1" / "tokenizer.model"
# The rows of one measurement of a reader, by how fast it is.
ROWS, SLOW_ROWS = 64_000, 3_200


def make_split(folder: Path, num_tokens: int, seed: int) -> Split:
    """Random tokens in a real store."""
    writer = StoreWriter(folder, TOKENIZER, "benchmark", 32_000, 1, 2, "random tokens")
    rng = np.random.default_rng(seed)
    for _ in range(0, num_tokens, 1 << 20):
        writer.add("train", rng.integers(3, 32_000, (1 << 20) - 1, dtype=np.uint16), 1 << 20)
    return writer.close().split("train")


def make_stream(target: Split, pretrain: Split, *, num_steps: int) -> BatchStream:
    subsets = [RowSubset.of_tokens(split, LENGTH, None) for split in (target, pretrain)]
    mixture = Mixture(subsets[0].num_rows, subsets[1].num_rows, parse_share(SHARE), 0, pretrain_epochs=1 << 20)
    return BatchStream(*subsets, mixture, BATCH, num_steps)


def cpu_rate(work: Callable[[], object], amount: float) -> float:
    """Amount of work per second of processor time of one call."""
    start = time.process_time()
    work()
    return amount / (time.process_time() - start)


def copy_limit(target: Split) -> Callable[[], float]:
    """Rows per second of one copy of each row."""
    tokens = np.array(target.tokens[0])
    rows = len(tokens) // LENGTH
    view = tokens[: rows * LENGTH].reshape(rows, LENGTH)
    order = np.random.default_rng(1).permutation(rows).tolist()
    out = np.empty((BATCH, LENGTH), np.uint16)

    def measure() -> float:
        def work() -> None:
            for start in range(0, ROWS, BATCH):
                for i in range(BATCH):
                    out[i] = view[order[(start + i) % rows]]

        return cpu_rate(work, ROWS)

    return measure


def ours(stream: BatchStream) -> Callable[[], float]:
    step = iter(range(1 << 40))

    def measure() -> float:
        def work() -> None:
            for _ in range(ROWS // BATCH):
                stream.batch(next(step))

        return cpu_rate(work, ROWS)

    return measure


def interleaved_datasets(target: Split, pretrain: Split, folder: Path) -> dict[str, Callable[[], float]]:
    """Map-style (slices of a shuffled interleaving, NumPy format) and iterable, both with probabilities."""
    try:
        import datasets
    except ImportError:
        print("datasets is not installed: its baselines are left out")
        return {}
    datasets.disable_progress_bars()

    def rows_of(split: Split, name: str, num: int) -> "datasets.Dataset":
        view = split.tokens[0][: num * LENGTH].reshape(num, LENGTH).astype(np.int32)
        made = datasets.Dataset.from_dict(
            {"tokens": view}, features=datasets.Features({"tokens": datasets.List(datasets.Value("int32"), LENGTH)})
        )
        made.save_to_disk(str(folder / name))
        return datasets.load_from_disk(str(folder / name)).with_format("numpy")

    parts = [rows_of(target, "target", 40_000), rows_of(pretrain, "pretrain", 2_000)]
    mixed = datasets.interleave_datasets(parts, probabilities=[0.99, 0.01], seed=0, stopping_strategy="first_exhausted").shuffle(
        seed=0
    )
    streams = [part.to_iterable_dataset(num_shards=4) for part in parts]
    iterable = datasets.interleave_datasets(streams, probabilities=[0.99, 0.01], seed=0)
    places = iter(range(0, 1 << 40, BATCH))

    def slices() -> float:
        def work() -> None:
            for _ in range(SLOW_ROWS // BATCH):
                start = next(places) % (len(mixed) - BATCH)
                np.asarray(mixed[start : start + BATCH]["tokens"])

        return cpu_rate(work, SLOW_ROWS)

    def stream(shuffled: bool) -> Callable[[], float]:
        source = iterable.shuffle(seed=0, buffer_size=1000) if shuffled else iterable

        def measure() -> float:
            rows = iter(source)
            next(rows)

            def work() -> None:
                for _ in range(0, SLOW_ROWS, BATCH):
                    np.stack([np.asarray(next(rows)["tokens"]) for _ in range(BATCH)])

            return cpu_rate(work, SLOW_ROWS)

        return measure

    return {
        "datasets.interleave_datasets, slices": slices,
        "datasets.interleave_datasets, iterable": stream(False),
        "datasets.interleave_datasets, iterable, shuffled": stream(True),
    }


def mosaic_streaming(target: Split, pretrain: Split, folder: Path) -> dict[str, Callable[[], float]]:
    """Its iterator over two local streams with proportions, shuffled, rows as NumPy arrays, which are stacked to batches."""
    try:
        from streaming import MDSWriter, Stream, StreamingDataset
    except ImportError:
        print("mosaicml-streaming is not installed: its baseline is left out")
        return {}
    streams = []
    for split, name, num, share in ((target, "target", 40_000, 0.99), (pretrain, "pretrain", 2_000, 0.01)):
        view = split.tokens[0][: num * LENGTH].reshape(num, LENGTH)
        with MDSWriter(out=str(folder / f"mds-{name}"), columns={"tokens": f"ndarray:uint16:{LENGTH}"}) as writer:
            for row in view:
                writer.write({"tokens": row})
        streams.append(Stream(local=str(folder / f"mds-{name}"), proportion=share))
    mixed = StreamingDataset(streams=streams, batch_size=BATCH, shuffle=True, shuffle_seed=0, num_canonical_nodes=1)

    def measure() -> float:
        rows = iter(mixed)
        next(rows)

        def work() -> None:
            for _ in range(0, SLOW_ROWS, BATCH):
                np.stack([next(rows)["tokens"] for _ in range(BATCH)])

        return cpu_rate(work, SLOW_ROWS)

    return {"mosaicml-streaming": measure}


def bench_batches(folder: Path, num_tokens: int, rounds: int) -> None:
    target = make_split(folder / "target", num_tokens, 0)
    pretrain = make_split(folder / "pretrain", num_tokens // 4, 1)
    contenders = {
        "row copies, uint16 (the limit)": copy_limit(target),
        "mlx-forget batches": ours(make_stream(target, pretrain, num_steps=1 << 30)),
    }
    contenders |= interleaved_datasets(target, pretrain, folder)
    contenders |= mosaic_streaming(target, pretrain, folder)
    for measure in contenders.values():
        measure()
    figures = interleaved(contenders, rounds=rounds)
    print_ratios("mixed shuffled batches, 0.99/0.01", figures, baseline="row copies, uint16 (the limit)", unit="rows/s")
    for name in contenders:
        if name.startswith(("datasets", "mosaicml")):
            ratios = [a / b for a, b in zip(figures["mlx-forget batches"], figures[name], strict=True)]
            print(f"  mlx-forget over {name}: {np.median(ratios):.1f}")


class Endless(Split):
    """A split that claims billions of rows and serves those of a small one: what it costs to find rows, at any size."""

    def num_rows(self, row_length: int) -> int:
        return 4_000_000_000

    def read_rows(self, rows: np.ndarray, out: np.ndarray) -> None:
        super().read_rows(rows % Split.num_rows(self, out.shape[1] - 1), out)


def bench_resume(folder: Path) -> None:
    """The first batch of a new stream at row 10^9, processor time, median of 50 streams."""
    small = make_split(folder / "small", 1 << 22, 2)
    split = Endless(small.name, small.shards, small.tokens, small.folder, 1, 2)
    seconds = []
    for _ in range(50):
        stream = make_stream(split, split, num_steps=1 << 40)
        start = time.process_time()
        stream.batch(10**9 // BATCH)
        seconds.append(time.process_time() - start)
    print(f"first batch at row 10^9: median {np.median(seconds) * 1e3:.2f} ms (min {min(seconds) * 1e3:.2f})")


def bench_passes(folder: Path) -> None:
    """Memory over ten passes of a stream, in a process of its own."""
    import subprocess

    subprocess.run([sys.executable, __file__, "--only", "passes"], check=True, env={**os.environ, "TMPDIR": str(folder)})


def passes(folder: Path) -> None:
    split = make_split(folder / "passes", 1 << 23, 3)
    stream = make_stream(split, split, num_steps=1 << 30)
    steps = split.num_rows(LENGTH) // BATCH
    resident = []
    for number in range(10):
        for step in range(number * steps, (number + 1) * steps):
            stream.batch(step)
        resident.append(_family_memory(os.getpid()) / 1e6)
    print(f"resident memory after pass 1, 2 and 10: {resident[0]:.1f}, {resident[1]:.1f} and {resident[9]:.1f} MB")


def bench_tokenising(folder: Path, text_mb: int, rounds: int) -> None:
    """MB/s from a file to a store, against SentencePiece's threads on the same documents in memory."""
    import json

    import sentencepiece

    from mlx_forget.pipeline.catalog import builtin_tokenizer, documents_of, write_store
    from mlx_forget.pipeline.corpora import build_corpus, read_documents

    tokenizer = builtin_tokenizer(4096)
    texts: list[str] = []
    size = 0
    while size < text_mb * 10**6:
        for text in read_documents(build_corpus("prose"), "train"):
            texts.append(text)
            size += len(text.encode())
            if size >= text_mb * 10**6:
                break
    path = folder / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    number = iter(range(1 << 30))
    cores = os.cpu_count() or 1

    processor_time: dict[str, list[float]] = {}

    def timed(name: str, work: Callable[[], object]) -> Callable[[], float]:
        """By the clock; megabytes per second of processor time, with that of children, are kept beside."""

        def measure() -> float:
            before = _processor_seconds()
            by_clock = rate(work, size / 1e6)
            processor_time.setdefault(name, []).append(size / 1e6 / (_processor_seconds() - before))
            return by_clock

        return measure

    def store() -> object:
        return write_store(folder / f"store{next(number)}", [documents_of(str(path))], tokenizer)

    def library(threads: int) -> Callable[[], object]:
        return lambda: processor.encode(texts, out_type=int, num_threads=threads)

    baseline = f"SentencePiece, {cores} threads"
    works = {baseline: library(cores), "SentencePiece, 1 thread": library(1), "mlx-forget, file to store": store}
    figures = interleaved({name: timed(name, work) for name, work in works.items()}, rounds=rounds)
    print_ratios(f"tokenising {size / 1e6:.0f} MB, unigram 4,096", figures, baseline=baseline, unit="MB/s")
    print_ratios("  the same for each second of processor time", processor_time, baseline=baseline, unit="MB/s")


def _processor_seconds() -> float:
    """Of this process and of the children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def bench_memory(folder: Path, text_mb: int) -> None:
    """Peak memory of `forget prepare` on much text, with that of its workers."""
    import subprocess

    path = folder / "big.txt"
    line = " ".join(f"word{i % 977}" for i in range(14)) + "\n"
    with path.open("w", encoding="utf-8") as file:
        for start in range(0, text_mb * 10**6, len(line) * 1000):
            file.write(f"{start} {line}" * 1000)
    command = [sys.executable, "-m", "mlx_forget", "prepare", str(path), "-o", str(folder / "big"), "--tokenizer", str(TOKENIZER)]
    start = time.perf_counter()
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        peak = max(peak, _family_memory(process.pid))
        time.sleep(0.2)
    seconds = time.perf_counter() - start
    print(
        f"forget prepare of {text_mb} MB: peak {peak / 1e6:.0f} MB over all its processes, {text_mb / seconds:.1f} MB/s, exit {process.returncode}"
    )


def _family_memory(pid: int) -> int:
    """Resident bytes of a process and its children (Linux)."""
    total = 0
    for number in (pid, *(int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split())):
        try:
            total += int(Path(f"/proc/{number}/statm").read_text().split()[1]) * resource.getpagesize()
        except (OSError, IndexError):
            continue
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=100_000_000)
    parser.add_argument("--text-mb", type=int, default=80)
    parser.add_argument("--memory-mb", type=int, default=1000)
    parser.add_argument("--only", nargs="*", default=["batches", "tokenising", "memory"])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if "batches" in arguments.only:
            bench_batches(folder, arguments.tokens, arguments.rounds)
            bench_resume(folder)
            bench_passes(folder)
        if "passes" in arguments.only:
            passes(folder)
        if "tokenising" in arguments.only:
            bench_tokenising(folder, arguments.text_mb, arguments.rounds)
        if "memory" in arguments.only:
            bench_memory(folder, arguments.memory_mb)


if __name__ == "__main__":
    main()
