"""The `forget` command. A command's module is imported when it is called, so `forget --help` stays fast.

Exit codes: 0 done; 1 a run failed or diverged; 2 the request was wrong; 130 interrupted, 143 terminated (both resumable).
"""

import os
import signal
import sys
from importlib import import_module
from typing import Any

import click
import typer

# name -> (module with a Typer `app`, one line of help)
COMMANDS = {
    "prepare": ("mlx_forget.cli.prepare", "Tokenise text into a store."),
    "data": ("mlx_forget.cli.data", "Look into a store: info, head, sample, verify."),
    "train": ("mlx_forget.cli.train", "Pretrain or finetune a model."),
    "sweep": ("mlx_forget.cli.sweep", "Train a grid of runs from a recipe, resumably."),
    "runs": ("mlx_forget.cli.runs", "List finished runs, or show one."),
    "plot": ("mlx_forget.cli.plot", "Draw the figures of a sweep."),
    "doctor": ("mlx_forget.cli.doctor", "What this machine can run, and what is missing."),
}


class LazyGroup(typer.core.TyperGroup):
    """Lists commands from the table, and imports the one that is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        return click.Command(cmd_name, help=COMMANDS[cmd_name][1])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name, command, rest = super().resolve_command(ctx, args)
        if name in COMMANDS and command is not None:
            command = load_command(name)
        return name, command, rest


def load_command(name: str) -> click.Command:
    """The real command behind a row of the table."""
    module = import_module(COMMANDS[name][0])
    return typer.main.get_command(module.app)


app = typer.Typer(
    cls=LazyGroup,
    name="forget",
    help="Finetune language models without forgetting, measure what was forgotten, and predict it first.",
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
    sys.exit(_run([argument for argument in arguments if argument != "--debug"], debug=debug))


def _run(arguments: list[str], *, debug: bool) -> int:
    from mlx_forget.errors import RunFailed, UserError

    try:
        result: Any = app(args=arguments, prog_name="forget", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except click.exceptions.Exit as stop:
        return int(stop.exit_code)
    except click.exceptions.ClickException as error:
        error.show()
        return 2
    except (UserError, RunFailed) as error:
        if debug:
            raise
        _say(str(error))
        return 2 if isinstance(error, UserError) else 1
    except (KeyboardInterrupt, click.exceptions.Abort) as error:
        from mlx_forget.cli.signals import received

        _say(str(error) or "interrupted")
        return 143 if received() == signal.SIGTERM else 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if debug or error.filename is None:
            raise
        _say(f"{error.filename}: {error.strerror}.")
        return 2


def _say(sentence: str) -> None:
    print(f"forget: {sentence}", file=sys.stderr)
