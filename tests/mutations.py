"""Deliberate bugs: what the audit must catch, tried by putting each into the code as it is imported.

    python -m tests.mutations
    python -m tests.mutations --only=stale_replica --jobs=1

Every mutation is one edit of one file. The audit of its law (`experiments.audit --stop --quick --law=N`, of a tiny
model on at most four simulated devices) must break and say where. The same audit of the code as it is must hold. What
is refused before it runs, by JAX's check of replicas (`check_vma`) or by a layer, is counted apart. The exit code is 1
where a mutation survives or the code as it is does not hold. About 15 CPU minutes.
"""

import argparse
import pathlib
import sys
import tempfile
from typing import NamedTuple

from tests.museum import forks
from tests.museum.catch import Audit, Pytest
from tests.museum.mutant import Mutant


class Mutation(NamedTuple):
    """One edit, the law that it breaks, and flags of the audit that bring it into play.

    refused: it is to be refused before it runs. test: a test in place of a law, where the audit cannot see it.
    """

    name: str
    file: str
    old: str
    new: str
    overrides: tuple[str, ...] = ()
    refused: bool = False
    law: int = 1
    test: Pytest | None = None

    @property
    def mutant(self) -> Mutant:
        return Mutant(self.name, self.file, self.old, self.new)

    @property
    def catch(self) -> Audit | Pytest:
        """Returns the check that must fail: a test, or a law of the audit."""
        return self.test or Audit(self.law, self.overrides)


def mesh(**sizes: int) -> tuple[str, ...]:
    return tuple(f"--config.mesh.{axis}={n}" for axis, n in {"data": 1, "expert": 1, **sizes}.items())


def moe(**fields: str) -> tuple[str, ...]:
    return tuple(f"--config.model.moe.{field}={value}" for field, value in fields.items())


TENSOR = mesh(expert=2, tensor=2)
FSDP = mesh(fsdp=2, tensor=2)
ONE = ("--devices=1", *mesh())  # no meshes, where they are not what matters
TWO = ("--devices=2", *mesh(expert=2))  # and few
CHUNKS = (*TWO, *moe(exchange="AllToAll(chunks=2)"))
LEVELS = (*moe(exchange="TwoLevel()"), *mesh(slice=2, expert=2))
RAGGED = (*TWO, *moe(dispatch="Sort()", exchange="RaggedAllToAll()"))
SWITCH = (*ONE, *moe(router="Switch()"))
PIECES = (*ONE, "--config.data.microbatches=2")
ZERO = ("--config.optim.zero1=True",)
COPIES = ("--devices=2", *mesh(data=2))
KEPT = (*TWO, "--config.model.remat=save_collectives")
LATENTS = ("--devices=2", *mesh(tensor=2), "--config.model.attention=MLA(H=4, A=4, U=2, O=4, W=8)")

NOISE = Pytest("tests/laws/test_training_step.py", "test_noise_is_drawn_anew_in_every_layer_microbatch_and_step")

CORE, MOE, STEP, STATS = "moe_jax/core/shard.py", "moe_jax/moe.py", "moe_jax/step.py", "moe_jax/core/stats.py"
SCATTER, EXCHANGES, TRANSFORMER = "moe_jax/dispatch/scatter.py", "moe_jax/exchanges", "moe_jax/models/transformer.py"
ATTENTION, EVALUATE = "moe_jax/attention", "moe_jax/evaluate.py"
REDUCED = "return lax.psum(g, tuple(a for a in self.tokens if a in left)) if left else g"
OWN = "stats(routing, kept, B, ctx.task_GS, cfg.tasks)"
ALIKE = f"total = here.sum({OWN})"
LOSS = "loss = sum((part.weight * part(total, state, cfg.router) for part in cfg.losses), jnp.zeros((), jnp.float32))"
NATS = "here.sum((terms.nats_BL.sum(), "
OF_A_SHARD = "jnp.maximum(objective.targets({0}).sum(), 1)"
TARGETS = "jnp.maximum(here.sum(objective.targets(batch).sum(dtype=jnp.float32)), 1)"
DOCUMENTS = "sees.segment_BL[:, :, None] == segment_BM[:, None, :]"
APPLIED = "params = optax.apply_updates(state.params, updates)"
REPLICA = """
    alone = partial(jax.shard_map, in_specs=P(), out_specs=P(), check_vma=False)
    params = {{**params, "norm": alone(lambda new, old: {{"scale_D": {0}}})(params["norm"], state.params["norm"])}}"""
OWN_SLICE = (
    "g = jax.lax.dynamic_slice_in_dim({0}, self.axis_index(more) * (n := g.shape[i] // self.axis_size(more)), n, i)"
)
SCATTERED = "g = lax.psum_scatter(g, more, scatter_dimension=i, tiled=True)"
SENT = "shard.all_to_all(part, shard.experts, split=0, concat=1)"
EVALUATED = "here.sum((terms.nats_BL.sum(1) @ by_domain, targets_Z, right, limited.nats_BL.sum(), others))"
HERE_ONLY = "jnp.where(here.batch_shard_index == 0, {0}, 0)"
NAMED = "lax.all_to_all(x, axes, split_axis=split, concat_axis=concat, tiled=True)"
OFFSETS = "jnp.cumsum({0}, axis={1}) - {0}"
REAL = "x_BLD = jnp.where(mask_BL[..., None], x_BLD, 0)"

MUTATIONS = (
    # gradients
    Mutation("gradients_over_one_axis_too_few", CORE, REDUCED, REDUCED.replace("left))", "left)[:-1])"), refused=True),
    Mutation(
        "gradients_averaged_over_one_axis",
        CORE,
        REDUCED,
        REDUCED.replace(" if left", " / self.axis_size(self.tokens[-1:]) if left"),
    ),
    Mutation(
        "experts_gradient_once_per_shard",
        CORE,
        "left -= set(after)",
        "g, left = g * self.axis_size(tuple(a for a in after if a in left)), left - set(after)",
    ),
    Mutation("gradients_summed_twice", STEP, "params = here.pvary(params)", "params = params"),
    Mutation("check_of_replicas_off", CORE, "check_vma=True)", "check_vma=False)"),
    Mutation(
        "gradient_once_per_tensor_shard",
        CORE,
        "return jax.tree.map(lambda a: _varying(a, self.tensor), x)",
        "return jax.tree.map(lambda a: (b := _varying(a, self.tensor)) * (n := self.axis_size(self.tensor)) "
        "- (n - 1) * lax.stop_gradient(b), x)",
        TENSOR,
    ),
    Mutation(
        "pieces_averaged",
        STEP,
        "add = partial(jax.tree.map, jnp.add)",
        "add = partial(jax.tree.map, lambda a, b: (a + b) / 2)",
        PIECES,
    ),
    Mutation("zero1_not_summed", CORE, SCATTERED, OWN_SLICE.format("g"), ZERO),
    Mutation("zero1_other_order", CORE, SCATTERED, SCATTERED.replace("more", "more[::-1]"), ZERO),
    # losses
    Mutation(
        "loss_mean_of_means",
        STEP,
        NATS,
        NATS.replace("sum(),", f"sum() * targets / {OF_A_SHARD.format('microbatch')} / here.axis_size(here.tokens),"),
    ),
    Mutation(
        "loss_by_targets_of_a_shard",
        STEP,
        NATS,
        NATS.replace("sum(),", f"sum() * targets / {OF_A_SHARD.format('batch')},"),
    ),
    Mutation("nats_of_one_shard", STEP, NATS, f"here.sum(({HERE_ONLY.format('terms.nats_BL.sum()')}, "),
    Mutation(
        "padding_counts_as_target",
        STEP,
        TARGETS,
        "here.sum(jnp.full((), objective.targets(batch).size, jnp.float32))",
        law=7,
    ),
    Mutation(
        "padding_in_the_loss",
        "moe_jax/data/terms.py",
        "jnp.where(mask_BL, cross_entropy(logits_BLV, batch.target_BL), 0)",
        "cross_entropy(logits_BLV, batch.target_BL)",
        law=7,
    ),
    Mutation(
        "auxiliary_loss_per_shard",
        MOE,
        f"{ALIKE}\n    {LOSS}",
        f"own = {OWN}\n    total = here.sum(own)\n    "
        f"{LOSS.replace('part(total', 'part(own')}\n    loss = here.sum(loss) / here.axis_size(here.tokens)",
    ),
    # statistics
    Mutation(
        "statistics_over_one_axis_too_few",
        MOE,
        "total = here.sum(",
        "total = dataclasses.replace(here, tokens=here.tokens[1:]).sum(",
        refused=True,
    ),
    Mutation(
        "statistics_of_one_shard",
        MOE,
        ALIKE,
        f"total = here.sum(jax.tree.map(lambda a: {HERE_ONLY.format('a')}, {OWN}))",
    ),
    Mutation(
        "agreement_of_one_shard",
        TRANSFORMER,
        "here.sum(same.sum((1, 2, 3), dtype=jnp.float32))",
        "here.sum(same.sum((1, 2, 3), dtype=jnp.float32) * (here.batch_shard_index == 0))",
    ),
    Mutation(
        "padding_in_statistics",
        STATS,
        "mask_GS1 = routing.mask_GS[..., None].astype(jnp.float32)",
        "mask_GS1 = jnp.ones_like(routing.mask_GS[..., None], jnp.float32)",
        law=7,
    ),
    Mutation("drops_not_counted", STATS, "kept=kept.sum(dtype=jnp.float32)", "kept=assignments_GSE.sum()", law=2),
    Mutation(
        "choices_counted_after_drops",
        STATS,
        "choices_E=assignments_GSE.sum((0, 1)),",
        "choices_E=routing._replace(expert_GSK=jnp.where(kept, routing.expert_GSK, routing.E))"
        ".assignments_GSE.sum((0, 1)),",
        ONE,
        law=8,
    ),
    Mutation("drops_not_seen", SCATTER, "default=run), kept_GSK", "default=run), real_GSK", law=2),
    Mutation(
        "evaluation_of_one_shard",
        EVALUATE,
        EVALUATED,
        EVALUATED.replace("here.sum((", f"here.sum(jax.tree.map(lambda a: {HERE_ONLY.format('a')}, (") + ")",
    ),
    Mutation("evaluation_drops", EVALUATE, "run(cfg.dropless())", "run(cfg)", law=8),
    # replicas
    Mutation(
        "stale_replica",
        STEP,
        APPLIED,
        APPLIED + REPLICA.format('jnp.where(jax.lax.axis_index("data") == 0, new["scale_D"], old["scale_D"])'),
        COPIES,
        law=5,
    ),
    Mutation(
        "replicas_drift",
        STEP,
        APPLIED,
        APPLIED + REPLICA.format('new["scale_D"] + 1e-6 * jax.lax.axis_index("data")'),
        COPIES,
        law=5,
    ),
    # tensor parallelism and parameters that are gathered
    Mutation(
        "hidden_units_not_summed",
        CORE,
        "checkpoint_name(lax.psum(y, self.tensor), COLLECTIVES)",
        "y",
        TENSOR,
        refused=True,
    ),
    Mutation("hidden_units_averaged", CORE, "lax.psum(y, self.tensor)", "lax.pmean(y, self.tensor)", TENSOR),
    Mutation(
        "hidden_units_summed_twice",
        MOE,
        "y_GSO = here.tensor_exit(y_GSO)",
        "y_GSO = here.tensor_exit(here.tensor_enter(here.tensor_exit(y_GSO)))",
        TENSOR,
    ),
    Mutation(
        "heads_not_summed",
        f"{ATTENTION}/mha.py",
        "y_BLD = here.tensor_exit(y_BLD)",
        "y_BLD = y_BLD",
        TENSOR,
        refused=True,
    ),
    Mutation(
        "heads_summed_twice",
        f"{ATTENTION}/mha.py",
        "y_BLD = here.tensor_exit(y_BLD)",
        "y_BLD = here.tensor_exit(here.tensor_enter(here.tensor_exit(y_BLD)))",
        TENSOR,
    ),
    Mutation(
        "latents_not_entered",
        f"{ATTENTION}/mla.py",
        "latent_BMW, rope_BMU = here.tensor_enter((latent_BMW, rope_BMU))",
        "latent_BMW, rope_BMU = (latent_BMW, rope_BMU)",
        LATENTS,
        law=6,
    ),
    Mutation(
        "bias_of_every_tensor_shard",
        CORE,
        "return jnp.where(lax.axis_index(self.tensor) == 0, w, 0)",
        "return w",
        TENSOR,
    ),
    Mutation(
        "weights_gathered_own_part_first",
        CORE,
        "return lax.all_gather(w, self.fsdp, axis=w.ndim - len(letters) + letters.index(cut), tiled=True)",
        "axis = w.ndim - len(letters) + letters.index(cut)\n        "
        "whole = lax.all_gather(w, self.fsdp, axis=axis, tiled=True)\n        "
        "return jnp.roll(whole, -lax.axis_index(self.fsdp) * w.shape[axis], axis)",
        FSDP,
    ),
    # exchanges
    Mutation(
        "rows_over_the_wrong_axis",
        f"{EXCHANGES}/all_to_all.py",
        SENT,
        SENT.replace("shard.experts", "shard.tokens[:1]"),
    ),
    Mutation(
        "chunks_in_the_wrong_order",
        f"{EXCHANGES}/all_to_all.py",
        "jnp.concatenate(back, axis=1)",
        "jnp.concatenate(back[::-1], axis=1)",
        CHUNKS,
    ),
    Mutation(
        "slice_and_shard_swapped",
        f"{EXCHANGES}/two_level.py",
        "x_ECD.reshape(Y, X, e, C, D)",
        "x_ECD.reshape(X, Y, e, C, D).swapaxes(0, 1)",
        LEVELS,
    ),
    Mutation(
        "rows_stay_in_their_slice",
        f"{EXCHANGES}/two_level.py",
        "x_YXeCD = shard.all_to_all(x_YXeCD, outer, split=0, concat=0)",
        "x_YXeCD = x_YXeCD",
        LEVELS,
    ),
    Mutation(
        "sources_in_the_wrong_order",
        f"{EXCHANGES}/two_level.py",
        "y_eRO.reshape(e, Y, X, C, -1)",
        "y_eRO.reshape(e, X, Y, C, -1).swapaxes(1, 2)",
        LEVELS,
    ),
    Mutation(
        "wrong_from_three_slices_on",
        f"{EXCHANGES}/two_level.py",
        "x_YXeCD = shard.all_to_all(x_YXeCD, outer, split=0, concat=0)",
        "x_YXeCD = jnp.roll(shard.all_to_all(x_YXeCD, outer, split=0, concat=0)[::-1], 1, axis=0)",
        test=Pytest(
            "tests/components/test_exchanges_over_slices.py", "test_rows_reach_their_experts and TwoLevel and 3"
        ),
    ),
    Mutation(
        "offsets_swapped_on_the_way_back",
        CORE,
        "return Slices(sizes, destination, source)",
        "return Slices(sizes, source, destination)",
        RAGGED,
    ),
    Mutation(
        "last_row_of_a_slice_lost",
        CORE,
        "(offset_R < sizes[slice_R])",
        "(offset_R < jnp.maximum(sizes[slice_R] - 1, 1))",
        RAGGED,
    ),
    Mutation(
        "slices_by_source_first",
        f"{EXCHANGES}/ragged.py",
        "slice_offsets(sizes_XXe))",
        f"{OFFSETS.format('sizes_XXe.sum(2, keepdims=True)', 0)} + {OFFSETS.format('sizes_XXe', 2)})",
        RAGGED,
    ),
    # routing
    Mutation("capacity_of_a_shard", MOE, "S = cfg.group(B, L, training=key is not None)", "S = B * L", law=7),
    Mutation(
        "noise_alike_in_repeated_layers",
        TRANSFORMER,
        "jax.random.split(jax.random.fold_in(call.key, i), n)",
        "jnp.stack([jax.random.fold_in(call.key, i)] * n)",
        test=NOISE,
    ),
    Mutation(
        "noise_alike_in_layers_of_a_block",
        TRANSFORMER,
        "jax.random.fold_in(key, number)",
        "jax.random.fold_in(key, 0 * number)",
        test=NOISE,
    ),
    Mutation("noise_alike_in_microbatches", STEP, "jax.random.split(key, A)", "jnp.stack([key] * A)", test=NOISE),
    Mutation("noise_by_local_group", MOE, "here.batch_shard_index * G + jnp.arange(G)", "jnp.arange(G)"),
    Mutation(
        "groups_numbered_in_another_order",
        CORE,
        "return lax.axis_index(self.tokens) if self.tokens else 0",
        "return lax.axis_index(self.tokens[::-1]) if self.tokens else 0",
    ),
    Mutation(
        "router_sees_the_mean_of_its_group",
        "moe_jax/core/context.py",
        '        for i, transform in enumerate(self.gating):\n            if transform.on == "input":',
        "        x_GSD += 0.01 * x_GSD.mean(1, keepdims=True)\n"
        '        for i, transform in enumerate(self.gating):\n            if transform.on == "input":',
        law=4,
    ),
    Mutation(
        "first_choices_first",
        "moe_jax/core/routing.py",
        "_positions(expert_GSK.reshape(G, S * K), routing.E).reshape(G, S, K)",
        "_choice_major(expert_GSK, routing.E)",
        law=4,
    ),
    Mutation(
        "later_tokens_first",
        "moe_jax/core/routing.py",
        "rank_GR = jnp.arange(R, dtype=jnp.int32)[None] - first_GE[group_G1, sorted_GR]",
        "rank_GR = first_GE[group_G1, sorted_GR + 1] - 1 - jnp.arange(R)[None]",
        law=4,
    ),
    Mutation(
        "attention_sees_the_next_token",
        f"{ATTENTION}/sees.py",
        "seen_BLM &= distance_BLM >= 0",
        "seen_BLM &= distance_BLM >= -1",
        law=4,
    ),
    Mutation("attention_ignores_segments", f"{ATTENTION}/sees.py", DOCUMENTS, f"({DOCUMENTS}) | True", law=7),
    Mutation(
        "documents_see_those_before",
        f"{ATTENTION}/sees.py",
        "distance_BLM = sees.position_BL[:, :, None] - position_BM[:, None, :]",
        "seen_BLM = (sees.segment_BL > 0)[:, :, None] == (segment_BM > 0)[:, None, :]\n    "
        "place_L = jax.numpy.arange(seen_BLM.shape[1])\n    "
        "distance_BLM = place_L[None, :, None] - place_L[None, None, :]",
        ONE,
        law=11,
    ),
    Mutation(
        "documents_see_each_other",
        f"{ATTENTION}/sees.py",
        DOCUMENTS,
        "(sees.segment_BL > 0)[:, :, None] == (segment_BM > 0)[:, None, :]",
        law=4,
    ),
    Mutation(
        "padding_takes_a_slot",
        "moe_jax/core/routing.py",
        "jnp.where(real_GS1, expert_GSK, E)",
        "jnp.where(real_GS1 | True, expert_GSK, E)",
        law=7,
    ),
    Mutation(
        "weight_is_constant",
        "moe_jax/routers/switch.py",
        "take_experts(probs_GSE, expert_GSK), logits",
        "take_experts(probs_GSE, expert_GSK) / take_experts(probs_GSE, expert_GSK), logits",
        SWITCH,
        law=3,
    ),
    Mutation(
        "weight_without_gradient",
        "moe_jax/core/scores.py",
        "jnp.where(used_GSK, take_experts(logits_GSE, expert_GSK), -jnp.inf)",
        "jnp.where(used_GSK, take_experts(jax.lax.stop_gradient(logits_GSE), expert_GSK), -jnp.inf)",
        law=3,
    ),
    Mutation(
        "denominator_without_gradient",
        "moe_jax/core/scores.py",
        "return weight_GSK / jnp.where(total_GS1 > 0, total_GS1, 1)",
        "return weight_GSK / jax.lax.stop_gradient(jnp.where(total_GS1 > 0, total_GS1, 1))",
        ONE,
        law=3,
    ),
    Mutation(
        "overflowing_slot_used_again",
        SCATTER,
        "kept_GSK = real_GSK & (position_GSK < C)",
        "kept_GSK = real_GSK & (position_GSK <= C)",
        law=2,
    ),
    Mutation(
        "too_few_slots_for_everybody",
        SCATTER,
        "jnp.searchsorted(np.array(counts), needed)",
        "jnp.maximum(jnp.searchsorted(np.array(counts), needed) - 1, 0)",
        test=Pytest("tests/laws/test_layers.py", "test_one_model_every_mesh and dropless and d2e4"),
    ),
    Mutation(
        "rows_of_a_neighbour_in_a_gradient",
        "moe_jax/core/kernels/by_expert.py",
        "pull(rows.own(g_RO))",
        "pull(rows.read(g_RO))",
        RAGGED,
        law=2,
    ),
    Mutation(
        "rows_back_in_the_wrong_order",
        "moe_jax/core/rows.py",
        "return RowMap(row_GSK.reshape(-1, K), choice_R)",
        "return RowMap(choice_R[:choices].reshape(-1, K), choice_R)",
        RAGGED,
        law=2,
    ),
    # communication, of the same numbers
    Mutation(
        "tokens_gathered_besides",
        MOE,
        REAL,
        f"{REAL}\n    x_BLD = jax.lax.dynamic_slice_in_dim("
        "here.gather(x_BLD, here.tokens), here.batch_shard_index * B, B)",
        TWO,
        law=6,
    ),
    Mutation(
        "rows_travel_three_times",
        f"{EXCHANGES}/all_to_all.py",
        SENT,
        SENT.replace(
            "(part,",
            "(shard.all_to_all("
            "shard.all_to_all(part, shard.experts, split=0, concat=1), shard.experts, split=1, concat=0),",
        ),
        TWO,
        law=6,
    ),
    Mutation(
        "exchanged_rows_without_a_name",
        CORE,
        f"return checkpoint_name({NAMED}, COLLECTIVES)",
        f"return {NAMED}",
        KEPT,
        law=6,
    ),
    Mutation(
        "zero1_sums_everything_everywhere",
        CORE,
        SCATTERED,
        OWN_SLICE.format("lax.psum(g, more)"),
        (*COPIES, *ZERO),
        law=6,
    ),
)


def main() -> int:
    parser = argparse.ArgumentParser(description="Tries every mutation on the audit.")
    parser.add_argument("--only", default="", help="Names that contain this.")
    parser.add_argument("--jobs", type=int, default=2, help="Audits at a time.")
    parser.add_argument("--cache", type=pathlib.Path, help="A folder where compiled programs are kept.")
    given = parser.parse_args()
    chosen = [m for m in MUTATIONS if given.only in m.name]
    as_is = list(dict.fromkeys(m.catch for m in chosen if not m.refused))
    with tempfile.TemporaryDirectory() as kept:
        jobs = [check.job() for check in as_is] + [m.catch.job(m.mutant) for m in chosen]
        done = forks.run(jobs, given.jobs, given.cache or pathlib.Path(kept))
        print("| mutation | verdict | caught by | line | CPU s |\n|---|---|---|---|---:|", flush=True)
        caught = refused = bad = 0
        for check in as_is:
            outcome, seconds = check.judge(end := next(done)), end.seconds
            bad += outcome.verdict != "holds"
            name = " ".join(flag.removeprefix("--config.") for flag in getattr(check, "flags", ()))
            print(f"| none ({name}) | {outcome.verdict} | {check.name} | {outcome.line} | {seconds:.0f} |", flush=True)
        for mutation in chosen:
            outcome, seconds = mutation.catch.judge(end := next(done)), end.seconds
            right = outcome.verdict == ("refused" if mutation.refused else "broken")
            caught, refused = caught + (right and not mutation.refused), refused + (right and mutation.refused)
            bad += not right
            line = f"{outcome.verdict} | {mutation.catch.name} | {outcome.line} | {seconds:.0f}"
            print(f"| {mutation.name} | {line} |", flush=True)
    print(f"\n{caught} of {sum(not m.refused for m in chosen)} caught; {refused} refused before they run")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
