"""Every figure of reports and notebooks, in one style that is safe for colour-blind readers and for print."""

from moe_jax.reporting.plots.charts import Curve, bars, histogram, lines, matrices, regions
from moe_jax.reporting.plots.runs import Runs, auxiliary, compared_losses, domains, layers, loads, losses
from moe_jax.reporting.plots.style import NARROW, WIDE, Plot, beside

__all__ = [
    "NARROW",
    "WIDE",
    "Curve",
    "Plot",
    "Runs",
    "auxiliary",
    "bars",
    "beside",
    "compared_losses",
    "domains",
    "histogram",
    "layers",
    "lines",
    "loads",
    "losses",
    "matrices",
    "regions",
]
