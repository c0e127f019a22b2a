"""A spike in the loss is noticed by its rule, and the newest step that is known to be good is the right one."""

import numpy as np
import pytest

from moe_jax.health import FEWEST, WINDOW, Health


def after(losses, step: int = 0) -> Health:
    """The health of a run with these losses; None is a step that was not finite."""
    health = Health(step)
    for number, loss in enumerate(losses, step + 1):
        health.add(number, np.nan if loss is None else loss, loss is not None)
    return health


def noisy(n: int) -> list[float]:
    """Losses with mean 2 and standard deviation 0.1."""
    return [2.1, 1.9] * (n // 2)


@pytest.mark.parametrize(("loss", "spikes"), [(2.69, 0), (2.71, 1), (1e30, 1), (1.0, 0), (2.0, 0)])
def test_a_spike_is_seven_standard_deviations_above_the_mean(loss, spikes):
    assert after([*noisy(200), loss]).spikes == spikes


def test_the_rule_is_that_of_its_source():
    """Recomputed for every step: mean and standard deviation of the last 1,000 losses before it."""
    losses = [5 * 0.99**i + 0.05 * ((i * 7919) % 13) + (3 if i in (150, 1500, 2300) else 0) for i in range(2500)]
    expected = 0
    for i in range(FEWEST, len(losses)):
        window = losses[max(0, i - WINDOW) : i]
        expected += losses[i] >= np.mean(window) + 7 * np.std(window)
    assert after(losses).spikes == expected
    assert expected == 2, "the first falls into the steep part of the curve"


def test_nothing_is_called_a_spike_too_early_or_for_rounding():
    assert after([*noisy(FEWEST - 2), 100.0]).spikes == 0
    assert after([2.0] * 200 + [2.0000005]).spikes == 0
    assert after([2.0] * 200 + [2.1]).spikes == 1


def test_a_plateau_is_a_spike_only_until_it_is_usual():
    health = after([*noisy(1000), *[4.0] * 1000])
    assert 1 < health.spikes < 100
    assert health.trouble_since is None


def test_spikes_are_told_once():
    health = after([*noisy(200), 50.0])
    assert (health.take_spikes(), health.take_spikes()) == (1, 0)


@pytest.mark.parametrize(
    ("losses", "good"),
    [
        ([], 0),
        ([1.0], 0),  # nothing was computed from step 1 yet
        ([1.0, 1.0, 1.0], 2),
        ([1.0, 1.0, 1.0, None], 2),  # step 3 led to what is not finite
        ([1.0, 1.0, 1.0, None, None, None], 2),
        ([1.0, 1.0, None, None, 1.0], 4),
        ([1.0, 1.0, None, 1.0, None], 3),
        ([None, None], 0),
        ([1.0, None], 0),
        ([*noisy(200), 9.0, 9e9, None, None], 199),  # a spike before it: the trouble began at step 201
    ],
)
def test_the_newest_step_that_is_known_to_be_good(losses, good):
    assert after(losses).last_good == good


def test_a_run_that_goes_on_in_the_middle_of_a_streak_knows_where_it_began():
    health = Health(step=12, skipped_in_a_row=3)  # steps 10, 11 and 12
    assert health.last_good == 8
    health.add(13, np.nan, False)
    assert health.last_good == 8
    health.add(14, 1.0, True)
    assert health.last_good == 13
    assert Health(step=12).last_good == 11
