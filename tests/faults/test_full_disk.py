"""A full disk and a read-only folder: one sentence, nothing half-written, and the same command goes on when there is space."""

import os
import shutil
import subprocess

import pytest

from tests.faults.scenarios import SCENARIOS, copy_to_break, copy_world, result_of, run, shuffled

NAMES = list(SCENARIOS)
SAYS = {"full": ("disk is full", "No space left"), "denied": ("Read-only file system", "no permission")}


def refuses_and_goes_on(wanted, folder, name, at, kind):
    outcome = run(folder, SCENARIOS[name], at=at, kind=kind)
    where = f"{name} at point {at}"
    assert "Traceback" not in outcome.said, f"{where}: {outcome.said}"
    # What only cleans up may fail in silence when all that matters is done.
    assert outcome.code in (0, 1, 2), f"{where}: {outcome.code} {outcome.said}"
    if outcome.code:
        # Lines are broken to the width of a terminal.
        said = " ".join(outcome.said.split())
        assert any(sentence in said for sentence in SAYS[kind]), f"{where}: {said}"
    again = run(folder, SCENARIOS[name])
    assert again.code == 0 or "exists already" in again.said, f"{where}: {again.said}"
    result = result_of(folder)
    assert {key for key in wanted if result.get(key) != wanted[key]} == set(), where


def at_points(world, straight, tmp_path, tried, name, kind, num):
    wanted, points, _ = straight(name)
    for at in shuffled(len(points), num, seed=f"{name} {kind}"):
        with copy_to_break(world, tmp_path / f"{kind}{at}") as folder:
            refuses_and_goes_on(wanted, folder, name, at, kind)
        tried[f"points of {name} tried ({kind}), nothing lost"] += 1


@pytest.mark.parametrize("kind", ["full", "denied"])
@pytest.mark.parametrize("name", ["prepare", "train"])
def test_a_disk_that_takes_nothing_is_one_sentence(world, straight, tmp_path, tried, name, kind):
    at_points(world, straight, tmp_path, tried, name, kind, 1)


@pytest.mark.full
@pytest.mark.parametrize("kind", ["full", "denied"])
@pytest.mark.parametrize("name", NAMES)
def test_a_disk_that_takes_nothing_from_any_point_on_is_one_sentence(world, straight, tmp_path, tried, name, kind):
    at_points(world, straight, tmp_path, tried, name, kind, 10**6)


@pytest.fixture
def small_disk(tmp_path):
    """A mounted file system of a given size."""
    mounted = []

    def mount(kilobytes):
        place = tmp_path / "disk"
        place.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(place)], capture_output=True)
        if done.returncode:
            pytest.skip("no small file system can be mounted here")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.skipif(os.name != "posix" or not shutil.which("mount"), reason="mounts a small file system")
@pytest.mark.parametrize("name, kilobytes", [("prepare", 40), ("train", 4000), ("train", 9000)])
def test_a_real_disk_that_is_full_is_one_sentence(world, straight, tmp_path, small_disk, tried, name, kilobytes):
    folder = copy_world(world, tmp_path / "w")
    arguments = [str(small_disk(kilobytes) / "made") if word == "made" else word for word in SCENARIOS[name]]
    outcome = run(folder, arguments)
    assert outcome.code in (1, 2), outcome.said
    assert "disk is full" in " ".join(outcome.said.split()), outcome.said
    assert "Traceback" not in outcome.said
    tried["small disks filled, each with one sentence"] += 1
