"""Energy and carbon of a run, as "Carbon Emissions and Large Neural Network Training" has them (arXiv:2104.10350).

kWh   = hours x processors x mean W per processor x PUE / 1000
tCO2e = kWh x kg of CO2e per kWh / 1000
"""

import math
from typing import NamedTuple

# Where a user says nothing else: a large cloud's data centre, and the average grid of the United States in 2020.
PUE, PUE_SOURCE = 1.10, "Google's data centres in arXiv:2104.10350, table 4: 1.08 to 1.12"
CARBON, CARBON_SOURCE = 0.429, "US average, arXiv:2104.10350, table 4 (GPT-3)"


class Energy(NamedTuple):
    """What a run takes from the grid, and what that emits."""

    kwh: float
    tco2e: float

    @property
    def mwh(self) -> float:
        return self.kwh / 1000


def energy(hours: float, processors: int, watts: float, pue: float = PUE, carbon: float = CARBON) -> Energy:
    """Of `hours` on so many processors of so many watts each; carbon: kg CO2e per kWh.

    Manufacturing, storage and failed runs are not in it. ValueError where a figure cannot be.
    """
    given = {"hours": hours, "processors": processors, "power": watts, "carbon": carbon}
    for name, value in given.items():
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name}={value} must be a number that is not negative.")
    if not (math.isfinite(pue) and pue >= 1):
        raise ValueError(f"pue={pue} must be at least 1: a data centre takes all that its machines take; 1.1 is good.")
    kwh = hours * processors * watts * pue / 1000
    return Energy(kwh, kwh * carbon / 1000)
