"""What the command line says of itself: help, examples, completion, doctor, and that every command reports."""

import errno
import json
import os
import shlex
import subprocess
import sys

import pytest
import typer

from mlx_forget.cli import COMMANDS, app, load_command, main
from mlx_forget.errors import Interrupted, LeaderFailed, RunFailed


def test_the_command_table_says_what_the_commands_say():
    for name, (_, text) in COMMANDS.items():
        assert load_command(name).help.strip().splitlines()[0] == text, name


def commands_at_and_below(name, command):
    """(words, command) of a command and of its subcommands."""
    yield name, command
    for below, subcommand in getattr(command, "commands", {}).items():
        yield from commands_at_and_below(f"{name} {below}", subcommand)


ALL_COMMANDS = [found for name in COMMANDS for found in commands_at_and_below(name, load_command(name))]


@pytest.mark.parametrize("command, text", [("train", "[@revision]"), ("prepare", "[:CONFIG][@REVISION]")])
def test_help_keeps_what_stands_in_brackets(run_forget, monkeypatch, command, text):
    monkeypatch.setenv("COLUMNS", "200")
    out = run_forget(command, "--help")[1]
    assert text in "".join(out.replace("│", "").split())


@pytest.mark.parametrize("words, command", ALL_COMMANDS, ids=[words.replace(" ", "-") for words, _ in ALL_COMMANDS])
def test_the_help_of_every_command_ends_with_an_example_that_parses(words, command):
    """Options are known and take such values; nothing runs."""
    start, _, example = command.epilog.partition(": ")
    assert start == "Example"
    given = shlex.split(example)
    assert given[: 1 + len(words.split())] == ["forget", *words.split()]
    rest = given[1 + len(words.split()) :]
    while rest and rest[0] in getattr(command, "commands", {}):
        command = command.commands[rest.pop(0)]
    command.make_context(words, rest)


@pytest.mark.parametrize(("command", "said"), [("fuse", "what the adapters name"), ("train", "runs/ID-BACKEND")])
def test_what_brackets_say_is_shown(command, said, run_forget, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert said in run_forget(command, "--help")[1]


def test_the_help_of_forget_ends_with_an_example(run_forget):
    code, out, _ = run_forget("--help")
    example = typer.main.get_command(app).epilog
    assert code == 0
    assert out.strip().splitlines()[-1].strip() == example
    load_command("train").make_context("train", shlex.split(example)[3:])


def test_doctor_names_every_backend(run_forget):
    code, out, err = run_forget("doctor", "--json")
    assert code == 0, err
    facts = json.loads(out)
    assert {"mlx", "cuda"} <= set(facts["backends"])
    assert run_forget("doctor")[0] == 0


def test_doctor_says_what_a_purpose_lacks_and_how_to_get_it(run_forget, monkeypatch):
    from mlx_forget import needs

    installed = {"ray": None, "tensorboard": "1.0", "wandb": None, "torch": "99.0"}
    monkeypatch.setattr(needs, "_version", lambda name: installed.get(name))
    code, out, err = run_forget("doctor", "ray", "tracking", "lora", "--json")
    assert (code, err) == (1, "forget: Something is missing for ray, tracking.\n")
    found = json.loads(out)["purposes"]
    assert (found["ray"]["missing"], found["ray"]["install"]) == (["ray>=2.40"], "pip install -U 'mlx-forget[ray]'")
    assert found["tracking"]["missing"] == ["tensorboard>=2.17 (here 1.0)"]
    assert found["tracking"]["install"] == "pip install -U 'mlx-forget[tensorboard]'"
    assert (found["lora"]["ready"], found["lora"]["install"]) == (True, None)
    code, out, _ = run_forget("doctor", "tracking")
    assert code == 1
    assert "needs at least: tensorboard>=2.17; or wandb>=0.21" in out
    assert "missing: tensorboard>=2.17 (here 1.0)" in out


def test_doctor_wants_no_more_than_one_way_to_a_purpose(run_forget, monkeypatch):
    from mlx_forget import needs

    installed = {"tensorboard": "3.0", "mlx": "99.0", "mlx-lm": "99.0"}
    monkeypatch.setattr(needs, "_version", lambda name: installed.get(name))
    code, out, _ = run_forget("doctor", "tracking", "lora", "--json")
    found = json.loads(out)["purposes"]
    assert (code, found["tracking"]["ready"], found["lora"]["ready"]) == (0, True, True)
    assert found["tracking"]["notes"] == ["for --log-to wandb: pip install -U 'mlx-forget[wandb]'"]
    assert found["lora"]["notes"] == ["mlx-lm loads it from CHECKPOINT/mlx-lm"]
    installed.clear()
    code, out, _ = run_forget("doctor", "lora", "--json")
    found = json.loads(out)["purposes"]["lora"]
    assert (code, found["ready"]) == (1, False)
    # One line for this machine, not a choice.
    is_mac = needs._is_apple_silicon()
    assert found["install"] == f"pip install -U 'mlx-forget[{'mlx' if is_mac else 'cuda'}]'"
    assert found["notes"] == [f"to load it outside of this tool: pip install -U 'mlx-forget[{'mlx' if is_mac else 'peft'}]'"]


def test_doctor_asks_for_no_package_where_something_else_is_missing(run_forget, monkeypatch):
    from mlx_forget import needs

    monkeypatch.setattr(needs, "_version", lambda name: "99.0")
    monkeypatch.setattr(needs.shutil, "which", lambda name: None)
    lines = run_forget("doctor")[1].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("slurm"))
    assert "MISSING" in lines[start]
    assert "sbatch is not on the PATH" in lines[start + 1]


def test_what_there_is_not_for_this_machine_is_no_way(monkeypatch):
    from mlx_forget import needs

    requirements = needs._requirements
    monkeypatch.setattr(needs, "_version", lambda name: None)
    monkeypatch.setattr(needs, "_requirements", lambda extra: [] if extra == "mlx" else requirements(extra))
    (lora,) = needs.look(["lora"])
    assert (lora.is_ready, lora.install) == (False, "pip install -U 'mlx-forget[cuda]'")


def test_doctor_names_no_purpose_that_is_none(run_forget):
    code, _, err = run_forget("doctor", "tracing")
    assert (code, "Did you mean 'tracking'" in err) == (2, True)


def test_every_extra_of_a_purpose_is_one_of_the_package():
    from mlx_forget.needs import NEEDS, _requirements

    for need in NEEDS:
        assert all(_requirements(extra) for way in need.ways for extra in way), need.name


@pytest.mark.parametrize(
    "typed, offered",
    [
        ("forget ad", {"advise"}),
        ("forget runs ex", {"export"}),
        ("forget train --method kl", {"kl-replay"}),
        ("forget train --backend m", {"mlx"}),
        ("forget train --fine-tune-type ", {"full", "lora", "dora", "ia3"}),
        ("forget fit table.csv --law forgetting-", {"forgetting-fixed-n"}),
        ("forget sweep kalajdzievski/la", {"kalajdzievski/laptop"}),
        ("forget doctor tr", {"tracking"}),
        ("forget audit --backend c", {"cuda"}),
        ("forget train --model 0.1", {"0.16m"}),
        ("forget train --target ma", {"math"}),
        ("forget train --on h10", {"h100"}),
        ("forget prepare pile-pub", {"pile-pubmed-central"}),
        ("forget sweep figure1 --engine ra", {"ray"}),
        ("forget sweep figure1 --log-to w", {"wandb"}),
        ("forget sweep figure1 --on h10", {"h100"}),
        ("forget plot runs/f --kind mo", {"model-size"}),
        ("forget report runs/f --status dive", {"diverged"}),
        ("forget fit table.csv --intervals pro", {"profile"}),
        ("forget fit table.csv --cluster re", {"repeat"}),
        ("forget replay runs/a --precision b", {"bf16"}),
    ],
)
def test_a_shell_completes_commands_options_and_names(typed, offered, run_forget, monkeypatch):
    words = typed.split()
    monkeypatch.setenv("_FORGET_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", typed)
    monkeypatch.setenv("COMP_CWORD", str(len(words) - (not typed.endswith(" "))))
    assert set(run_forget()[1].split()) == offered


REPORTING = [(words, command) for words, command in ALL_COMMANDS if "--json" in [o for p in command.params for o in p.opts]]


def test_every_command_that_does_something_reports_with_json():
    silent = {words for words, command in ALL_COMMANDS if not getattr(command, "commands", {})} - {words for words, _ in REPORTING}
    assert silent == set()


@pytest.mark.parametrize("words, command", REPORTING, ids=[words.replace(" ", "-") for words, _ in REPORTING])
def test_a_command_that_is_interrupted_answers_with_one_json_object(words, command, run_forget, monkeypatch):
    """Whatever it was doing: here it had read its options."""

    def stopped(self, ctx):
        raise Interrupted("interrupted", signal=2)

    monkeypatch.setattr(type(command), "invoke", stopped)
    example = shlex.split(command.epilog.partition(": ")[2])[1:]
    code, out, err = run_forget(*example, "--json")
    assert code == 130
    assert json.loads(out) == {"status": "interrupted", "signal": 2, "reason": "interrupted", "folder": None}
    assert err == "forget: interrupted\n"


@pytest.mark.parametrize(
    "error, code, said",
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "runs/a"),
            1,
            "forget: The disk is full (runs/a): free some space, and the same",
        ),
        (
            OSError(errno.EDQUOT, "Disk quota exceeded"),
            1,
            "forget: The disk is full: free some space, and the same command goes on.",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "runs/a"), 2, "forget: runs/a: Permission denied."),
        (RunFailed("2 of 5 runs failed"), 1, "forget: 2 of 5 runs failed"),
        (LeaderFailed(3), 3, ""),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_what_ends_a_command_is_one_line_and_its_exit_code(run_forget, monkeypatch, error, code, said):
    def fails(self, ctx):
        raise error

    monkeypatch.setattr(type(load_command("laws")), "invoke", fails)
    found, out, err = run_forget("laws")
    assert (found, out) == (code, "")
    assert err.startswith(said)
    assert err.count("\n") == bool(said)
    if isinstance(error, OSError) and error.errno == errno.EACCES:
        with pytest.raises(PermissionError):
            main(["laws", "--debug"])


def test_a_reader_that_has_gone_ends_a_command_in_silence():
    """As in `forget laws | head -1`."""
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as pipe:
        found = subprocess.run([sys.executable, "-m", "mlx_forget", "laws"], stdout=pipe, stderr=subprocess.PIPE, text=True)
    assert (found.returncode, found.stderr) == (1, "")
