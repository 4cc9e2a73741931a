"""Mutation testing of what results rest on: small seeded mistakes in the laws, the mixture, checkpoints and records, and who notices.

    python -m tests.mutants                              all 200, in about a quarter of an hour; goes on where it was stopped
    python -m tests.mutants --group laws --minutes 8     a piece of it
    python -m tests.mutants --again                      those that survived once more, after tests were added

A mutant is tried with the quickest tests that run its statement, until one fails. Killed is also what takes several times the CPU time or
the memory that it may. Results are kept in build/mutants; remove it to begin again.
"""

import argparse
import hashlib
import json
import os
import signal
import sys
import time
import tomllib
from pathlib import Path

from tests.mutants.groups import GROUPS, MOST_SECONDS
from tests.mutants.sites import Site, sites
from tests.mutants.trial import Trials, replace_text

ROOT = Path(__file__).resolve().parents[2]
KEPT = ROOT / "build" / "mutants"
JUDGED = Path(__file__).with_name("equivalent.toml")


def drawn(seed: int) -> dict[str, list[Site]]:
    """The mutants of a seed, by group: those whose names have the lowest digests, so that an edit changes few of them."""

    def digest(site: Site) -> bytes:
        return hashlib.sha256(f"{seed} {site.name}".encode()).digest()

    found = {}
    for name, group in GROUPS.items():
        all_sites = [site for path in group.sources(ROOT) for site in sites(ROOT, path)]
        found[name] = sorted(all_sites, key=digest)[: group.num]
    return found


def judged() -> dict[str, str]:
    """The reasons why some mutants cannot be killed, by their names."""
    return {one["mutant"]: one["reason"] for one in tomllib.loads(JUDGED.read_text())["mutant"]}


def report(mutants: dict[str, list[Site]], results: dict[str, str]) -> int:
    """Print the counts and the survivors; returns how many of these nobody has judged."""
    reasons = judged()
    num_tried = num_killed = num_unjudged = 0
    for group, members in mutants.items():
        done = [site for site in members if site.name in results]
        alive = [site for site in done if results[site.name].startswith("survived")]
        num_tried, num_killed = num_tried + len(done), num_killed + len(done) - len(alive)
        print(f"mutants: {len(done) - len(alive)} of {len(done)} of {group} killed")
        for site in alive:
            num_unjudged += site.name not in reasons
            print(f"  {site}\n    {results[site.name]}{'; equivalent: ' + reasons[site.name] if site.name in reasons else ''}")
    if num_tried:
        print(f"mutants: {num_killed} of {num_tried} killed ({num_killed / num_tried:.1%}); survivors not judged: {num_unjudged}")
    return num_unjudged


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=str(__doc__).splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--group", choices=GROUPS, action="append", help="only this part; may be repeated")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after so long; the same command goes on")
    parser.add_argument("--again", action="store_true", help="try again those that survived")
    parser.add_argument("--report", action="store_true", help="only print what is known")
    parser.add_argument("--most-seconds", type=float, default=MOST_SECONDS, help="of tests for one mutant, the quickest first")
    options = parser.parse_args()
    # So that what was started is ended.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    os.chdir(ROOT)
    mutants = drawn(options.seed)
    wanted = {name: members for name, members in mutants.items() if name in (options.group or GROUPS)}
    kept = KEPT / f"results-{options.seed}.json"
    results: dict[str, str] = json.loads(kept.read_text()) if kept.exists() else {}
    if options.again:
        for site in [site for members in wanted.values() for site in members if site.name not in judged()]:
            if results.get(site.name, "").startswith("survived"):
                del results[site.name]
    if not options.report:
        try_all(wanted, results, kept, options)
    num_unjudged = report(mutants, results)
    sys.exit(num_unjudged > 0 or any(site.name not in results for members in mutants.values() for site in members))


def try_all(mutants: dict[str, list[Site]], results: dict[str, str], kept: Path, options: argparse.Namespace) -> None:
    """Try what has no result yet; results are kept as they come."""

    def tell(site: Site, result: str, seconds: float) -> None:
        results[site.name] = result
        replace_text(kept, json.dumps(results, indent=1))
        print(f"{seconds:5.1f} s  {result}  {site}", flush=True)

    deadline = time.monotonic() + 60 * options.minutes
    for name, members in mutants.items():
        todo = [site for site in members if site.name not in results]
        if todo and time.monotonic() < deadline:
            group = GROUPS[name]
            Trials(
                ROOT,
                group.sources(ROOT),
                group.tests,
                todo,
                most_seconds=options.most_seconds,
                deadline=deadline,
                kept=KEPT,
                tell=tell,
            ).run()


if __name__ == "__main__":
    main()
