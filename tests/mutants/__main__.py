"""Mutation testing of what results rest on: small seeded mistakes in the laws, the mixture, checkpoints and records, and who notices.

    python -m tests.mutants                              all 200, in about a quarter of an hour; goes on where it was stopped
    python -m tests.mutants --group laws --minutes 8     a piece of it
    python -m tests.mutants --again                      those that survived once more, after tests were added

A mutant is tried with the quick tests that run its function, until one fails. Killed is also what takes several times the CPU time or the
memory that it may.
"""

import argparse
import importlib
import json
import os
import random
import shutil
import sys
import tempfile
import time
import tomllib
from pathlib import Path
from typing import Any

from tests.mutants.covering import covering
from tests.mutants.groups import GROUPS, SLOW_SECONDS
from tests.mutants.sites import Site, sites
from tests.mutants.trial import module_of, tried

ROOT = Path(__file__).resolve().parents[2]
KEPT = ROOT / "build" / "mutants"
JUDGED = Path(__file__).with_name("equivalent.toml")


def drawn(seed: int) -> dict[str, list[Site]]:
    """The mutants of a seed, by group."""
    found = {}
    for name, group in GROUPS.items():
        all_sites = [site for path in group.sources(ROOT) for site in sites(ROOT, path)]
        found[name] = random.Random(f"{seed} {name}").sample(all_sites, group.num)
    return found


def chosen(site: Site, maps: list[dict[str, Any]]) -> dict[str, float]:
    """The quick tests that enter the function of a mutant, file by file, with their seconds of CPU; those of its file if it is in none."""
    files = []
    for one in maps:

        def has_it(entered: list[list[Any]]) -> bool:
            first, last = (0, 1 << 30) if site.outermost is None else site.outermost[1:]
            return any(path == site.path and first <= line <= last for path, line in entered)

        shared = has_it(one["shared"])
        tests = {name: seconds for name, (seconds, entered) in one["tests"].items() if shared or has_it(entered)}
        files.append({name: seconds for name, seconds in sorted(tests.items(), key=lambda item: item[1]) if seconds < SLOW_SECONDS})
    files.sort(key=lambda tests: sum(tests.values()))
    return {name: seconds for tests in files for name, seconds in tests.items()}


def report(mutants: dict[str, list[Site]], results: dict[str, str]) -> int:
    """Print the counts and the survivors; returns how many of these nobody has judged."""
    judged = {one["mutant"]: one["reason"] for one in tomllib.loads(JUDGED.read_text())["mutant"]} if JUDGED.exists() else {}
    num_tried = num_killed = num_unjudged = 0
    for group, members in mutants.items():
        done = [site for site in members if str(site) in results]
        alive = [site for site in done if results[str(site)].startswith("survived")]
        num_tried, num_killed = num_tried + len(done), num_killed + len(done) - len(alive)
        print(f"mutants: {len(done) - len(alive)} of {len(done)} of {group} killed")
        for site in alive:
            reason = judged.get(without_line(site))
            num_unjudged += reason is None
            print(f"  {site}\n    {results[str(site)]}{'; equivalent: ' + reason if reason else ''}")
    if num_tried:
        print(f"mutants: {num_killed} of {num_tried} killed ({num_killed / num_tried:.1%}); survivors not judged: {num_unjudged}")
    return num_unjudged


def without_line(site: Site) -> str:
    """The name of a mutant that stays when lines are added above it."""
    return f"{site.path} {site.function}: {site.what}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=str(__doc__).splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--group", choices=GROUPS, action="append", help="only this part; may be repeated")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after so long; the same command goes on")
    parser.add_argument("--again", action="store_true", help="try again those that survived")
    parser.add_argument("--report", action="store_true", help="only print what is known")
    options = parser.parse_args()
    mutants = drawn(options.seed)
    kept = KEPT / f"results-{options.seed}.json"
    results: dict[str, str] = json.loads(kept.read_text()) if kept.exists() else {}
    if options.again:
        results = {name: what for name, what in results.items() if not what.startswith("survived")}
    if not options.report:
        try_all({name: mutants[name] for name in options.group or GROUPS}, results, kept, time.monotonic() + 60 * options.minutes)
    num_unjudged = report(mutants, results)
    sys.exit(num_unjudged > 0 or any(str(site) not in results for members in mutants.values() for site in members))


def try_all(mutants: dict[str, list[Site]], results: dict[str, str], kept: Path, deadline: float) -> None:
    """Try what has no result yet, until a time; results are kept as they come."""
    home = KEPT / "home"
    home.mkdir(parents=True, exist_ok=True)
    for name, members in mutants.items():
        todo = [site for site in members if str(site) not in results]
        maps = []
        for test_file in GROUPS[name].tests if todo else ():
            if time.monotonic() > deadline:
                return
            maps.append(_mapped(GROUPS[name].sources(ROOT), test_file, home))
        for test_file in GROUPS[name].tests if todo else ():
            importlib.import_module(module_of(test_file))
        for site in todo:
            if time.monotonic() > deadline:
                return
            tests = chosen(site, maps)
            begin = time.monotonic()
            results[str(site)] = tried(ROOT, site, tests, home)
            print(f"{time.monotonic() - begin:5.1f} s  {results[str(site)]}  {site}", flush=True)
            kept.write_text(json.dumps(results, indent=1))


def _mapped(sources: list[str], test_file: str, home: Path) -> dict[str, Any]:
    """`covering`, in a process of its own that leaves in `home` the corpora that it had to build."""
    process = os.fork()
    if process == 0:
        code = 1
        try:
            run = f"mutants-{os.getpid()}"
            os.environ["PYTEST_XDIST_TESTRUNUID"] = run
            place = Path(tempfile.gettempdir()) / f"mlx-forget-tests-{run}"
            shutil.copytree(home, place)
            covering(ROOT, sources, test_file, KEPT / "covering")
            shutil.copytree(place, home, dirs_exist_ok=True)
            shutil.rmtree(place)
            code = 0
        finally:
            os._exit(code)
    if os.waitpid(process, 0)[1]:
        sys.exit(f"{test_file} cannot be mapped: it fails as it is.")
    return covering(ROOT, sources, test_file, KEPT / "covering")


if __name__ == "__main__":
    main()
