"""Every learning-rate schedule: where it begins, turns and ends, and what the command line makes of it."""

import dataclasses

import numpy as np
import pytest

from mlx_forget.config import TrainConfig
from mlx_forget.config_layers import from_layers
from mlx_forget.errors import UserError
from mlx_forget.ladder import model_spec
from mlx_forget.schedule import DECAYS, Schedule
from mlx_forget.training.learning_rates import schedule

BASE = Schedule(peak=2.0, num_steps=1000, warmup_fraction=0.01)


def rates(**changes):
    one = dataclasses.replace(BASE, **changes)
    return np.array([one(step) for step in range(one.num_steps)])


def test_constant_stays_at_the_peak_after_warming_up():
    found = rates(decay="constant")
    np.testing.assert_allclose(found[:10], 2.0 * np.arange(1, 11) / 10)
    assert (found[10:] == 2.0).all()


def test_cosine_ends_at_its_final_rate():
    found = rates(decay="cosine", final_fraction=0.1)
    assert found[10] == 2.0
    assert found[505] == pytest.approx(1.1)
    assert found[-1] == pytest.approx(0.2, abs=1e-4)


def test_wsd_is_stable_until_it_decays_linearly():
    found = rates(decay="wsd", decay_fraction=0.2, final_fraction=0.0)
    assert (found[10:801] == 2.0).all()
    assert found[900] == pytest.approx(1.0)
    np.testing.assert_allclose(np.diff(found[801:]), -2.0 / 200, rtol=1e-6)


def test_rewarming_begins_where_an_earlier_cosine_has_ended():
    earlier, found = rates(decay="cosine"), rates(decay="rewarm")
    assert earlier[-1] < found[0] < 0.2 * 2.0
    assert found[9] == 2.0
    np.testing.assert_array_equal(found[10:], earlier[10:])


def test_infinite_cools_down_to_a_plateau_and_anneals_at_the_end():
    found = rates(decay="infinite", cooldown_fraction=0.3, plateau_fraction=0.4, decay_fraction=0.1)
    assert found[10] == 2.0
    np.testing.assert_allclose(found[310:901], 0.8)
    ratios = found[902:] / found[901:-1]
    np.testing.assert_allclose(ratios, (0.01 / 0.4) ** (1 / 100), rtol=1e-6)
    # Going on for longer does not change what came before: the plateau can be left at any step.
    longer = rates(decay="infinite", cooldown_fraction=0.15, plateau_fraction=0.4, num_steps=2000, warmup_fraction=0.005)
    np.testing.assert_allclose(longer[:900], found[:900])


@pytest.mark.parametrize("decay", DECAYS)
def test_no_schedule_jumps_exceeds_its_peak_or_reaches_zero(decay):
    found = rates(decay=decay)
    assert found.max() == 2.0
    assert found.min() > 0
    assert np.abs(np.diff(found)).max() <= 2.0 / 10 + 1e-12


def test_the_command_line_chooses_a_schedule():
    spec = model_spec("0.65m", 2048, 128)
    config = TrainConfig(lr_schedule="wsd", lr_decay_share=0.5, lr_final=0.0, iters=100, warmup=0.0)
    assert schedule(config, spec, 1.0)(75) == pytest.approx(0.1)
    # A finetune runs at a share of the base's peak; re-warming goes back to the peak itself.
    assert schedule(TrainConfig(lr_schedule="rewarm"), spec, 1.0).peak == 1.0
    assert schedule(TrainConfig(), spec, 1.0).peak == pytest.approx(0.2)


@pytest.mark.parametrize(
    "keys, sentence",
    [
        ({"lr_schedule": "cosin"}, "Unknown lr_schedule 'cosin'. Did you mean 'cosine'? Known: constant, cosine"),
        ({"lr_decay_share": 1.5}, "lr_decay_share is a share, from 0 to 1, it is 1.5."),
        ({"lr_schedule": "wsd", "lr_decay_share": 0.999}, "take 100% of the steps"),
        ({"lr_schedule": "infinite", "lr_plateau": 0.005}, "they must fall, and end above 0"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(keys, sentence):
    with pytest.raises(UserError) as refused:
        schedule(from_layers(TrainConfig, keys), model_spec("0.65m", 2048, 128), 1.0)
    assert sentence in str(refused.value)
