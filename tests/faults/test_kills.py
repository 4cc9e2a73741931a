"""Killed at a named write, rename, removal or fsync, or at any moment: the same command goes on and ends with the same result."""

import random
import time

import pytest

from tests.faults.scenarios import KILLED, OFTEN, SCENARIOS, copy_to_break, copy_world, result_of, run, shuffled

NAMES = list(SCENARIOS)


def survives(folder, name, straight, **fault):
    """A fault, then the same command: how the first call ended; fails if anything is lost, damaged or left behind."""
    first = run(folder, SCENARIOS[name], **fault)
    again = run(folder, SCENARIOS[name])
    where = f"{name} after {fault}"
    if "exists already" in again.said and (folder / "made").exists():
        # Killed when all was done: what was made stands, and is not overwritten.
        assert name in ("prepare", "replay", "fuse")
    else:
        assert again.code == 0, f"{where}: {again.said}"
    result = result_of(folder)
    assert {key for key in straight if result.get(key) != straight[key]} == set(), where
    return first.code


def at_points(world, straight, tmp_path, tried, name, kind, num):
    wanted, points, _ = straight(name)
    for at in shuffled(len(points), num, seed=f"{name} {kind}"):
        with copy_to_break(world, tmp_path / f"{kind}{at}") as folder:
            assert survives(folder, name, wanted, at=at, kind=kind) == KILLED
        tried[f"points of {name} tried ({kind}), nothing lost"] += 1


@pytest.mark.parametrize("kind", ["kill", "cut"])
@pytest.mark.parametrize("name", OFTEN)
def test_a_kill_at_some_points_loses_nothing(world, straight, tmp_path, tried, name, kind):
    at_points(world, straight, tmp_path, tried, name, kind, 1)


@pytest.mark.full
@pytest.mark.parametrize("kind", ["kill", "cut"])
@pytest.mark.parametrize("name", NAMES)
def test_a_kill_at_every_point_loses_nothing(world, straight, tmp_path, tried, name, kind):
    at_points(world, straight, tmp_path, tried, name, kind, 10**6)


@pytest.mark.full
@pytest.mark.parametrize("name", NAMES)
def test_ten_kills_at_random_moments_lose_nothing(world, straight, tmp_path, tried, name):
    wanted, _, _ = straight(name)
    begin = time.perf_counter()
    run(copy_world(world, tmp_path / "timed"), SCENARIOS[name])
    seconds = time.perf_counter() - begin
    moments = random.Random(name)
    for number in range(10):
        with copy_to_break(world, tmp_path / f"random{number}") as folder:
            code = survives(folder, name, wanted, kill_after=moments.uniform(0.02, seconds))
        tried[f"random kills of {name} ({'before' if code == KILLED else 'after'} its end), nothing lost"] += 1


def test_a_run_that_is_killed_again_and_again_ends_as_one_that_is_not(world, straight, tmp_path, tried):
    wanted, points, _ = straight("train")
    folder = copy_world(world, tmp_path / "w")
    for at in (len(points) // 3, len(points) // 3, len(points) // 4):
        assert run(folder, SCENARIOS["train"], at=at, kind="cut").code == KILLED
    assert survives(folder, "train", wanted, at=5) in (KILLED, 0)
    tried["points of train tried (cut), nothing lost"] += 3
