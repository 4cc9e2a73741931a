"""Two processes on one folder, and SIGTERM with a time of grace."""

import signal
import threading

import pytest

from tests.faults.scenarios import SCENARIOS, copy_world, result_of, run, signalled


@pytest.mark.parametrize("name", ["prepare", "train", "replay"])
def test_two_processes_on_one_folder_make_one_result(world, straight, tmp_path, tried, name):
    wanted, _, _ = straight(name)
    folder = copy_world(world, tmp_path / "w")
    outcomes = []
    threads = [threading.Thread(target=lambda: outcomes.append(run(folder, SCENARIOS[name]))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert min(outcome.code for outcome in outcomes) == 0
    for outcome in outcomes:
        assert outcome.code == 0 or any(words in outcome.said for words in ("Another process", "exists already")), outcome.said
    result = result_of(folder)
    assert {key for key in wanted if result.get(key) != wanted[key]} == set()
    tried["pairs of processes on one folder, one result each"] += 1


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_run_that_is_asked_to_stop_leaves_a_checkpoint(world, straight, tmp_path, tried, number, code):
    wanted, _, _ = straight("train")
    folder = copy_world(world, tmp_path / "w")
    longer = [*SCENARIOS["train"], "--steps-per-report", "1"]
    outcome = signalled(folder, longer, number, lambda: (folder / "made" / "checkpoints" / "last").exists())
    if outcome.code != 0:
        assert outcome.code == code, outcome.said
        assert "the same command goes on" in " ".join(outcome.said.split())
        assert (folder / "made" / "checkpoints" / "last" / "state.json").is_file()
    assert run(folder, longer).code == 0
    result = result_of(folder)
    assert {key for key in wanted if result.get(key) != wanted[key]} == set()
    tried["signals to stop, each resumed"] += 1
