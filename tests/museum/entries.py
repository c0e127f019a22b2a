"""Public bugs as mutants: where they were told, what they are, the edit that plants them, and what catches it."""

import math
from typing import NamedTuple

from tests.museum.catch import Audit, Pytest
from tests.museum.mutant import Mutant


class Entry(NamedTuple):
    """A public bug. threads: "name #number" of issues and pull requests on GitHub,
    or "name log: title" of a commit. refused: it is to be refused before anything is computed."""

    threads: tuple[str, ...]
    essence: str
    mutant: Mutant
    catch: Audit | Pytest
    refused: bool = False


def on_mesh(dispatch: str = "", **sizes: int) -> tuple[str, ...]:
    """Flags for a mesh of these sizes, and as many devices; and for another dispatcher."""
    mesh = {"data": 1, "expert": 1, **sizes}
    flags = (f"--devices={math.prod(mesh.values())}", *(f"--config.mesh.{axis}={n}" for axis, n in mesh.items()))
    return (*flags, f"--config.model.moe.dispatch={dispatch}") if dispatch else flags


def layer_on_mesh(layer: str, mesh: str) -> Pytest:
    """The test of law 1 for a layer and a mesh of `tests/cases.py`."""
    return Pytest("tests/laws/test_layers.py", f"test_one_model_every_mesh and {layer} and {mesh} and drops")


LAYER = on_mesh()  # laws of a layer need no mesh
SMALL = "Einsum(capacity_factor=1.0)"  # compiles fastest
DATA, EXPERT, TENSOR = on_mesh(SMALL, data=2), on_mesh(SMALL, expert=2), on_mesh(SMALL, tensor=2)
DROPLESS = on_mesh("Scatter(capacity_factor=None)")
LONG = (*LAYER, "--config.data.L=1024")

SHARD, MOE, STEP, STATS = "moe_jax/core/shard.py", "moe_jax/moe.py", "moe_jax/step.py", "moe_jax/core/stats.py"
ROWS, ROUTING, SCORES = "moe_jax/core/rows.py", "moe_jax/core/routing.py", "moe_jax/core/scores.py"
TOP_K, LOSS_FREE, BALANCE = (
    f"moe_jax/{name}.py" for name in ("routers/top_k", "routers/loss_free", "losses/load_balance")
)
SCATTER, GLU, SEES = "moe_jax/dispatch/scatter.py", "moe_jax/experts/glu.py", "moe_jax/attention/sees.py"

GRADIENTS, CONTRACTS = "tests/laws/test_gradients.py", "tests/components/test_contracts.py"
LOSSES, KNOWN, GATING = (f"tests/components/test_{name}.py" for name in ("losses", "known_values", "gating"))
SHARDINGS, NNX, CHECKPOINT = (f"tests/components/test_{name}.py" for name in ("shardings", "nnx", "checkpoint"))
SLOPES = Pytest(GRADIENTS, "test_gradients_are_slopes_of_the_losses")
UPDATE = Pytest(GRADIENTS, "test_an_update_takes_all_gradients")
COUNTED = Audit(8, LAYER)
ON_EXPERTS, ON_TENSOR = layer_on_mesh("einsum", "d2e4"), layer_on_mesh("einsum", "f2e2t2")

REDUCED = "return lax.psum(g, tuple(a for a in self.tokens if a in left)) if left else g"
ENTERED = "return jax.tree.map(lambda a: _varying(a, self.tensor), x)"
LEFT = "return checkpoint_name(lax.psum(y, self.tensor), COLLECTIVES) if self.tensor else y"
WEIGHED = (
    "loss = sum((part.weight * part(total, state, cfg.router) for part in cfg.losses), jnp.zeros((), jnp.float32))"
)
EXITED = "y_GSO = here.tensor_exit(y_GSO)"
ROUTED = "routing = cfg.router(here.pvary(params.router), x_GSD, mask_GS, ctx)"
TOTALS = "total = here.sum(stats(routing, kept, B, ctx.task_GS, cfg.tasks))"
NATS = "here.sum((terms.nats_BL.sum(), "
APPLIED = "params = optax.apply_updates(state.params, updates)"
DRIFT = """
    alone = partial(jax.shard_map, in_specs=P(), out_specs=P(), check_vma=False)
    drift = alone(lambda w: w + 1e-6 * jax.lax.axis_index("data"))
    params = jax.tree.map_with_path(lambda p, w: drift(w) if str(p[-1].key).startswith("router") else w, params)"""
SLOT_WEIGHT = "dweight_TK = gather_rows(dweight_R, maps.row_TK.reshape(-1)).reshape(weight_TK.shape)"

MUSEUM = (
    # ---- gradients on meshes
    Entry(
        ("Megatron-LM #5956",),
        "Gradients of experts are too large by the number of expert shards.",
        Mutant(
            "expert_gradients_times_shards",
            SHARD,
            "left -= set(after)",
            "g, left = g * self.axis_size(tuple(a for a in after if a in left)), left - set(after)",
        ),
        Audit(1, EXPERT),
    ),
    Entry(
        ("pytorch #160285",),
        "Behind the exchange of expert parallelism every gradient is exactly twice as large; outputs are right.",
        Mutant(
            "gradients_doubled_by_the_exchange",
            "moe_jax/exchanges/all_to_all.py",
            "back = [shard.all_to_all(part, shard.experts, split=1, concat=0) for part in done]",
            "import jax\n        twice = lambda y: 2 * y - jax.lax.stop_gradient(y)  # noqa: E731\n        "
            "back = [twice(shard.all_to_all(part, shard.experts, split=1, concat=0)) for part in done]",
        ),
        ON_EXPERTS,
    ),
    Entry(
        ("transformers #48205",),
        "With expert parallelism, parameters that are no experts get the gradient of one shard's tokens.",
        Mutant(
            "other_gradients_of_one_shard",
            SHARD,
            REDUCED,
            REDUCED.replace("psum(g,", "psum(jnp.where(self.batch_shard_index == 0, g, 0),"),
        ),
        Audit(1, EXPERT),
    ),
    Entry(
        ("transformers #48205",),
        "Rows that nobody wrote are not zero: 0 * NaN reaches the experts' gradients.",
        Mutant(
            "rows_nobody_wrote",
            ROWS,
            "there = lambda maps, x_TD: gather_rows(x_TD, maps.token_R)",
            'there = lambda maps, x_TD: x_TD.at[maps.token_R].get(mode="fill", fill_value=jnp.nan)',
        ),
        layer_on_mesh("scatter", "d2e4"),
    ),
    Entry(
        ("transformers #48687", "transformers #48689"),
        "The router gets a gradient from slots that it did not use, hidden in the output by weight 0.",
        Mutant(
            "router_gradient_of_unused_slots",
            ROWS,
            SLOT_WEIGHT,
            SLOT_WEIGHT.replace(
                "gather_rows(dweight_R, maps.row_TK.reshape(-1))", "dweight_R[maps.row_TK.reshape(-1) % len(dweight_R)]"
            ),
        ),
        Audit(2, LAYER),
    ),
    Entry(
        ("Automodel #2995", "torchtitan #2416", "torchtitan #2387"),
        "The router's gradient is that of one shard's tokens: a reduction is missing at the layer's border.",
        Mutant(
            "router_gradient_of_one_shard",
            MOE,
            ROUTED,
            ROUTED.replace(
                "here.pvary(params.router)",
                "jax.tree.map(lambda w: jnp.where(here.batch_shard_index == 0, w, jax.lax.stop_gradient(w)), "
                "here.pvary(params.router))",
            ),
        ),
        ON_EXPERTS,
    ),
    Entry(
        ("torchtitan #4054",),
        "Gradients below the experts are not summed over the tensor-parallel shards.",
        Mutant(
            "tensor_gradients_of_one_shard",
            SHARD,
            ENTERED,
            "if not self.tensor:\n            return x\n        mine = lax.axis_index(self.tensor) == 0\n        "
            "return jax.tree.map(lambda a: jnp.where(mine, b := _varying(a, self.tensor), lax.stop_gradient(b)), x)",
        ),
        ON_TENSOR,
    ),
    Entry(
        ("Megatron-LM #1628", "Megatron-LM #1622"),
        "Experts over tensor without expert parallelism: gradients are reduced over the wrong group, and too large.",
        Mutant(
            "gradients_times_tensor_shards",
            SHARD,
            ENTERED,
            "return jax.tree.map(lambda a: (b := _varying(a, self.tensor)) * (n := self.axis_size(self.tensor)) "
            "- (n - 1) * lax.stop_gradient(b), x)",
        ),
        ON_TENSOR,
    ),
    Entry(
        ("marin #8077",),
        "The way back of a ragged all-to-all has the offsets of the way there: gradients go to other rows.",
        Mutant(
            "ragged_gradients_misdirected",
            SHARD,
            "lambda slices, g: sent(slices.reverse(), g, n)",
            "lambda slices, g: sent(slices, g, n)",
        ),
        layer_on_mesh("sort", "d2e4"),
    ),
    Entry(
        ("Megatron-LM #619", "Megatron-LM #599"),
        "Copies of the router drift apart, since they are updated without synchronisation.",
        Mutant("router_copies_drift", STEP, APPLIED, APPLIED + DRIFT),
        Audit(5, DATA),
    ),
    # ---- gradients on any number of devices
    Entry(
        ("marin #8339",),
        "The gradient of an expert's weights has only the rows of its last block.",
        Mutant(
            "weight_gradient_of_the_last_block",
            "moe_jax/core/kernels/by_expert.py",
            "d[e] + new if rows.accumulates else new",
            "new",
        ),
        Audit(2, DROPLESS),
    ),
    Entry(
        ("maxtext log: Fix ring ragged unsort gradient",),
        "The gradient of a token is that of its first row, not of all its rows.",
        Mutant(
            "gradient_of_the_first_row",
            ROWS,
            "return _sum(lambda k: gather_rows(g_RD, maps.row_TK[:, k]), maps.row_TK.shape[1]).astype(g_RD.dtype)",
            "return _sum(lambda k: gather_rows(g_RD, maps.row_TK[:, k]), 1).astype(g_RD.dtype)",
        ),
        Audit(2, LAYER),
    ),
    Entry(
        ("Automodel #1408", "Automodel #1412"),
        "The auxiliary loss is reported, and has no gradient.",
        Mutant(
            "auxiliary_loss_without_gradient",
            MOE,
            "return y_GSO.reshape(B, L, -1), chosen, recorded, (loss, total)",
            "return y_GSO.reshape(B, L, -1), chosen, recorded, (jax.lax.stop_gradient(loss), total)",
        ),
        SLOPES,
    ),
    Entry(
        ("unsloth #6936", "unsloth-zoo #606"),
        "The experts are frozen, without a word.",
        Mutant(
            "frozen_experts",
            MOE,
            'experts = gather_params(here, here.pvary(params.experts), x_GSD.dtype, "E")',
            'experts = jax.lax.stop_gradient(gather_params(here, here.pvary(params.experts), x_GSD.dtype, "E"))',
        ),
        SLOPES,
    ),
    Entry(
        ("unsloth #11014",),
        "A matrix of every gated expert is never trained.",
        Mutant(
            "gate_of_experts_untrained",
            GLU,
            "gate, up = (groups.matmul(x, params[name]) for name in",
            'params = {**params, "gate_EDF": __import__("jax").lax.stop_gradient(params["gate_EDF"])}\n        '
            "gate, up = (groups.matmul(x, params[name]) for name in",
        ),
        SLOPES,
    ),
    Entry(
        ("Megatron-LM #5916",),
        "The norm of the gradients leaves out the experts.",
        Mutant(
            "norm_without_experts",
            STEP,
            "grad_norm = optax.global_norm(grads)",
            "grad_norm = optax.global_norm(jax.tree.map_with_path("
            'lambda p, g: g * ("_E" not in str(p[-1].key)), grads))',
        ),
        UPDATE,
    ),
    Entry(
        ("Megatron-LM #5916",),
        "Clipping is too weak: the norm that it goes by leaves out the experts.",
        Mutant(
            "clip_without_experts",
            "moe_jax/optim.py",
            "optax.clip_by_global_norm(self.clip)",
            "optax.masked(optax.clip_by_global_norm(self.clip), lambda tree: "
            'jax.tree.map_with_path(lambda p, _: "_E" not in str(p[-1].key), tree))',
        ),
        UPDATE,
    ),
    Entry(
        ("Automodel #2995",),
        "An expert without tokens is left out of the update: no decay, no step of its moments.",
        Mutant(
            "idle_experts_not_updated",
            STEP,
            APPLIED,
            "updates = jax.tree.map(lambda u, g: jnp.where(g == 0, 0, u), updates, grads)\n    " + APPLIED,
        ),
        UPDATE,
    ),
    # ---- losses
    Entry(
        ("transformers #24725",),
        "The loss is a mean of the shards' means, not over all targets.",
        Mutant(
            "loss_mean_of_means",
            STEP,
            NATS,
            NATS.replace(
                "sum(),",
                "sum() * targets / jnp.maximum(objective.targets(microbatch).sum(), 1) / here.axis_size(here.tokens),",
            ),
        ),
        Audit(1, DATA),
    ),
    Entry(
        ("gradient-garden #113",),
        "Accumulated gradients are scaled by the number of microbatches.",
        Mutant(
            "loss_scaled_by_microbatches",
            STEP,
            "add = partial(jax.tree.map, jnp.add)",
            "add = partial(jax.tree.map, lambda a, b: a + b / len(keys_A))",
        ),
        Pytest("tests/laws/test_training_step.py", "test_pieces_add_up"),
    ),
    Entry(
        ("Megatron-LM #5047",),
        "The strength of auxiliary losses depends on the number of tensor-parallel shards.",
        Mutant("auxiliary_loss_by_tensor_size", MOE, WEIGHED, f"{WEIGHED} * here.axis_size(here.tensor)"),
        ON_TENSOR,
    ),
    Entry(
        ("Megatron-LM #1498",),
        "The balance is that of each shard's tokens, not of the global batch.",
        Mutant(
            "auxiliary_loss_per_shard",
            MOE,
            f"{TOTALS}\n    {WEIGHED}",
            f"own = stats(routing, kept, B, ctx.task_GS, cfg.tasks)\n    total = here.sum(own)\n    "
            f"{WEIGHED.replace('part(total', 'part(own')}\n    loss = here.sum(loss) / here.axis_size(here.tokens)",
        ),
        ON_EXPERTS,
    ),
    Entry(
        ("Megatron-LM #3768", "Megatron-LM #3672"),
        "The z-loss is a sum over tokens where a mean is meant.",
        Mutant(
            "z_loss_summed",
            "moe_jax/losses/router_z.py",
            "return ratio(s.z_squared, s.tokens)",
            "return s.z_squared + 0 * ratio(s.z_squared, s.tokens)",
        ),
        Pytest(LOSSES, "test_losses_equal_their_formulas and RouterZ"),
    ),
    Entry(
        ("Megatron-LM #5798",),
        "The loss by sequence depends on the number of sequences of a batch.",
        Mutant(
            "sequence_loss_by_batch_size",
            BALANCE,
            'ratio(s.group_balance if self.scope == "group" else s.sequence_balance, s.tokens)',
            'ratio(s.group_balance, s.tokens) if self.scope == "group" else s.sequence_balance / 16',
        ),
        Pytest(LOSSES, "test_losses_equal_their_formulas and sequence"),
    ),
    Entry(
        ("Megatron-LM #5996",),
        "The loss by sequence is taken over other tokens than those of a sequence.",
        Mutant(
            "sequences_cut_wrongly",
            STATS,
            "sequence_balance=_balance(*(a.reshape(B, -1, a.shape[-1]) for a in",
            "sequence_balance=_balance(*(a.reshape(-1, B, a.shape[-1]).swapaxes(0, 1) for a in",
        ),
        Pytest(LOSSES, "test_losses_equal_their_formulas and sequence"),
    ),
    Entry(
        ("Megatron-LM #6748",),
        "The mean over layers of the auxiliary loss is divided by another number than that of the MoE layers.",
        Mutant(
            "auxiliary_loss_over_all_layers",
            "moe_jax/models/transformer.py",
            'loss_N.sum() if cfg.aux_over_layers == "sum" else loss_N.mean()',
            'loss_N.sum() if cfg.aux_over_layers == "sum" else loss_N.sum() / (cfg.N + 1)',
        ),
        COUNTED,
    ),
    Entry(
        ("Megatron-LM #7213", "Megatron-LM #7197"),
        "The loss of accumulated microbatches is normalised as if all had as many tokens.",
        Mutant(
            "microbatches_of_equal_size",
            "moe_jax/models/transformer.py",
            "aux.loss * ratio(aux.stats.tokens, tokens_N)",
            "aux.loss / jnp.round(ratio(tokens_N, aux.stats.tokens))",
        ),
        Pytest(LOSSES, "test_microbatches_are_weighted_layer_by_layer"),
    ),
    Entry(
        ("transformers #45120", "transformers #45131"),
        "The balancing loss sees a softmax of the softmax of the logits.",
        Mutant(
            "softmax_of_softmax",
            TOP_K,
            "weight_GSK, logits_GSE, normalize_weights(score_GSE), mask_GS)",
            'weight_GSK, logits_GSE, SCORES["softmax"](score_GSE), mask_GS)',
        ),
        Pytest(CONTRACTS, "test_router_equals_oracle and TopK and softmax"),
    ),
    Entry(
        ("transformers #44242", "transformers #44586", "trl #6003"),
        "The auxiliary loss is off, silently, unless details are asked for.",
        Mutant("auxiliary_loss_off", MOE, WEIGHED, f'{WEIGHED} * ("logits" in record)'),
        COUNTED,
    ),
    Entry(
        ("Megatron-LM #1652",),
        "The auxiliary loss, a mean already, is divided by the number of tokens a second time.",
        Mutant("auxiliary_loss_by_tokens_again", MOE, WEIGHED, f"{WEIGHED} / jnp.maximum(total.tokens, 1)"),
        COUNTED,
    ),
    Entry(
        ("marin #3124",),
        "The balancing loss has probabilities in place of choices, and looks fine while routing collapses.",
        Mutant(
            "balance_of_probabilities",
            BALANCE,
            "counts_E = s.top1_E if convention.first else s.choices_E",
            "counts_E = s.probs_E if convention.first else s.probs_E",
        ),
        Pytest(LOSSES, "test_losses_equal_their_formulas and LoadBalance and batch"),
    ),
    Entry(
        ("torchtitan #4594", "transformers #28505", "Megatron-LM #2121"),
        "Padding counts in the auxiliary losses.",
        Mutant(
            "padding_in_losses",
            STATS,
            "mask_GS1 = routing.mask_GS[..., None].astype(jnp.float32)",
            "mask_GS1 = jnp.ones_like(routing.mask_GS[..., None], jnp.float32)",
        ),
        COUNTED,
    ),
    # ---- loads and biases
    Entry(
        ("Megatron-LM #6114",),
        "Padding counts in the loads that move the balancing biases.",
        Mutant(
            "padding_in_loads",
            ROUTING,
            "jnp.where(real_GS1, expert_GSK, E)",
            "jnp.where(real_GS1 | True, expert_GSK, E)",
        ),
        COUNTED,
    ),
    Entry(
        ("torchtitan #4154",),
        "The loads that move the balancing biases are those of one shard.",
        Mutant(
            "loads_of_one_shard",
            MOE,
            TOTALS,
            "total = here.sum(jax.tree.map(lambda a: jnp.where(here.batch_shard_index == 0, a, 0), "
            "stats(routing, kept, B, ctx.task_GS, cfg.tasks)))",
        ),
        ON_EXPERTS,
    ),
    Entry(
        ("Megatron-LM #7081",),
        "Counts of tokens are kept in bfloat16, which rounds them above 256.",
        Mutant(
            "counts_in_bfloat16",
            STATS,
            "choices_E=assignments_GSE.sum((0, 1)),",
            "choices_E=assignments_GSE.sum((0, 1)).astype(jnp.bfloat16).astype(jnp.float32),",
        ),
        Audit(8, LONG),
    ),
    # ---- routers
    Entry(
        ("maxtext log: Fix double application of per_expert_scale in Gemma 4",),
        "A scale of the combine weights is applied twice.",
        Mutant(
            "scale_twice",
            LOSS_FREE,
            "weight_GSK = self.scale * (normalize_weights",
            "weight_GSK = self.scale**2 * (normalize_weights",
        ),
        Pytest(CONTRACTS, "test_router_equals_oracle and LossFree"),
    ),
    Entry(
        ("torchtitan #1448",),
        "The chosen sigmoid scores are not normalised.",
        Mutant(
            "weights_not_normalised",
            LOSS_FREE,
            "(normalize_weights(weight_GSK) if self.normalize else weight_GSK)",
            "weight_GSK",
        ),
        Pytest(CONTRACTS, "test_router_equals_oracle and LossFree"),
    ),
    Entry(
        ("vLLM-metax #284", "PaddleFormers #3452"),
        "Combine weights contain the balancing bias, which is for the selection only.",
        Mutant(
            "bias_in_weights",
            LOSS_FREE,
            "weight_GSK = take_experts(score_GSE, expert_GSK)",
            "weight_GSK = take_experts(biased_GSE, expert_GSK)",
        ),
        Pytest(CONTRACTS, "test_router_equals_oracle and LossFree"),
    ),
    Entry(
        ("sglang #35160",),
        "Without normalisation, raw logits are the combine weights.",
        Mutant(
            "logits_as_weights",
            TOP_K,
            "weight_GSK = take_experts(score_GSE, expert_GSK)",
            "weight_GSK = take_experts(score_GSE if self.normalize else logits_GSE, expert_GSK)",
        ),
        Pytest(CONTRACTS, "test_router_equals_oracle and TopK"),
    ),
    Entry(
        ("megablocks #87",),
        "Combine weights are normalised over the tokens, not over a token's experts.",
        Mutant(
            "normalised_over_tokens",
            SCORES,
            "total_GS1 = weight_GSK.sum(-1, keepdims=True)",
            "total_GS1 = weight_GSK.sum(-2, keepdims=True)",
        ),
        Audit(4, LAYER),
    ),
    Entry(
        ("transformers #33969",),
        "Noise that is meant for the router reaches the experts.",
        Mutant(
            "noise_reaches_experts",
            MOE,
            "inner_GSD = here.tensor_enter(x_GSD)",
            "inner_GSD = here.tensor_enter(ctx.input(x_GSD))",
        ),
        Pytest(GATING, "test_experts_see_clean_tokens"),
    ),
    Entry(
        ("MoCE-IR #19", "E-SAM #6"),
        "Routing noise is drawn in evaluation too.",
        Mutant(
            "noise_in_evaluation",
            "moe_jax/gating/noise.py",
            "        if keys_G is None:\n            return a\n",
            "        if keys_G is None:\n            keys_G = jax.random.split(jax.random.key(0), len(a))\n",
        ),
        Pytest(GATING, "test_noise_has_its_distribution_and_differs_everywhere and Noise"),
    ),
    Entry(
        ("Megatron-LM #815",),
        "The drop policy by probability is not what its name says.",
        Mutant(
            "improbable_tokens_first",
            ROUTING,
            "jnp.argsort(-routing.weight_GSK.max(-1), axis=1, stable=True)",
            "jnp.argsort(routing.weight_GSK.max(-1), axis=1, stable=True)",
        ),
        Pytest(KNOWN, "test_slots_of_vmoe"),
    ),
    # ---- outputs
    Entry(
        ("tpu-inference #2248",),
        "A sum over shards adds outputs of different tokens.",
        Mutant("sum_of_different_tokens", MOE, EXITED, "y_GSO = here.sum(here.tensor_exit(y_GSO))"),
        ON_EXPERTS,
    ),
    Entry(
        ("tpu-inference #1625",),
        "The sum over the shards of hidden units is missing.",
        Mutant("all_reduce_missing", SHARD, LEFT, "return y"),
        Audit(1, TENSOR),
        refused=True,
    ),
    Entry(
        ("vllm #47528",),
        "Outputs are wrong under tensor parallelism, and right under data and expert parallelism.",
        Mutant("tensor_shards_averaged", SHARD, LEFT, LEFT.replace("lax.psum", "lax.pmean")),
        ON_TENSOR,
    ),
    Entry(
        ("torchtitan #4245",),
        "The experts' bias is added by every tensor-parallel shard.",
        Mutant(
            "bias_times_tensor_shards",
            SHARD,
            "return jnp.where(lax.axis_index(self.tensor) == 0, w, 0)",
            "return w",
        ),
        layer_on_mesh("scatter", "f2e2t2"),
    ),
    Entry(
        ("vllm #53411",),
        "One back-end of the experts' computation, the default, ignores the combine weights.",
        Mutant(
            "backend_without_weights",
            SCATTER,
            "return rows.weighted_sum(y_RO, routing.weight_GSK, row_map)",
            "return rows.weighted_sum(y_RO, 0 * routing.weight_GSK + 0.5, row_map)",
        ),
        Audit(2, LAYER),
    ),
    # ---- documents
    Entry(
        ("transformers #46634", "axolotl #1375"),
        "Tokens attend to the documents before theirs in a packed sequence.",
        Mutant(
            "packed_documents_attend",
            SEES,
            "distance_BLM = sees.position_BL[:, :, None] - position_BM[:, None, :]",
            "seen_BLM = (sees.segment_BL > 0)[:, :, None] == (segment_BM > 0)[:, None, :]\n    "
            "place_L = jax.numpy.arange(seen_BLM.shape[1])\n    "
            "distance_BLM = (place_L[None, :, None] - place_L[None, None, :])",
        ),
        Audit(11, LAYER),
    ),
    Entry(
        ("nanoVLM #201", "LlamaFactory #7318"),
        "Positions of a packed document go on from those of the document before.",
        Mutant(
            "positions_go_on",
            "moe_jax/data/windows.py",
            "return place_L - np.maximum.accumulate(np.where(starts_BL, place_L, 0), axis=1)",
            "return place_L - 0 * np.maximum.accumulate(np.where(starts_BL, place_L, 0), axis=1)",
        ),
        Pytest("tests/components/test_data.py", "test_a_batch_by_hand"),
    ),
    # ---- shardings, saves, other ways in
    Entry(
        ("maxtext #4005",),
        "The expert axis is missing from the rule of the batch: the same numbers, and several times the work.",
        Mutant("batch_not_over_experts", SHARD, "TOKEN_AXES = AXES[:-1]", 'TOKEN_AXES = ("slice", "data", "fsdp")'),
        Pytest(SHARDINGS, "test_the_batch_is_over_all_axes_of_tokens"),
    ),
    Entry(
        ("maxtext log: DeepSeek scan-axis sharding corruption",),
        "The axis of scanned layers shifts all shardings by one.",
        Mutant(
            "scanned_axis_sharded",
            "moe_jax/core/dims.py",
            "return P(*[None] * (0 if rank is None else rank - len(dims)), *(entry or None for entry in axes))",
            "return P(*(entry or None for entry in axes))",
        ),
        Pytest("tests/programs/test_audit_experiment.py", "test_what_a_device_holds"),
    ),
    Entry(
        ("maxtext log: Fix NNX MTP zero-loss",),
        "An auxiliary loss is 0 in the NNX module, and right in the Linen one.",
        Mutant(
            "no_loss_under_nnx",
            "moe_jax/nnx.py",
            "return moe.apply(self.cfg, params, x_BLD, mask_BL, key, state, ids, record)",
            "y, aux = moe.apply(self.cfg, params, x_BLD, mask_BL, key, state, ids, record)\n        "
            "return y, aux._replace(loss=0 * aux.loss)",
        ),
        Pytest(NNX, "test_nnx_is_linen and plain and None"),
    ),
    Entry(
        ("tpu-inference #3041",),
        "Expert parallelism is off on the NNX path.",
        Mutant(
            "no_expert_parallelism_under_nnx",
            "moe_jax/nnx.py",
            "nnx.Param(draw(rngs.params(), name, sizes, moe.initializer(name, scale), exchange))",
            "nnx.Param((jax := __import__('jax')).device_put("
            "draw(rngs.params(), name, sizes, moe.initializer(name, scale), exchange), jax.devices()[0]))",
        ),
        Pytest(SHARDINGS, "test_new_parameters_of_nnx_are_sharded"),
    ),
    Entry(
        ("AReaL #1468",),
        "The optimizer's moments are lost when a run goes on, in silence.",
        Mutant(
            "moments_lost",
            "moe_jax/checkpoint.py",
            "state = jax.tree.unflatten(treedef, [found[name] for name in wanted])",
            'state = jax.tree.unflatten(treedef, [found[name] * ("mu" not in name.split("/")) for name in wanted])',
        ),
        Pytest(CHECKPOINT, "test_a_state_saved_on_one_mesh_is_restored_on_another and shape3"),
    ),
)
