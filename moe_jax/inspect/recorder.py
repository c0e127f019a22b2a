"""Records the routing of an experiment's model, on the experiment's mesh, batch by batch."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, Key

from moe_jax.config import Experiment
from moe_jax.core import shard
from moe_jax.core.stats import entropy
from moe_jax.data import AnyBatch, Images, Pairs
from moe_jax.data.windows import positions
from moe_jax.inspect.recording import Recording, save_recording
from moe_jax.inspect.run import examples, open_run
from moe_jax.models import Call, Model
from moe_jax.moe import RECORDED, LayerState
from moe_jax.step import Program

STACKS = ("encoder", "decoder")  # of models with two
RECORD = ("weight", "kept", "slot", "probs")


class Routed(NamedTuple):
    """Decisions of a stack's MoE layers on a batch."""

    expert_NBLK: Int[Array, "N B L K"]
    weight_NBLK: Float[Array, "N B L K"]
    kept_NBLK: Bool[Array, "N B L K"]
    slot_NBLK: Int[Array, "N B L K"]
    top_NBLP: Float[Array, "N B L P"]
    top_id_NBLP: Int[Array, "N B L P"]
    entropy_NBL: Float[Array, "N B L"]
    probs_NBLE: Float[Array, "N B L E"] | None


class Tokens(NamedTuple):
    """Tokens of a batch as a stack gets them."""

    token_BL: Int[np.ndarray, "B L"]
    position_BL: Int[np.ndarray, "B L"]
    segment_BL: Int[np.ndarray, "B L"]  # 0 is padding


def record(
    exp: Experiment,
    params: Any,
    batches: Iterable[AnyBatch],
    folder: str | Path,
    about: Mapping[str, Any] | None = None,
    **options: Any,
) -> Path:
    """Records the routing of batches to a folder, holding one batch at a time; see `recording`.

    about: JSON kept with the recording. options: those of `recordings`.
    """
    kept = {"config": exp.to_json(), "dropless": False, "stack": "decoder"}
    kept |= {name: options[name] for name in ("dropless", "stack") if name in options}
    return save_recording(recordings(exp, params, batches, **options), folder, {**kept, **(about or {})})


def record_run(
    workdir: str | Path,
    folder: str | Path,
    windows: int | None = 256,
    held_out: bool = True,
    step: int | None = None,
    mesh: Mapping[str, int] | None = None,
    data_dir: Path | None = None,
    **options: Any,
) -> Path:
    """Records a finished or interrupted run, by its newest valid checkpoint or that of `step`.

    windows: maximum number of examples, from all domains, of the held-out or the training split, in a fixed order, so
    that two recordings are of the same tokens. mesh: in place of the run's. options: those of `record`.
    """
    run = open_run(workdir, step)
    exp = run.exp if mesh is None else dataclasses.replace(run.exp, mesh=tuple(mesh.items()))
    split, batches = examples(run._replace(exp=exp), data_dir, windows, held_out)
    about = {"step": run.step, "data": split.fingerprint}
    return record(exp, run.params, batches, folder, about, router=run.router, domains=split.domains, **options)


def recordings(
    exp: Experiment,
    params: Any,
    batches: Iterable[AnyBatch],
    router: LayerState | None = None,
    domains: Sequence[str] = (),
    dropless: bool = False,
    keep_probs: bool = False,
    stack: str = "decoder",
    key: Key[Array, ""] | None = None,
) -> Iterator[Recording]:
    """Yields the recordings of batches, one by one.

    router: state of the routers; by default the initial one. domains: names of the domains, by number.
    dropless: without a capacity limit. keep_probs: all probabilities, not only the largest ones. stack: "encoder" or
    "decoder". key: records as in training, with noise; without a key as in evaluation.
    """
    check_recordable(exp, stack)
    model, program = exp.model.dropless() if dropless else exp.model, Program(exp, max(len(domains), 1))
    trace = compile_recorder(program, exp, partial(routed, model, exp.data.objective, stack, keep_probs))
    params = jax.device_put(params, program.shardings.params)
    state = dict(exp.model.init_router() if router is None else router)
    rows = documents = 0
    for n, batch in enumerate(batches):
        with jax.set_mesh(program.mesh):
            now = None if key is None else jax.random.fold_in(key, n)
            traced, nats = jax.device_get(trace(params, state, now, program.to_global(batch)))
        part = columns(traced, nats, tokens_of(model, batch, stack), batch.domain_B, model.moe.E, domains)
        yield part._replace(sequence_T=part.sequence_T + rows, document_T=part.document_T + documents)
        rows, documents = rows + len(batch.domain_B), documents + part.document_T.max(initial=-1) + 1


def check_recordable(exp: Experiment, stack: str) -> None:
    """Refuses models, stacks and runs that cannot be recorded."""
    if not exp.model.n_moe_layers:
        raise ValueError("The model has no MoE layer to record; set config.model.moe, and a layout with sparse layers.")
    if stack not in STACKS:
        raise ValueError(f"stack={stack!r} is unknown; use one of {', '.join(map(repr, STACKS))}.")
    if jax.process_count() > 1:
        raise ValueError(f"{jax.process_count()} processes cannot write one recording; record in a single process.")


def compile_recorder(program: Program, exp: Experiment, trace: Callable) -> Callable:
    """(params, router, key, batch) -> result of `trace`, sharded over the program's mesh."""
    with jax.set_mesh(program.mesh):
        tokens = shard.token_spec(here := shard.from_mesh(exp.exchange))
        in_specs = (program.specs.params, P(), P(), tokens)
        return jax.jit(shard.per_shard(trace, here, in_specs, (P(None, *tokens), tokens)))


def routed(
    model: Model,
    objective: Any,
    stack: str,
    keep_probs: bool,
    params: Any,
    router: LayerState,
    key: Key[Array, ""] | None,
    batch: AnyBatch,
) -> tuple[Routed, tuple[Float[Array, "B L"], Bool[Array, "B L"]]]:
    """Decisions of a stack's layers on one shard's rows; nats per position, and which of them are targets."""
    logits_BLV, aux = model.apply(params, batch, Call(key, router, record=RECORD))
    predicts_BL = objective.targets(batch) & (model.STACKS == 1 or stack == "decoder")
    nats_BL = objective.terms(logits_BLV, batch, shard.local()).nats_BL
    reports = cast(Any, aux)  # not None: there are MoE layers, and they record
    own, L = layers_of(model, stack), length(model, batch, stack)
    details = [getattr(reports.recorded, RECORDED[name]) for name in RECORD]
    per_layer = (a[own.start : own.stop, :, :L] for a in (reports.expert_BLK, *details))
    expert, weight, kept, slot, probs = per_layer
    top, top_id = lax.top_k(probs, min(probs.shape[-1], expert.shape[-1] + 2))
    sums = (top, top_id.astype(jnp.int16), entropy(probs), probs if keep_probs else None)
    return Routed(expert.astype(jnp.int16), weight, kept, slot, *sums), (nats_BL, predicts_BL)


def layers_of(model: Any, stack: str) -> range:
    """Indices of this stack's MoE layers among all MoE layers, from 0."""
    N = model.n_moe_layers // model.STACKS
    first = N if model.STACKS > 1 and stack == "decoder" else 0
    return range(first, first + N)


def length(model: Any, batch: Any, stack: str) -> int:
    """Tokens of a sequence of this stack."""
    if isinstance(batch, Pairs):
        return (batch.source_BM if stack == "encoder" else batch.tokens_BL).shape[1]
    return model.L if isinstance(batch, Images) else batch.tokens_BL.shape[1]


def tokens_of(model: Any, batch: AnyBatch, stack: str = "decoder") -> Tokens:
    """The input tokens of a stack; patches of images have no id in a vocabulary."""
    if isinstance(batch, Images):
        position_BL = np.broadcast_to(np.arange(model.L), (len(batch.domain_B), model.L))
        return Tokens(
            np.full_like(position_BL, -1), position_BL, np.broadcast_to(batch.loss_mask_BL, position_BL.shape) + 0
        )
    if isinstance(batch, Pairs) and stack == "encoder":
        return Tokens(batch.source_BM, positions(batch.source_segment_BM), batch.source_segment_BM)
    position_BL = positions(batch.segment_BL) if isinstance(batch, Pairs) else batch.position_BL
    return Tokens(batch.tokens_BL, position_BL, batch.segment_BL)


def columns(
    traced: Routed,
    nats: tuple[Float[np.ndarray, "B L"], Bool[np.ndarray, "B L"]],
    tokens: Tokens,
    domain_B: Int[np.ndarray, "B"],
    E: int,
    domains: Sequence[str],
) -> Recording:
    """A batch's real tokens, row by row, sequences and documents counted from 0.

    nats: of the positions, and which of them are targets; the loss of the others is NaN.
    """
    real_BL = tokens.segment_BL > 0
    *by_layer, probs_TNE = [None if a is None else np.moveaxis(np.asarray(a)[:, real_BL], 0, 1) for a in tuple(traced)]
    row_BL = np.broadcast_to(np.arange(len(real_BL))[:, None], real_BL.shape)
    of_tokens: list[Any] = [*tokens, row_BL]
    token_T, position_T, segment_T, row_T = (np.asarray(a)[real_BL].astype(np.int32) for a in of_tokens)
    document_T = np.cumsum(np.diff(row_T, prepend=0).astype(bool) | np.diff(segment_T, prepend=1).astype(bool))
    loss_BL = np.full(real_BL.shape, np.nan, np.float32)
    nats_BL = np.where(nats[1], nats[0], np.nan)
    loss_BL[:, : nats_BL.shape[1]] = nats_BL[:, : real_BL.shape[1]]  # an image has one target, by its first token
    domain_T = np.asarray(domain_B)[row_T].astype(np.int16)
    by_token = (token_T, position_T, document_T.astype(np.int32), domain_T, row_T, loss_BL[real_BL])
    given: list[Any] = [*by_layer, *by_token, E, tuple(domains), probs_TNE]
    return Recording(*given)
