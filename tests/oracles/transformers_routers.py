"""Golden values of the routers and auxiliary losses of Hugging Face transformers, kept in transformers_routers.json.

    python tests/oracles/transformers_routers.py

needs torch and transformers and writes the JSON beside itself; the tests read only the JSON. It was made with torch
2.13.0 (CPU) and transformers 5.24.0. Everything is float32, in eval mode, and rounded to 8 significant digits.

Inputs: x_TD (T tokens of D features), gate_DE (logits_TE = x_TD @ gate_DE), bias_E, logits2_TE (those of a second
layer) and mask_T (1: a token, 0: padding).

routers: each has its `class`, the `config` it was built with, `expert` and `weight`, both [T, K] in token order, a
token's experts by descending weight. `biased`: bias_E is the router's bias; otherwise it has none, or zeros. `logits`
[T, E] is there only where they are not logits_TE.

    mixtral                    softmax over all E, best K, renormalised to sum to 1
    qwen2_moe*, qwen3_moe*     the same; without norm_topk_prob not renormalised
    olmoe                      not renormalised
    deepseek_v3*               best K of sigmoid + bias; weights are the sigmoids without it, normalised, times
                               routed_scaling_factor. Of n_group groups only the topk_group of the largest sum of
                               their best two (with the bias) are chosen from.
    deepseek_v2_greedy         softmax over all E, best K, not renormalised, times routed_scaling_factor
    deepseek_v2_group_limited  the same in the topk_group groups of the largest maximum
    gpt_oss*                   best K logits (with the bias), softmax over these K
    switch*                    softmax over all E, best 1
    nllb_moe*                  softmax over all E, best 2, renormalised

`shape_GS`: the tokens came as G sequences of S. `capacity`: places per expert, for switch in every sequence, and
`kept` [T, K] says which choices found one. First come, first served, with `batch_prioritized_routing` the most
probable first; all first choices before all second ones. `expert` names the dropped too: `weight` is 0 there for
nllb_moe, and still the probability for switch. nllb_moe renormalises over the kept choices, unless
`normalize_router_prob_before_dropping`.

losses: each has its `function`, the number of `layers` (2: of logits_TE and logits2_TE), `masked` (by mask_T) and
`value`.

    mixtral_load_balance*  E * sum_e f_e * P_e over the tokens of all layers together; f counts K choices per token,
                           so it is K when balanced
    switch_load_balance*   E * sum_e f_e * P_e in every sequence, then their mean; 1 when balanced
    switch_router_z        mean of the squared logsumexp of the logits
"""

import json
import platform
from pathlib import Path

import torch
import transformers
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Config, DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Config, DeepseekV3TopkRouter
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssConfig, GptOssTopKRouter
from transformers.models.mixtral import modeling_mixtral as mixtral
from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeConfig, NllbMoeTop2Router
from transformers.models.olmoe.modeling_olmoe import OlmoeConfig, OlmoeTopKRouter
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeConfig, Qwen2MoeTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeConfig, Qwen3MoeTopKRouter
from transformers.models.switch_transformers import modeling_switch_transformers as switch

x_TD = torch.tensor(
    [
        [-1.71, 1.10, -0.07, 0.84],
        [-0.62, -0.71, -0.65, -0.41],
        [-0.37, -1.23, 1.25, 1.67],
        [1.78, -0.29, 1.26, 1.01],
        [0.62, 0.12, -0.87, 1.49],
        [-0.19, -0.28, 0.08, -1.49],
    ]
)
gate_DE = torch.tensor(
    [
        [-0.18, -0.67, 0.45, 0.04, 0.61, -0.75, -1.17, 0.75],
        [-0.04, -0.13, 1.02, -0.51, -1.06, 0.05, 0.76, -0.81],
        [0.47, 0.19, -0.40, 0.80, -0.47, -0.20, -1.06, 0.93],
        [-0.92, -0.39, 1.00, 0.86, 0.10, -0.97, -0.79, -1.08],
    ]
)
bias_E = torch.tensor([-0.36, 0.10, -0.36, 0.17, 0.37, -0.21, -0.04, 0.34])
logits2_TE = torch.tensor(
    [
        [0.31, -1.20, 1.74, 0.05, -0.66, 0.98, -1.91, 0.52],
        [1.12, 0.40, -0.83, 1.65, -0.27, -1.40, 0.76, 0.09],
        [-0.58, 0.87, 0.22, -1.03, 1.49, 0.61, -0.35, -1.77],
        [0.94, -0.46, 1.38, -0.12, 0.27, -1.55, 0.60, -0.89],
        [-1.25, 0.18, 0.79, 1.06, -0.71, 0.35, -0.04, 2.03],
        [0.43, 1.57, -0.98, -0.30, 0.83, 1.21, -0.15, 0.02],
    ]
)
mask_T = torch.tensor([1, 1, 0, 1, 1, 1])
logits_TE = torch.nn.functional.linear(x_TD, gate_DE.T)

T, D = x_TD.shape
E = gate_DE.shape[1]
ONE, TWO = (1, T), (2, T // 2)  # shape_GS

QWEN = {"hidden_size": D, "num_experts": E, "num_experts_per_tok": 2}
V3 = {"hidden_size": D, "n_routed_experts": E, "num_experts_per_tok": 2, "norm_topk_prob": True}
V3 |= {"routed_scaling_factor": 2.5}
V3_FOUR, V3_TWO, V3_ONE = (V3 | {"n_group": n, "topk_group": k} for n, k in ((4, 2), (2, 1), (1, 1)))
V2 = {"hidden_size": D, "num_attention_heads": 1, "n_routed_experts": E}
V2_GREEDY = V2 | {"num_experts_per_tok": 2, "topk_method": "greedy", "routed_scaling_factor": 1.0}
V2_LIMITED = V2 | {"num_experts_per_tok": 3, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}
V2_LIMITED |= {"routed_scaling_factor": 16.0}
LOCAL = {"hidden_size": D, "num_local_experts": E, "num_experts_per_tok": 2}
SWITCH = {"d_model": D, "num_experts": E}
NLLB = {"d_model": D, "num_experts": E, "second_expert_policy": "all"}
FRACTION = {"moe_eval_capacity_token_fraction": 0.15}  # one place per expert

TOP_K = {  # name: class of the router, of its configuration, the fields of that, whether bias_E is set
    "mixtral": (mixtral.MixtralTopKRouter, mixtral.MixtralConfig, LOCAL, False),
    "qwen2_moe": (Qwen2MoeTopKRouter, Qwen2MoeConfig, QWEN | {"norm_topk_prob": True}, False),
    "qwen2_moe_no_norm": (Qwen2MoeTopKRouter, Qwen2MoeConfig, QWEN | {"norm_topk_prob": False}, False),
    "qwen3_moe": (Qwen3MoeTopKRouter, Qwen3MoeConfig, QWEN | {"norm_topk_prob": True}, False),
    "qwen3_moe_no_norm": (Qwen3MoeTopKRouter, Qwen3MoeConfig, QWEN | {"norm_topk_prob": False}, False),
    "olmoe": (OlmoeTopKRouter, OlmoeConfig, QWEN | {"norm_topk_prob": False}, False),
    "deepseek_v3": (DeepseekV3TopkRouter, DeepseekV3Config, V3_FOUR, True),
    "deepseek_v3_no_bias": (DeepseekV3TopkRouter, DeepseekV3Config, V3_FOUR, False),
    "deepseek_v3_two_groups": (DeepseekV3TopkRouter, DeepseekV3Config, V3_TWO, True),
    "deepseek_v3_one_group": (DeepseekV3TopkRouter, DeepseekV3Config, V3_ONE, True),
    "deepseek_v3_one_group_no_bias": (DeepseekV3TopkRouter, DeepseekV3Config, V3_ONE, False),
    "deepseek_v2_greedy": (DeepseekV2TopkRouter, DeepseekV2Config, V2_GREEDY, False),
    "deepseek_v2_group_limited": (DeepseekV2TopkRouter, DeepseekV2Config, V2_LIMITED, False),
    "gpt_oss": (GptOssTopKRouter, GptOssConfig, LOCAL, False),
    "gpt_oss_bias": (GptOssTopKRouter, GptOssConfig, LOCAL, True),
}
TOP_1 = {  # name: shape_GS, places per expert and sequence
    "switch": (ONE, T),
    "switch_capacity_1": (ONE, 1),
    "switch_capacity_1_two_sequences": (TWO, 1),
}
TOP_2 = {  # name: the fields of the configuration
    "nllb_moe": NLLB | {"moe_eval_capacity_token_fraction": 1.0},
    "nllb_moe_capacity_1": NLLB | FRACTION,
    "nllb_moe_capacity_1_norm_before": NLLB | FRACTION | {"normalize_router_prob_before_dropping": True},
    "nllb_moe_capacity_1_prioritized": NLLB | FRACTION | {"batch_prioritized_routing": True},
}


def check_margins():
    """No selection may hang on a rounding: the best are clear of each other, and the K-th of the next."""
    scores = logits_TE.sigmoid()
    biased = scores + bias_E
    for values, K, least in (
        (logits_TE, 3, 0.05),
        (logits_TE + bias_E, 2, 0.05),
        (logits2_TE, 2, 0.05),
        (scores, 2, 0.01),
        (biased, 2, 0.01),
        (scores.view(T, 4, 2).sum(-1), 2, 0.01),  # groups
        (biased.view(T, 4, 2).sum(-1), 2, 0.01),
        (biased.view(T, 2, 4).topk(2).values.sum(-1), 1, 0.01),
        (logits_TE.view(T, 4, 2).amax(-1), 2, 0.05),
    ):
        best = values.sort(descending=True).values
        margin = (best[:, :K] - best[:, 1 : K + 1]).min().item()
        assert margin > least, f"the best {K} are only {margin} apart"


def entry(cls, config, logits, expert, weight, biased=False, **more):
    result = {"class": cls.__name__, "config": config, "biased": biased, "expert": expert, "weight": weight, **more}
    if not torch.allclose(logits, logits_TE, rtol=0, atol=1e-6):
        result["logits"] = logits
    return result


@torch.no_grad()
def top_k(cls, Config, config, biased):
    router = cls(Config(**config)).eval()
    router.weight.copy_(gate_DE.T)
    if biased:
        (router.bias if hasattr(router, "bias") else router.e_score_correction_bias).copy_(bias_E)
    logits, weight, expert = router(x_TD)
    order = weight.argsort(-1, descending=True)
    return entry(cls, config, logits, expert.gather(1, order), weight.gather(1, order), biased)


@torch.no_grad()
def top_1(shape_GS, capacity):
    def run(capacity):
        router = switch.SwitchTransformersTop1Router(
            switch.SwitchTransformersConfig(**SWITCH, expert_capacity=capacity)
        ).eval()
        router.classifier.weight.copy_(gate_DE.T)
        return router(x_TD.reshape(*shape_GS, D))

    one_hot, _, _ = run(T)
    kept, weight, logits = run(capacity)
    return entry(
        switch.SwitchTransformersTop1Router,
        {**SWITCH, "expert_capacity": capacity},
        logits.reshape(T, E),
        one_hot.argmax(-1).reshape(T, 1),
        weight.reshape(T, 1),
        shape_GS=shape_GS,
        capacity=capacity,
        kept=kept.sum(-1).reshape(T, 1).bool(),
    )


@torch.no_grad()
def top_2(config):
    def run(config):
        router = NllbMoeTop2Router(NllbMoeConfig(**config)).eval()
        router.classifier.weight.copy_(gate_DE.T)
        _, combine, logits = router(x_TD)
        return combine, logits, router.expert_capacity

    everything, _, _ = run(config | {"moe_eval_capacity_token_fraction": 1.0})
    combine, logits, capacity = run(config)
    expert = everything.topk(2).indices
    weight = combine.gather(1, expert)
    return entry(NllbMoeTop2Router, config, logits, expert, weight, capacity=capacity, kept=weight > 0)


def losses():
    result = {}
    for layers in (1, 2):
        for masked in (False, True):
            value = mixtral.load_balancing_loss_func(
                (logits_TE, logits2_TE)[:layers], E, 2, mask_T[None] if masked else None
            )
            name = "mixtral_load_balance" + "_two_layers" * (layers == 2) + "_masked" * masked
            result[name] = {"function": "mixtral.load_balancing_loss_func", "top_k": 2}
            result[name] |= {"layers": layers, "masked": masked, "value": value}
    for name, shape_GS in (("switch_load_balance", ONE), ("switch_load_balance_two_sequences", TWO)):
        logits = logits_TE.reshape(*shape_GS, E)
        value = switch.load_balancing_loss_func(logits.softmax(-1), logits.argmax(-1))
        result[name] = {"function": "switch_transformers.load_balancing_loss_func", "shape_GS": shape_GS}
        result[name] |= {"layers": 1, "masked": False, "value": value}
    value = switch.router_z_loss_func(logits_TE[None])
    result["switch_router_z"] = {"function": "switch_transformers.router_z_loss_func", "shape_GS": ONE}
    result["switch_router_z"] |= {"layers": 1, "masked": False, "value": value}
    return result


def plain(value):
    """Converts to JSON values, floats rounded to 8 significant digits."""
    if isinstance(value, torch.Tensor):
        return plain(value.tolist())
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return float(f"{value:.8g}") if isinstance(value, float) else value


def literal(tensor):
    """An input as it is written above: float32 as the nearest number of two decimals."""
    return [[round(v, 2) for v in row] for row in tensor.tolist()] if tensor.ndim == 2 else literal(tensor[None])[0]


def dump(value, indent=""):
    """JSON with all that fits on a line on one."""
    text = json.dumps(value)
    if len(indent + text) <= 110 or not isinstance(value, dict | list):
        return text
    inner = indent + "  "
    if isinstance(value, dict):
        rows, (left, right) = [f"{json.dumps(k)}: {dump(v, inner)}" for k, v in value.items()], "{}"
    else:
        rows, (left, right) = [dump(v, inner) for v in value], "[]"
    return f"{left}\n{inner}" + f",\n{inner}".join(rows) + f"\n{indent}{right}"


def main():
    check_margins()
    routers = {name: top_k(*row) for name, row in TOP_K.items()}
    routers |= {name: top_1(*row) for name, row in TOP_1.items()}
    routers |= {name: top_2(config) for name, config in TOP_2.items()}
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    result = {
        "made_with": {"python": platform.python_version(), **versions},
        "moe_layers": "T tokens, D features, E experts, K choices; logits_TE = x_TD @ gate_DE; float32",
        "x_TD": literal(x_TD),
        "gate_DE": literal(gate_DE),
        "bias_E": literal(bias_E),
        "logits2_TE": literal(logits2_TE),
        "mask_T": mask_T,
        "logits_TE": logits_TE,
        "routers": routers,
        "losses": losses(),
    }
    path = Path(__file__).with_suffix(".json")
    path.write_text(dump(plain(result)) + "\n")
    print(f"{path}: {len(routers)} routers, {len(result['losses'])} losses, {result['made_with']}")


if __name__ == "__main__":
    main()
