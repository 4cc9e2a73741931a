"""`forget replay`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from mlx_forget.cli import completion

app = typer.Typer()


@app.command()
def replay(
    model: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="A run, checkpoint or Hugging Face folder, or a Hub id.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the store.")],
    num_tokens: Annotated[str | None, typer.Option(help="How many tokens, such as 300K or 2M. \\[default: 2M]")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens per row. \\[default: the model's context]")] = None,
    seed: Annotated[int | None, typer.Option(help="Row j depends on the seed and on j alone. \\[default: 0]")] = None,
    temperature: Annotated[float | None, typer.Option(help="1 is the model's own distribution. \\[default: 1]")] = None,
    prompt: Annotated[str | None, typer.Option(help="Text that every row starts with. \\[default: none, BOS alone]")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows sampled at once; the rows are the same. \\[default: 64]")] = None,
    backend: Annotated[
        str | None,
        typer.Option(help="mlx, cuda (PyTorch, also on a CPU) or auto. \\[default: auto]", autocompletion=completion.backends),
    ] = None,
    device: Annotated[str | None, typer.Option(help="Insist on a device such as cuda:1 or cpu.")] = None,
    precision: Annotated[
        str | None, typer.Option(help="fp32 or bf16. \\[default: fp32]", autocompletion=completion.precisions)
    ] = None,
    num_threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
    log_probs: Annotated[
        str | None,
        typer.Option(
            help="Keep the model's log-probabilities beside the store, for KL replay: full (float16), or top-64 and the like. A store "
            "that is there already is not sampled, only read."
        ),
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the Python code that comes with a checkpoint.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the store's facts as one JSON object.")] = False,
) -> None:
    """Sample a model into a store, to replay when its pretraining data is not at hand.

    Rows start with BOS and do not stop at EOS. A killed command goes on where it was. Use the store as --replay-data, or like any
    other data.

    Example: forget replay runs/base --num-tokens 2M --output stores/replay
    """
    from rich.console import Console

    from mlx_forget.backends import choose_backend, load_backend
    from mlx_forget.checkpoint import check_vocabulary, find_checkpoint
    from mlx_forget.cli.answers import propose, works_in
    from mlx_forget.cli.data import print_facts
    from mlx_forget.cli.signals import graceful_stop
    from mlx_forget.errors import UserError, unknown
    from mlx_forget.fuse import whole_checkpoint
    from mlx_forget.ladder import default_row_length
    from mlx_forget.pipeline.reference_rows import parse_kind
    from mlx_forget.pipeline.sides import RowSubset
    from mlx_forget.pipeline.store import open_store
    from mlx_forget.pipeline.vocabularies import load_vocabulary
    from mlx_forget.progress import Preparation
    from mlx_forget.replay.log_probs import keep_log_probs
    from mlx_forget.replay.sampled_store import sample_store, samples_of
    from mlx_forget.replay.sampling import SampleSpec
    from mlx_forget.token_counts import parse_tokens
    from mlx_forget.trainer import RuntimeSpec, TrainerSpec
    from mlx_forget.training.start import special_tokens

    console = Console(stderr=True)

    def say(sentence: str) -> None:
        console.print(sentence, markup=False, highlight=False, soft_wrap=True)

    works_in(output)
    if log_probs is not None:
        parse_kind(log_probs)
    # What is left of an interrupted call beside a whole store is removed by the next one.
    if output.exists() and log_probs is None and not samples_of(output).exists():
        raise UserError(f"{output} exists already: choose another place or remove it.")
    start = whole_checkpoint(find_checkpoint(model, trust_remote_code=trust_remote_code))
    shape, vocabulary = start.model_spec(), load_vocabulary(start.tokenizer)
    check_vocabulary(start.folder, vocabulary, shape)
    if not start.is_own:
        say(special_tokens(vocabulary))
    row = default_row_length(shape) if length is None else length
    if row < 1:
        raise UserError(f"--length must be positive, it is {row}.")
    if row > shape.context_length:
        raise UserError(f"--length {row} exceeds the model's context of {shape.context_length} tokens.")
    sampling = {"seed": seed, "temperature": temperature, "batch_size": batch_size}
    spec = SampleSpec(
        num_tokens=parse_tokens(num_tokens or "2M"),
        length=row,
        prompt=tuple(vocabulary.encode_batch([prompt or ""])[0].tolist()),
        bos_id=vocabulary.bos_id,
        eos_id=vocabulary.eos_id,
        num_ids=vocabulary.vocab_size,
        **{key: value for key, value in sampling.items() if value is not None},  # type: ignore[arg-type]
    )
    name, reason = (backend, "") if backend not in (None, "auto") else choose_backend()
    if reason:
        say(f"Backend {name}: {reason}.")
    if precision not in (None, "fp32", "bf16"):
        raise unknown("precision", precision, ("fp32", "bf16"))
    runtime = RuntimeSpec(precision="bf16" if precision == "bf16" else "fp32", device=device, num_threads=num_threads)
    trainer = load_backend(name)(TrainerSpec(model=shape, runtime=runtime))
    for note in trainer.notes:
        say(note)
    trainer.load(start.weights)
    with graceful_stop(say) as interrupted:
        how: dict[str, Any] = {"backend": name, "precision": runtime.precision, "say": say, "progress": Preparation(console)}
        how["interrupted"] = interrupted
        is_there = output.exists()
        store = open_store(output) if is_there else sample_store(trainer, start, output, spec, **how)
        if store.tokenizer_hash != vocabulary.hash:
            raise UserError(f"{output} was made with another tokenizer than {model}: its tokens mean something else to this model.")
        if log_probs is not None:
            # As `--replay-data` reads a sample, or a store in packed rows.
            kept = keep_log_probs(RowSubset.of_tokens(store.split("train"), row, None), trainer, start, log_probs, **how)
            say(f"Kept in {kept.folder}: {kept.in_words()}")
    print_facts(store, as_json=as_json)
    if as_json or is_there:
        return
    entropy, repetition = store.provenance["entropy_nats"], store.provenance["repetition"]
    console.print(
        f"Wrote {output}: {entropy:.2f} nats per token, {repetition:.0%} repeated 4-grams", highlight=False, soft_wrap=True
    )
    propose("train", "--init", model, "--target", "FILE", "--method", "kl-replay", "--replay-data", output)
