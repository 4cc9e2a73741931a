"""The mutants themselves: a mistake is one change, what is drawn is drawn again, and a test that fails kills."""

import ast
import json
import os
import subprocess
import sys

import pytest

from tests.mutants.__main__ import ROOT, drawn, judged
from tests.mutants.groups import GROUPS
from tests.mutants.sites import mutated, sites
from tests.mutants.trial import put_in_place

SOURCE = '''
"""A docstring, 1."""
__all__ = ["f"]
def f(a: int = 3) -> int:
    """Another, 2."""
    assert a > 4
    if a < 5 and f"{a + 6}":
        raise ValueError("some words" + "x")
    return min(a, -7)
'''


def test_every_mistake_is_one_change_and_what_only_tells_people_is_left_alone(tmp_path):
    (tmp_path / "m.py").write_text(SOURCE)
    found = sites(tmp_path, "m.py")
    assert [site.what for site in found] == [
        "3  ->  4",
        "a < 5 and f'{a + 6}'  ->  a < 5 or f'{a + 6}'",
        "a < 5  ->  a <= 5",
        "5  ->  6",
        "raise ValueError('some words' + 'x')  ->  left out",
        "return min(a, -7)  ->  return None",
        "min  ->  max",
        "-7  ->  +7",
        "7  ->  8",
    ]
    whole = ast.unparse(ast.parse(SOURCE))
    texts = {ast.unparse(mutated(tmp_path, site)) for site in found}
    assert len(texts) == len(found)
    assert whole not in texts


def test_the_same_seed_draws_the_same_two_hundred():
    first, again, other = drawn(0), drawn(0), drawn(1)
    assert first == again != other
    assert sum(map(len, first.values())) == sum(group.num for group in GROUPS.values()) == 200


def test_mistakes_are_tried_with_all_tests_of_the_laws_and_with_files_that_are_there():
    assert set(GROUPS["laws"].tests) == {str(path.relative_to(ROOT)) for path in (ROOT / "tests" / "laws").glob("test_*.py")}
    assert [file for group in GROUPS.values() for file in group.tests if not (ROOT / file).is_file()] == []
    assert all(list(ROOT.glob(pattern)) for group in GROUPS.values() for pattern in group.files)


def test_what_was_judged_is_named_with_a_reason():
    names = {site.name for group in GROUPS.values() for path in group.sources(ROOT) for site in sites(ROOT, path)}
    for name, reason in judged().items():
        assert name in names
        assert reason


def test_those_that_read_alike_have_names_of_their_own(tmp_path):
    (tmp_path / "m.py").write_text("def f(x):\n    if x < 1:\n        return (\n            x + 1\n        )\n")
    found = sites(tmp_path, "m.py")
    assert [site.what for site in found if site.what.startswith("1")] == ["1  ->  2", "1  ->  2  (no. 2)"]
    # Of an `if` only its test; of a statement all of its lines.
    assert {site.what: site.lines for site in found if "1  ->  2" in site.what} == {"1  ->  2": (2, 2), "1  ->  2  (no. 2)": (3, 5)}


def test_a_mistake_takes_the_place_of_a_function_in_this_process(monkeypatch):
    from mlx_forget.pipeline import mixture

    site = next(one for one in sites(ROOT, "mlx_forget/pipeline/mixture.py") if one.function == "_mix" and "return" in one.what)
    monkeypatch.setattr(mixture._mix, "__code__", mixture._mix.__code__)
    put_in_place(ROOT, site)
    with pytest.raises(TypeError):
        mixture.stream_key(0, 1)


COUNTER = """
def count(n):
    done = 0
    while done < n:
        done += 1
    return done
"""
DRIVER = """
import json, sys
from pathlib import Path
from tests.mutants.sites import sites
from tests.mutants.trial import Trials

found, here = {}, Path.cwd()
trials = Trials(here, ["m.py"], ("test_m.py",), sites(here, "m.py"), most_seconds=9, deadline=1e12, kept=here / "kept",
                tell=lambda site, result, seconds: found.update({site.what: result}))
trials.run()
Path("found.json").write_text(json.dumps(found))
"""


@pytest.mark.full
def test_a_mutant_that_hangs_is_killed_by_time_and_no_file_changes(tmp_path):
    (tmp_path / "m.py").write_text(COUNTER)
    (tmp_path / "test_m.py").write_text("from m import count\n\n\ndef test_it():\n    assert count(3) == 3\n")
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{tmp_path}", "TMPDIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", DRIVER], cwd=tmp_path, env=environment, check=True, capture_output=True, timeout=300)
    assert json.loads((tmp_path / "found.json").read_text()) == {
        "0  ->  1": "survived",
        "done < n  ->  done <= n": "killed",
        "done += 1  ->  done -= 1": "killed by time",
        "1  ->  2": "killed",
        "return done  ->  return None": "killed",
    }
    assert (tmp_path / "m.py").read_text() == COUNTER
    assert not list(tmp_path.glob("mutants-*"))
