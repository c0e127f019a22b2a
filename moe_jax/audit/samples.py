"""Random batches to try laws on: of two documents and padding, the last row of padding only."""

from typing import Any

import numpy as np

from moe_jax.config import Experiment
from moe_jax.data import AnyBatch, Batch, Images, Pairs


def sample(exp: Experiment, seed: int = 0) -> AnyBatch:
    """A batch of an experiment's shapes."""
    rng, shapes = np.random.default_rng(seed), exp.data.shapes()
    return SAMPLES[type(shapes)](exp, rng, shapes)


def sample_tokens(exp: Experiment, rng: np.random.Generator, shapes: Batch) -> Batch:
    """Random sequences; the target of a token is the next token."""
    B, L = shapes.tokens_BL.shape
    row_BM = rng.integers(1, exp.model.V, (B, L + 1)).astype(np.int32)
    segment_BL, first_B1 = sample_segments(rng, B, L)
    place_L = np.arange(L)
    position_BL = np.where(place_L < first_B1, place_L, place_L - first_B1).astype(np.int32)
    domain_B = sample_domains(exp, rng, B)
    return Batch(row_BM[:, :-1], row_BM[:, 1:], segment_BL, position_BL, segment_BL > 0, domain_B)


def sample_pairs(exp: Experiment, rng: np.random.Generator, shapes: Pairs) -> Pairs:
    """Sources and targets of two segments each."""
    (B, M), L = shapes.source_BM.shape, shapes.tokens_BL.shape[1]
    source_BM = rng.integers(1, getattr(exp.model, "V_source", None) or exp.model.V, (B, M)).astype(np.int32)
    row_BM = rng.integers(1, exp.model.V, (B, L + 1)).astype(np.int32)
    source_segment_BM, (segment_BL, _) = sample_segments(rng, B, M)[0], sample_segments(rng, B, L)
    segment_BL = np.minimum(segment_BL, source_segment_BM.max(1, keepdims=True))  # a target has a source
    domain_B = sample_domains(exp, rng, B)
    return Pairs(source_BM, source_segment_BM, row_BM[:, :-1], row_BM[:, 1:], segment_BL, segment_BL > 0, domain_B)


def sample_images(exp: Experiment, rng: np.random.Generator, shapes: Images) -> Images:
    """Images of noise."""
    B = len(shapes.image_BYXC)
    image_BYXC = rng.normal(size=shapes.image_BYXC.shape).astype(np.float32)
    target_B1 = rng.integers(exp.model.V, size=(B, 1)).astype(np.int32)
    return Images(image_BYXC, target_B1, (np.arange(B) < B - 1)[:, None], sample_domains(exp, rng, B))


SAMPLES: dict[type, Any] = {Batch: sample_tokens, Pairs: sample_pairs, Images: sample_images}


def sample_segments(rng: np.random.Generator, B: int, L: int) -> tuple[np.ndarray, np.ndarray]:
    """Two documents of random lengths in a row [B, L], then padding (0); and where the second begins [B, 1]."""
    first_B1, end_B1 = rng.integers(1, L, (B, 1)), rng.integers(L // 2, L + 1, (B, 1))
    end_B1[-1], place_L = 0, np.arange(L)
    return np.where(place_L >= end_B1, 0, np.where(place_L < first_B1, 1, 2)).astype(np.int32), first_B1


def sample_domains(exp: Experiment, rng: np.random.Generator, B: int) -> np.ndarray:
    return rng.integers(tasks(exp), size=B).astype(np.int32)


def tasks(exp: Experiment) -> int:
    """Number of tasks that the model distinguishes."""
    moe = exp.model.routed
    return max(moe.tasks, moe.traits.tasks) if moe is not None and moe.needs else 1


# ---------------------------------------------------------------- where a batch is padding

SEGMENTS = {"tokens_BL": "segment_BL", "target_BL": "segment_BL", "source_BM": "source_segment_BM"}


def is_padding(batch: AnyBatch, field: str) -> np.ndarray:
    """Mask of the padding in a field of a batch."""
    segments = "loss_mask_BL" if isinstance(batch, Images) else SEGMENTS[field]
    nothing = getattr(batch, segments) == 0
    values = getattr(batch, field)
    return np.broadcast_to(nothing.reshape(*nothing.shape, *[1] * (values.ndim - nothing.ndim)), values.shape)


def fill_padding(batch: AnyBatch, rng: np.random.Generator) -> AnyBatch:
    """Returns the batch with other values where it is padding."""

    def noise(field: str) -> np.ndarray:
        a = getattr(batch, field)
        real = np.issubdtype(a.dtype, np.floating)
        other = rng.normal(size=a.shape) if real else rng.integers(a.max() + 1, size=a.shape)
        return np.where(is_padding(batch, field), other.astype(a.dtype), a)

    fields = ("image_BYXC", "target_BL") if isinstance(batch, Images) else SEGMENTS
    return batch._replace(**{field: noise(field) for field in fields if field in batch._fields})


def keep_rows(batch: AnyBatch, rows_B1: np.ndarray) -> AnyBatch:
    """Returns the batch with padding in all other rows."""
    masks = [field for field in batch._fields if "segment" in field or "mask" in field]
    return batch._replace(**{field: getattr(batch, field) * rows_B1 for field in masks})


def padding_mask(exp: Experiment, batch: AnyBatch) -> np.ndarray:
    """Mask of the padding in each MoE layer, [N, B, L], in the order of `Aux.expert_BLK`."""
    return layer_segments(exp, batch) == 0


def layer_segments(exp: Experiment, batch: AnyBatch) -> np.ndarray:
    """Documents by number in each MoE layer, 0 for padding, [N, B, L], in the order of `Aux.expert_BLK`."""
    shapes = exp.model.stacks(batch)
    fields = ("source_segment_BM", "segment_BL")[-len(shapes) :]
    segments = [batch.loss_mask_BL * 1] if isinstance(batch, Images) else [getattr(batch, f) for f in fields]
    longest, layers = max(s.L for s in shapes), exp.model.n_moe_layers // len(shapes)
    stacks = [
        np.pad(np.broadcast_to(segment, (len(segment), s.L)), [(0, 0), (0, longest - s.L)])
        for segment, s in zip(segments, shapes, strict=True)
    ]
    return np.repeat(np.stack(stacks), layers, axis=0)


def change_document(exp: Experiment, batch: Batch | Pairs, document: int) -> Batch | Pairs:
    """Returns the batch with other tokens in the documents of this number."""
    vocabulary = {"tokens_BL": exp.model.V, "source_BM": getattr(exp.model, "V_source", None) or exp.model.V}

    def other(field: str) -> np.ndarray:
        tokens, mine = getattr(batch, field), getattr(batch, SEGMENTS[field]) == document
        return np.where(mine, (tokens + 1) % vocabulary[field], tokens)

    return batch._replace(**{field: other(field) for field in vocabulary if field in batch._fields})
