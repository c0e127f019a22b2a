"""Checks of the laws on a user's own config.

laws           their sentences, and what checks each of them
experiment     every law, of an experiment: what `python -m experiments.audit` prints
shrink         the experiment at small widths, and what was changed
routing        trainable, causal, batch-independent: of a layer
dispatchers    the same numbers from all of them: of a layer
alone, meshes  of a training step: what one device can tell, and what several can
communication  predicted and compiled collectives, which hlo reads
placement      which parameter lies where
page           the findings as HTML
"""

from moe_jax.audit.routing import Verdict, batch_independent, causal, trainable

__all__ = ["Verdict", "batch_independent", "causal", "trainable"]
