"""Energy and carbon of a run, as "Carbon Emissions and Large Neural Network Training" has them (arXiv:2104.10350).

kWh   = hours x processors x mean W per processor x PUE / 1000
tCO2e = kWh x kg of CO2e per kWh / 1000
"""

import math
import os
from typing import NamedTuple

from moe_jax.costs import chips

# Defaults: a large cloud's data centre, and the average grid of the United States in 2020.
PUE, PUE_SOURCE = 1.10, "Google's data centres in arXiv:2104.10350, table 4: 1.08 to 1.12"
CARBON, CARBON_SOURCE = 0.429, "US average, arXiv:2104.10350, table 4 (GPT-3)"
# Watts of a busy CPU core, where the processor is unknown; memory is not included.
CORE_WATTS, CORE_SOURCE = 12.0, "Green Algorithms' figure for any CPU, arXiv:2007.07610"


class Energy(NamedTuple):
    """Energy that a run takes from the grid, and its emissions."""

    kwh: float
    tco2e: float

    @property
    def mwh(self) -> float:
        return self.kwh / 1000


def energy(hours: float, processors: int, watts: float, pue: float = PUE, carbon: float = CARBON) -> Energy:
    """Energy of `hours` on `processors` of `watts` each; carbon: kg CO2e per kWh.

    Manufacturing, storage and failed runs are not included. ValueError for an impossible figure.
    """
    given = {"hours": hours, "processors": processors, "power": watts, "carbon": carbon}
    for name, value in given.items():
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name}={value} must be a number that is not negative.")
    if not (math.isfinite(pue) and pue >= 1):
        raise ValueError(f"pue={pue} must be at least 1: a data centre takes all that its machines take; 1.1 is good.")
    kwh = hours * processors * watts * pue / 1000
    return Energy(kwh, kwh * carbon / 1000)


def run_energy(
    seconds: float,
    kind: str,
    devices: int,
    watts: float | None = None,
    pue: float = PUE,
    carbon: float = CARBON,
    cores: int | None = None,
) -> dict[str, float | str | None]:
    """Energy record of a run of `seconds` on a number of JAX devices of this kind, with its assumptions.

    watts: of a chip, or of a CPU core; None is the published mean of the chip, or `CORE_WATTS`. cores: of a CPU,
    however many devices it simulates; None counts those that this process may use. kWh and kg of CO2e are None where
    the power of the chip is not published. Time is measured; power is not.
    """
    chip, published, source = chips.by_device_kind(kind), None, "not published"
    processors, what = float(devices), kind
    if chip is not None:
        processors, what, published, source = devices / chip.devices, f"{chip.name} chip", chip.watts, chip.watts_source
    elif kind == "cpu":
        processors, what, published, source = float(cores or usable_cores()), "core", CORE_WATTS, CORE_SOURCE
    if watts is None:
        watts = published
    else:
        source = "as configured"
    record = {"seconds": seconds, "processors": processors, "pue": pue, "carbon": carbon}
    number = f"{processors:g} {what}{'s' * (processors != 1 and source != 'not published')}"
    if watts is None:
        words = f"no estimate: the power of {number} is not published; set config.run.watts"
        return {**record, "watts": None, "kwh": None, "kg_co2e": None, "basis": words}
    total = energy(seconds / 3600, 1, processors * watts, pue, carbon)
    words = f"estimate for {number} at {watts:g} W ({source}), PUE {pue:g}, {1000 * carbon:g} gCO2e/kWh"
    return {**record, "watts": watts, "kwh": total.kwh, "kg_co2e": 1000 * total.tco2e, "basis": words}


def usable_cores() -> int:
    """The CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
