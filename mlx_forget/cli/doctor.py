"""`forget doctor`."""

import json
from typing import Annotated, Any

import typer

app = typer.Typer()


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False) -> None:
    """What this machine can run, and what is missing.

    Example: forget doctor
    """
    import os
    import platform
    import shutil

    from mlx_forget import trainer
    from mlx_forget.errors import UserError
    from mlx_forget.pipeline.corpora import forget_home
    from mlx_forget.records import installed_versions

    backends: dict[str, Any] = {}
    for name in trainer.backend_names():
        try:
            capabilities = trainer.load_backend(name).describe()
            backends[name] = {
                "usable": True,
                "accelerator": capabilities.accelerator,
                "precisions": list(capabilities.precisions),
                "fast_bf16": capabilities.fast_bf16,
            }
        except UserError as error:
            backends[name] = {"usable": False, "missing": str(error)}
    try:
        chosen, reason = trainer.choose_backend()
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
        "cache": {"folder": str(home), "writable": writable, "free_gb": free_gb},
    }
    if as_json:
        print(json.dumps(facts))
        return
    print(f"Python {facts['python']} on {facts['system']}, {facts['cores']} cores")
    print("packages   " + ", ".join(f"{name} {number}" for name, number in installed_versions().items()))
    for name, row in backends.items():
        if row["usable"]:
            where = "on an accelerator" if row["accelerator"] else "on the CPU"
            print(f"{name:<10} usable {where}; auto precision {'bf16' if row['fast_bf16'] else 'fp32'}")
        else:
            print(f"{name:<10} not usable: {row['missing']}")
    print(f"auto       {chosen or 'nothing'}: {reason}")
    print(f"compiler   {compiler or 'none: torch.compile is off'}")
    print(f"cache      {home} ({free_gb} GB free{'' if writable else ', NOT writable'})")
