"""Recordings of routing, their analysis, and experiments on a trained model."""

from moe_jax.inspect.balance import (
    dead_experts,
    drop_rate_by,
    entropy_by,
    expert_choices,
    expert_load,
    load_over_time,
    load_percentiles,
    repeated_drops,
    router_margin,
)
from moe_jax.inspect.card import Card
from moe_jax.inspect.certificate import certify, verify
from moe_jax.inspect.explain import Explanation
from moe_jax.inspect.fairness import Fairness
from moe_jax.inspect.knockout import isolate_experts, knock_out, mask_experts, masked_losses, substitute
from moe_jax.inspect.look import LayerTrace, trace_layers
from moe_jax.inspect.paths import coactivation, layer_dependence, path_statistics, transitions
from moe_jax.inspect.probes import Search, probe, targets
from moe_jax.inspect.recorder import record, record_run, recordings
from moe_jax.inspect.recording import Recording, choices, column_files, joined, load_recording, manifest, save_recording
from moe_jax.inspect.run import TrainedRun, open_run
from moe_jax.inspect.similarity import (
    chosen_together,
    duplicates,
    output_similarity,
    router_saturation,
    weight_similarity,
)
from moe_jax.inspect.specialisation import (
    domain_information,
    domain_specialisation,
    mutual_information,
    specialisation_by,
    vocabulary_specialisation,
)

__all__ = [
    "Card",
    "Explanation",
    "Fairness",
    "LayerTrace",
    "Recording",
    "Search",
    "TrainedRun",
    "certify",
    "choices",
    "chosen_together",
    "coactivation",
    "column_files",
    "dead_experts",
    "domain_information",
    "domain_specialisation",
    "drop_rate_by",
    "duplicates",
    "entropy_by",
    "expert_choices",
    "expert_load",
    "isolate_experts",
    "joined",
    "knock_out",
    "layer_dependence",
    "load_over_time",
    "load_percentiles",
    "load_recording",
    "manifest",
    "mask_experts",
    "masked_losses",
    "mutual_information",
    "open_run",
    "output_similarity",
    "path_statistics",
    "probe",
    "record",
    "record_run",
    "recordings",
    "repeated_drops",
    "router_margin",
    "router_saturation",
    "save_recording",
    "specialisation_by",
    "substitute",
    "targets",
    "trace_layers",
    "transitions",
    "verify",
    "vocabulary_specialisation",
    "weight_similarity",
]
