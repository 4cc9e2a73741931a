"""The page: whole, self-contained, and safe whatever the text says."""

import dataclasses
import itertools
import math
import xml.etree.ElementTree as ElementTree

import pytest

from mlx_forget.audit.config import AuditConfig
from mlx_forget.audit.extremes import Document
from mlx_forget.audit.page import render
from mlx_forget.audit.run import execute_audit, plan_audit
from mlx_forget.audit.statistics import Estimate
from mlx_forget.audit.verdict import verdict
from mlx_forget.backends import available_backends
from mlx_forget.pages import svg
from tests.html_page import ATTACK, assert_escaped, assert_inside_frames, assert_self_contained


@pytest.fixture
def found(make_checkpoint, notes, tmp_path):
    for name, moved in (("base", 0.0), ("tuned", 0.08)):
        make_checkpoint(tmp_path / name, moved=moved)
    config = AuditConfig(backend=available_backends()[0])
    return execute_audit(plan_audit(str(tmp_path / "base"), str(tmp_path / "tuned"), {ATTACK: str(notes)}, config))


def test_every_text_that_comes_from_data_is_escaped(found):
    (text,) = found.texts
    hostile = Document(0, 20, 1.0, 2.0, 1.0, 0, ((ATTACK, 3.0), ("\x00\ufffd", -3.0)))
    tokens = tuple(dataclasses.replace(token, token=ATTACK) for token in text.tokens_forgotten)
    assert tokens
    text = dataclasses.replace(text, source=ATTACK, documents_forgotten=(hostile,), tokens_forgotten=tokens)
    base = {**found.base, "description": ATTACK, "name": ATTACK, "folder": ATTACK}
    page = render(dataclasses.replace(found, texts=(text,), base=base, warnings=(ATTACK,), device=ATTACK))
    assert assert_escaped(page) >= 6


def test_the_page_needs_nothing_from_outside_and_follows_light_dark_and_print(found):
    read = assert_self_contained(render(found))
    plots = [attributes for tag, attributes in read.elements if tag == "svg"]
    assert len(plots) == 1 + 2 + 4 + 1 + 2
    assert all(plot["aria-label"] for plot in plots)


def test_the_plots_are_well_formed_and_stay_inside_their_frame(found):
    assert assert_inside_frames(render(found)) == 1 + 2 + 4 + 1 + 2


def test_an_interval_is_drawn_where_its_numbers_are():
    drawn = ElementTree.fromstring(
        svg.intervals([svg.Interval("a", 1.0, 0.5, 1.5), svg.Interval("b", -1.0, math.nan, math.nan)], title="t", unit="u")
    )
    grid = sorted(float(line.get("x1")) for line in drawn.iter("line") if line.get("class") in ("grid", "zero"))
    zero = next(float(line.get("x1")) for line in drawn.iter("line") if line.get("class") == "zero")
    ticks = svg.ticks_between(-1.0, 1.5)
    unit = (grid[-1] - grid[0]) / (ticks[-1] - ticks[0])
    (bar,) = (line for line in drawn.iter("line") if line.get("class") == "worse")
    assert float(bar.get("x1")) == pytest.approx(zero + 0.5 * unit, abs=0.2)
    assert float(bar.get("x2")) == pytest.approx(zero + 1.5 * unit, abs=0.2)
    (circle,) = drawn.iter("circle")
    assert float(circle.get("cx")) == pytest.approx(zero - unit, abs=0.2)


@pytest.mark.parametrize("low, high", [(0, 1), (-0.7, 0.9), (3.8, 6.4), (0, 0), (5, 5), (-2e-9, 1e-9), (0, 1234.5)])
def test_ticks_are_round_and_enclose(low, high):
    ticks = svg.ticks_between(low, high)
    assert ticks[0] <= low
    assert high <= ticks[-1]
    assert 2 <= len(ticks) <= 9
    steps = [b - a for a, b in itertools.pairwise(ticks)]
    assert steps == pytest.approx([steps[0]] * len(steps))


def test_the_verdict_says_when_nothing_can_be_told(found):
    (text,) = found.texts

    def of(*estimate):
        losses = dataclasses.replace(text.losses, forgetting=Estimate(*estimate))
        return verdict(dataclasses.replace(text, losses=losses))

    assert of(0.5, 0.1, 0.3, 0.7).startswith("forgot 0.5000 nats per token")
    assert of(-0.5, 0.1, -0.7, -0.3).startswith("gained 0.5000 nats per token")
    assert of(0.1, 0.1, -0.1, 0.3).startswith("no change that can be told from none")
    assert "no uncertainty" in of(0.5, math.nan, math.nan, math.nan)
