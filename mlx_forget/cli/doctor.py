"""`forget doctor`."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlx_forget.cli import completion
from mlx_forget.cli.answers import emit

if TYPE_CHECKING:
    from mlx_forget.needs import Found

app = typer.Typer()


@app.command()
def doctor(
    purposes: Annotated[
        list[str] | None,
        typer.Argument(
            help="What you want: mlx, cuda, hf-mlx, hf-cuda, hub, lora, eval, ray, slurm, tracking. Exit code 1 where something is "
            "missing for it. \\[default: all, to look at]",
            autocompletion=completion.purposes,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """What this machine can run, and what is missing.

    Example: forget doctor cuda ray
    """
    import os
    import platform
    import shutil

    from mlx_forget import backends as registry
    from mlx_forget.errors import RunFailed, UserError
    from mlx_forget.needs import look
    from mlx_forget.pipeline.corpora import forget_home
    from mlx_forget.records import installed_versions

    found = look(purposes or ())
    backends: dict[str, Any] = {}
    for name in registry.backend_names():
        try:
            capabilities = registry.load_backend(name).describe()
            backends[name] = {
                "usable": True,
                "accelerator": capabilities.accelerator,
                "precisions": list(capabilities.precisions),
                "fast_bf16": capabilities.fast_bf16,
            }
        except UserError as error:
            backends[name] = {"usable": False, "missing": str(error)}
    try:
        chosen, reason = registry.choose_backend()
    except UserError as error:
        chosen, reason = None, str(error)
    home = forget_home()
    beside = next(folder for folder in (home, *home.parents) if folder.exists())
    compiler = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
    free_gb, writable = round(shutil.disk_usage(beside).free / 1e9, 1), os.access(beside, os.W_OK)
    facts = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "versions": installed_versions(),
        "backends": backends,
        "auto": {"backend": chosen, "reason": reason},
        "compiler": compiler,
        "purposes": {
            one.need.name: {
                "purpose": one.need.purpose,
                "ready": one.is_ready,
                "needs": one.least,
                "missing": list(one.missing),
                "install": one.install or None,
                "notes": list(one.notes),
            }
            for one in found
        },
        "cache": {"folder": str(home), "writable": writable, "free_gb": free_gb},
    }
    if as_json:
        emit(facts)
    else:
        if not purposes:
            _print_machine(facts)
        _print_purposes(found, asked=bool(purposes))
    lacking = [one.need.name for one in found if not one.is_ready]
    if purposes and lacking:
        raise RunFailed(f"Something is missing for {', '.join(lacking)}.")


def _print_machine(facts: dict[str, Any]) -> None:
    cache, chosen = facts["cache"], facts["auto"]
    print(f"Python {facts['python']} on {facts['system']}, {facts['cores']} cores")
    print("packages   " + ", ".join(f"{name} {number}" for name, number in facts["versions"].items()))
    for name, row in facts["backends"].items():
        if row["usable"]:
            where = "on an accelerator" if row["accelerator"] else "on the CPU"
            print(f"{name:<10} usable {where}; auto precision {'bf16' if row['fast_bf16'] else 'fp32'}")
        else:
            print(f"{name:<10} not usable: {row['missing']}")
    print(f"auto       {chosen['backend'] or 'nothing'}: {chosen['reason']}")
    print(f"compiler   {facts['compiler'] or 'none: torch.compile is off'}")
    print(f"cache      {cache['folder']} ({cache['free_gb']} GB free{'' if cache['writable'] else ', NOT writable'})")
    print()


def _print_purposes(found: "list[Found]", *, asked: bool) -> None:
    """What each purpose lacks, and the way to it; what it needs at least where it was asked for or packages are missing."""
    width = max(len(one.need.name) for one in found)
    for one in found:
        print(f"{one.need.name:<{width}}  {'ready  ' if one.is_ready else 'MISSING'}  {one.need.purpose}")
        least = [f"needs at least: {one.least}"] if asked or one.install else []
        install = [one.install] if one.install else []
        for line in (*least, *(f"missing: {what}" for what in one.missing), *install, *one.notes):
            print(f"{'':<{width}}           {line}")
