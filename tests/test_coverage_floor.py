"""The coverage target fails where lines or branches of one part are below the floor."""

import json

import pytest

from tests.coverage_floor import main, part_of

WHOLE = {"covered_lines": 10, "num_statements": 10, "covered_branches": 10, "num_branches": 10}


@pytest.mark.parametrize(
    "low", ["", "mlx_forget/run.py", "mlx_forget/cli/fit.py", "mlx_forget/laws/fit.py", "mlx_forget/pipeline/store/split.py"]
)
@pytest.mark.parametrize("key", ["covered_lines", "covered_branches"])
def test_each_part_is_held_to_the_floor_by_itself_in_lines_and_in_branches(tmp_path, capsys, low, key):
    files = {f"mlx_forget/{name}.py": {"summary": WHOLE} for name in ("run", "laws/fit", "pipeline/rows")}
    if low:
        files[low] = {"summary": {**WHOLE, key: 5}}
    (tmp_path / "report.json").write_text(json.dumps({"files": files}))
    assert main(str(tmp_path / "report.json"), "90") == bool(low)
    assert (f"Below 90%: {part_of(low)}" in capsys.readouterr().out) == bool(low)


def test_a_part_that_nothing_ran_is_below_every_floor(tmp_path):
    (tmp_path / "report.json").write_text(json.dumps({"files": {"mlx_forget/run.py": {"summary": WHOLE}}}))
    assert main(str(tmp_path / "report.json"), "1") == 1
