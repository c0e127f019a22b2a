"""Checks of the laws on a user's own config.

laws           their sentences, and the checks of each
experiment     every law, of an experiment: the findings that `python -m experiments.audit` prints
shrink         the experiment at small widths, and the changes
routing        trainable, causal, batch-independent: of a layer
counts         choices and drops, counted in the routing itself: of a layer
dispatchers    the same numbers from all of them: of a layer
slopes         the router's gradient against finite differences: of a layer
single_device  checks of a training step on one device
meshes         checks of a training step on several devices
communication  predicted and compiled collectives, which hlo reads
placement      shardings of the parameters
page           the findings as HTML
"""

from moe_jax.audit.routing import Verdict, batch_independent, causal, trainable
from moe_jax.audit.slopes import gradients_are_slopes

__all__ = ["Verdict", "batch_independent", "causal", "gradients_are_slopes", "trainable"]
