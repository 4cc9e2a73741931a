"""What a sweep's folder says of runs that have no record yet."""

import threading

from mlx_forget.runs.missing import note_planned, planned


def test_sweeps_that_start_at_once_lose_none_of_their_titles(tmp_path):
    """They share a folder, and each reads, adds and writes."""
    failed = []

    def sweep(number, together):
        together.wait()
        try:
            for k in range(20):
                note_planned(tmp_path, {f"{number}-{k}": f"run {k} of sweep {number}"})
        except Exception as error:
            failed.append(error)

    together = threading.Barrier(4)
    threads = [threading.Thread(target=sweep, args=(number, together)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert set(planned(tmp_path)) == {f"{number}-{k}" for number in range(4) for k in range(20)}
