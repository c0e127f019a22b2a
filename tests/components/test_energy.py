"""Energy and carbon: the formula gives what papers have published, as closely as they have rounded."""

import math

import pytest

from moe_jax.config import RunConfig
from moe_jax.costs.chips import CHIPS, by_device_kind, chip, peak
from moe_jax.costs.energy import energy, run_energy, usable_cores
from moe_jax.reporting.metrics import summary_rows

# arXiv:2104.10350, table 4; GLaM: arXiv:2112.06905. Days (GLaM: hours), processors, W, PUE, MWh, and the net kg of CO2e
# per kWh of the data centre, with the tonnes it comes to; None where a paper gives no such figure for the run.
PUBLISHED = {
    "T5": (20, 512, 310, 1.12, 85.7, 0.545, 46.7),
    "Meena": (30, 1024, 289, 1.09, 232, 0.415, 96.4),
    "GShard 600B": (3.1, 1024, 288, 1.09, 24.1, 0.177, 4.3),
    "Switch": (27, 1024, 245, 1.10, 179, 0.330, 59.1),
    "GPT-3": (14.8, 10_000, 330, 1.10, 1287, 0.429, 552.1),
    "GLaM, 280B tokens": (574 / 24, 1024, 326, 1.11, 213, None, None),
}
# The last digit that each figure is given to. The days are what is rounded most.
DIGIT = {3.1: 0.1, 14.8: 0.1, 574 / 24: 1 / 24, 85.7: 0.1, 24.1: 0.1}
DIGIT |= dict.fromkeys((20, 30, 27, 232, 179, 1287, 213), 1)


def of(days: float, chips: int, watts: float, pue: float) -> float:
    """MWh."""
    return energy(24.0 * days, chips, float(watts), pue).mwh


def ends(value: float, digit: float) -> tuple[float, float]:
    """Where a rounded figure's true value lies."""
    return value - digit / 2, value + digit / 2


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_energy(name):
    """The published MWh lie between what the published inputs can have been rounded from."""
    days, chips, watts, pue, mwh, _, _ = PUBLISHED[name]
    inputs = zip(ends(days, DIGIT[days]), ends(watts, 1), ends(pue, 0.01), strict=True)
    low, high = (of(d, chips, w, p) for d, w, p in inputs)
    least, most = ends(mwh, DIGIT[mwh])
    assert low <= most
    assert least <= high
    assert of(days, chips, watts, pue) == pytest.approx(mwh, rel=0.01)


@pytest.mark.parametrize("name", [name for name, row in PUBLISHED.items() if row[-1]])
def test_published_carbon(name):
    """Tonnes of CO2e follow from the published MWh and the grid."""
    *_, mwh, carbon, tonnes = PUBLISHED[name]
    of_one = energy(1.0, 1000, 1.0, 1.0, carbon).tco2e  # of a kWh
    (low, high), (least, most) = ends(carbon, 0.001), ends(tonnes, 0.1)
    assert mwh * 1000 * of_one * low / carbon <= most * (1 + DIGIT[mwh] / mwh)
    assert mwh * 1000 * of_one * high / carbon >= least * (1 - DIGIT[mwh] / mwh)
    assert mwh * 1000 * of_one == pytest.approx(tonnes, rel=0.01)


def test_glam_closes():
    """The arithmetic itself: 574 hours of 1,024 chips at 326 W are 212.7 MWh; 456 MWh with 40.2 t are 0.088 kg/kWh."""
    assert round(energy(574.0, 1024, 326.0, 1.11).mwh, 1) == 212.7
    assert round(energy(456_000.0, 1, 1000.0, 1.0, 0.0882).tco2e, 1) == 40.2


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"hours": -1.0}, "hours=-1.0"),
        ({"watts": math.nan}, "power=nan"),
        ({"carbon": -0.1}, "carbon=-0.1"),
        ({"pue": 0.9}, "pue=0.9"),
        ({"pue": math.inf}, "pue=inf"),
    ],
)
def test_no_such_figure(given, words):
    with pytest.raises(ValueError, match=words):
        energy(**{"hours": 1.0, "processors": 1, "watts": 100.0} | given)


def test_chips_are_found_by_name_and_kind():
    """Found by name and by JAX's device kind; a device's peak is its part of a chip's."""
    assert len({c.name for c in CHIPS}) == len({c.kind for c in CHIPS}) == len(CHIPS)
    for c in CHIPS:
        assert chip(c.name) is by_device_kind(c.kind) is c
        assert c.usable <= 1.01 * c.hbm / c.devices
        assert 50 < c.flops / c.hbm_rate < 700  # FLOPs for every byte
    assert peak("TPU v4") == 275e12
    assert peak("TPU7x") == 2307e12 / 2
    assert peak("cpu") is None
    with pytest.raises(ValueError, match="did you mean 'tpu7x'"):
        chip("tpu7")


def test_all_reduce_bandwidth_of_a_pod():
    """Links are consistent with what the vendor gives for whole pods, TB/s."""
    for name, pod, published in (("v3", 1024, 340), ("v4", 4096, 1100), ("v5e", 256, 51.2)):
        c = chip(name)
        assert 2 * c.dims * c.link * pod / 1e12 == pytest.approx(published, rel=0.02)
    for name, both_ways in (("v5e", 400), ("v5p", 1200), ("v6e", 800), ("tpu7x", 1200)):
        c = chip(name)
        assert 2 * 2 * c.dims * c.link / 1e9 == both_ways


# ---------------------------------------------------------------- of a run that has been


def test_a_run_on_cores():
    """Two hours of 4 cores at 12 W with PUE 1.1 are 0.1056 kWh, at 429 g each 45.3 g of CO2e; and it says so."""
    run = run_energy(7200.0, "cpu", 8, cores=4)  # simulated devices are no processors
    assert run["kwh"] == pytest.approx(2 * 4 * 12 * 1.1 / 1000) == pytest.approx(0.1056)
    assert run["kg_co2e"] == pytest.approx(0.0453024)
    assert (run["seconds"], run["processors"], run["watts"]) == (7200, 4, 12)
    words = (
        "estimate for 4 cores at 12 W (Green Algorithms' figure for any CPU, arXiv:2007.07610), PUE 1.1, 429 gCO2e/kWh"
    )
    assert run["basis"] == words
    assert run_energy(1.0, "cpu", 1)["processors"] == usable_cores() >= 1
    one = run_energy(3600.0, "cpu", 1, watts=50.0, pue=1.5, carbon=0.05, cores=1)
    assert (one["kwh"], one["kg_co2e"]) == (pytest.approx(0.075), pytest.approx(0.00375))
    assert one["basis"] == "estimate for 1 core at 50 W (as configured), PUE 1.5, 50 gCO2e/kWh"


def test_a_run_on_chips():
    """A chip of two devices counts once; what nobody has published is no number, until it is configured."""
    assert run_energy(3600.0, "TPU v4", 4)["kwh"] == pytest.approx(4 * 326 * 1.1 / 1000)
    assert run_energy(3600.0, "TPU v3", 8)["kwh"] == pytest.approx(4 * 283 * 1.1 / 1000)
    unknown = run_energy(3600.0, "TPU v5 lite", 4)
    assert unknown["kwh"] is unknown["kg_co2e"] is unknown["watts"] is None
    assert unknown["basis"] == "no estimate: the power of 4 v5e chips is not published; set config.run.watts"
    assert run_energy(3600.0, "TPU v5 lite", 4, watts=200.0)["kwh"] == pytest.approx(0.88)
    assert run_energy(3600.0, "Abacus", 3)["basis"].startswith("no estimate: the power of 3 Abacus")


def test_a_run_says_what_it_took():
    """In the table that ends it."""
    end = {"kind": "end", "step": 1, "seconds": 7200.0, "energy": run_energy(7200.0, "cpu", 8, cores=4)}
    rows = dict(summary_rows([end]))
    assert rows["energy"] == "0.106 kWh, 0.0453 kg CO2e"
    assert rows["energy, by"].startswith("estimate for 4 cores at 12 W")
    assert rows["wall time"] == "2:00:00"
    assert "energy" not in dict(summary_rows([{**end, "energy": run_energy(1.0, "TPU v5 lite", 1)}]))


@pytest.mark.parametrize("fields", [{"watts": -1.0}, {"carbon": math.nan}, {"pue": 0.9}, {"watts": math.inf}])
def test_what_a_config_may_not_assume(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        RunConfig(**fields)
