"""The `forget` command. A command's module is imported when it is called, so `forget --help` stays fast.

Exit codes: 0 done; 1 a run failed or diverged; 2 the request was wrong; 130 interrupted, 143 terminated (both resumable).
"""

import errno
import sys
from importlib import import_module
from typing import Any

import typer
import typer.core

from mlx_forget.cli.answers import begin, emit_interrupted
from mlx_forget.cli.signals import interruptible
from mlx_forget.errors import Interrupted, LeaderFailed, RunFailed, UserError, exit_code

# name -> (module with a Typer `app`, one line of help)
COMMANDS = {
    "prepare": ("mlx_forget.cli.prepare", "Tokenise text into a store."),
    "data": ("mlx_forget.cli.data", "Look into a store: info, head, sample, stats, verify; merge its parts; list recipes."),
    "train": ("mlx_forget.cli.train", "Pretrain or finetune a model."),
    "sweep": (
        "mlx_forget.cli.sweep",
        "Train a grid of runs from a recipe. Done runs are skipped, begun ones resume, failed ones are listed.",
    ),
    "replay": (
        "mlx_forget.cli.replay",
        "Sample a model into a store, to replay when its pretraining data is not at hand.",
    ),
    "fuse": ("mlx_forget.cli.fuse", "Make one whole checkpoint of adapters and the base that they were trained on."),
    "audit": ("mlx_forget.cli.audit", "What did a model forget? Two checkpoints in; a table, JSON and an HTML page out."),
    "runs": ("mlx_forget.cli.runs", "List, show, compare, export, prune and verify runs."),
    "plot": (
        "mlx_forget.cli.plot",
        "Draw Figure 1, methods or learning rates from the runs of a sweep, and print what is read at the minimum.",
    ),
    "report": (
        "mlx_forget.cli.report",
        "What a sweep found, as one HTML page: runs, U-curves, forgetting, laws with hold-outs, and which p keeps within a budget.",
    ),
    "fit": ("mlx_forget.cli.fit", "Fit a law to a table of runs: parameters with honest intervals, and what not to trust."),
    "predict": ("mlx_forget.cli.predict", "Predict a loss, or the forgetting, from a fit.json."),
    "advise": ("mlx_forget.cli.advise", "The smallest p (or the largest D, the smallest N) that keeps forgetting under a budget."),
    "laws": ("mlx_forget.cli.laws", "The laws that can be fitted: formula, columns, parameters, source."),
    "doctor": ("mlx_forget.cli.doctor", "What this machine can run, and what is missing."),
}


class LazyGroup(typer.core.TyperGroup):
    """Lists commands from the table, and imports the one that is called."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return typer.core.TyperCommand(cmd_name, help=COMMANDS[cmd_name][1]) if cmd_name in COMMANDS else None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        return name, load_command(name) if name in COMMANDS and command is not None else command, rest


def load_command(name: str) -> Any:
    """The real command behind a row of the table: its module's app, or the command of that name in it."""
    command: Any = typer.main.get_command(import_module(COMMANDS[name][0]).app)
    return _with_the_example_last(getattr(command, "commands", {}).get(name, command))


def _with_the_example_last(command: Any) -> Any:
    """The command, and those below it, with the example that ends each help text moved behind the options."""
    text, mark, example = (command.help or "").rpartition("\n\nExample:")
    if mark:
        command.help, command.epilog = text, f"Example: {example.strip()}"
    for below in getattr(command, "commands", {}).values():
        _with_the_example_last(below)
    return command


app = typer.Typer(
    cls=LazyGroup,
    name="forget",
    help="Finetune language models without forgetting, measure what was forgotten, and predict it first.",
    epilog="Example: forget train --target notes.txt --p 1%",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def root() -> None:
    pass


def main(arguments: list[str] | None = None) -> None:
    """Run the command line: one clear line for an error, a traceback only with --debug."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    begin(arguments)
    with interruptible():
        code = _run([argument for argument in arguments if argument != "--debug"], debug=debug)
    sys.exit(code)


def _run(arguments: list[str], *, debug: bool) -> int:
    try:
        app(args=arguments, prog_name="forget")
        return 0
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0
    except (UserError, RunFailed) as error:
        if debug:
            raise
        _say(str(error))
        return exit_code(error)
    except Interrupted as error:
        _answer_interrupted(error)
        _say(str(error))
        return exit_code(error)
    except LeaderFailed as error:
        return error.code
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            where = f" ({error.filename})" if error.filename else ""
            _say(f"The disk is full{where}: free some space, and the same command goes on.")
            return 1
        if debug or error.filename is None:
            raise
        _say(f"{error.filename}: {error.strerror}.")
        return 2


def _answer_interrupted(error: Interrupted) -> None:
    """What --json says of a command that a signal stopped; of several processes of one run, rank 0 answers."""
    from mlx_forget.distributed import launched_rank

    if not launched_rank():
        emit_interrupted(error)


def _say(sentence: str) -> None:
    print(f"forget: {sentence}", file=sys.stderr)
