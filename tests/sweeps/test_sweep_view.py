"""What a person sees of a sweep on a terminal: the runs under way first, how many stand where, and what is left."""

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from mlx_forget.cli import sweep_view
from mlx_forget.cli.sweep_view import SweepView


def job(name, state, *, step=0, flops=1e12, reason=""):
    plan = SimpleNamespace(run_id=name, num_steps=100, summary=lambda: {"train_flops": flops})
    progress = (
        {"step": step, "num_steps": 100, "tokens_per_second": 1234.5, "seconds_left": 61, "losses": "target 3.2"} if step else {}
    )
    return SimpleNamespace(plan=plan, title=name, state=state, progress=progress, reason=reason)


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(sweep_view.time, "monotonic", lambda: now[0])
    return now


def shown(view, jobs, height=40):
    console = Console(file=io.StringIO(), width=110, height=height)
    console.print(view.table(jobs))
    return console.file.getvalue().splitlines()


def test_what_is_left_is_judged_by_what_was_done_since_it_began_to_watch(clock):
    view = SweepView(Console(file=io.StringIO()))
    assert view.seconds_left([]) is None
    done, running, waiting, failed = (
        job("a", "done"),
        job("b", "running", step=50),
        job("c", "waiting", flops=2e12),
        job("d", "failed"),
    )
    assert view.seconds_left([done, running, waiting, failed]) is None, "nothing was done while it watched"
    clock[0] += 10
    running.progress["step"] = 75
    # A quarter of 1e12 in 10 seconds; a quarter of it and 2e12 are left, and what failed is not waited for.
    assert view.seconds_left([done, running, waiting, failed]) == pytest.approx(10 * 2.25 / 0.25)
    assert view.summary([done, running, waiting, failed]) == "4 runs: 1 done · 1 running · 1 failed · 1 waiting · 1:30 left"


def test_a_table_has_a_line_for_each_run_and_of_many_those_under_way_first(clock):
    jobs = [job(f"done{number}", "done") for number in range(30)]
    jobs += [job("late", "running", step=50), job("broken", "failed", reason="out of luck")]
    view = SweepView(Console(file=io.StringIO(), height=12))
    lines = shown(view, jobs)
    assert lines[1].split() == ["late", "running", "50/100", "1,234", "1:01", "target", "3.2"]
    assert "out of luck" in lines[2]
    assert len(lines) == 1 + 8 + 1
    assert lines[-1].startswith("32 runs: 30 done · 1 running · 1 failed")
    assert [line.split()[0] for line in shown(view, jobs[:3])[1:4]] == ["done0", "done1", "done2"]


def test_lines_are_printed_for_what_changes():
    file = io.StringIO()
    view = SweepView(Console(file=file, width=110))
    running = job("a", "running", step=50)
    view.lines([running, job("b", "waiting")])
    view.lines([running, job("b", "waiting")])
    running.state, running.reason = "failed", "out of luck"
    view.lines([running])
    assert file.getvalue().splitlines() == [
        "a · running · step 50/100 · target 3.2", "a · failed · step 50/100 · target 3.2 · out of luck",
    ]  # fmt: skip
