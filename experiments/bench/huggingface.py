"""An MoE layer of Hugging Face transformers, with these weights, in every installed implementation."""

import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from experiments import cli
from experiments.bench.measure import say
from experiments.bench.shapes import GiB, Shape

IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
ROOM = 4 * GiB  # for the copies of weights, one for every row, that batched_mm makes
Calls = tuple[Callable[[], Any], Callable[[], Any]]  # forward; forward with backward


def libraries() -> Any:
    """PyTorch; ValueError where it, or transformers, is not installed."""
    # Threads that spin while waiting take cores from JAX and from each other, and slow both down manyfold.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        import torch
        import transformers
    except ImportError as error:
        name = getattr(error, "name", None) or "torch"
        raise ValueError(
            f"{name} is not installed, which this comparison needs: pip install torch transformers"
        ) from None
    say(f"torch {torch.__version__}, transformers {transformers.__version__}")
    return torch


def peers(torch: Any, shape: Shape, params: dict[str, np.ndarray], x_BLD: np.ndarray) -> Iterator[tuple[str, Calls]]:
    """(name, calls) of every implementation that is installed, fits in memory, and runs."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    sizes = {"hidden_size": shape.D, "intermediate_size": shape.experts.F}
    sizes |= {"num_local_experts": shape.E, "num_experts_per_tok": shape.K}
    for name in IMPLEMENTATIONS:
        config = MixtralConfig(**sizes, hidden_act=shape.experts.activation, router_jitter_noise=0.0)
        config._experts_implementation = name
        block = MixtralSparseMoeBlock(config).to(torch.float32).train()
        fused = hasattr(block.experts, "gate_up_proj")
        if name != "eager" and not fused:  # before transformers 5 there is only a loop over experts
            return
        if name == "batched_mm" and (size := 12 * shape.T * shape.K * shape.D * shape.experts.F) > ROOM:
            say(f"{shape.name} batched_mm: left out, its copies of weights take {size / GiB:.0f} GiB")
            continue
        fill(torch, block, params, fused)
        calls = calls_of(torch, block, x_BLD)
        try:
            calls[1]()
        except (ImportError, RuntimeError, NotImplementedError, KeyError) as error:
            say(f"{shape.name} {name}: left out, it does not run here ({cli.one_line(error)[:120]})")
            continue
        yield name if fused else "loop over experts", calls


def fill(torch: Any, block: Any, params: dict[str, np.ndarray], fused: bool) -> None:
    """Copies our weights into theirs, whose matrices are transposed."""
    gate_EFD, up_EFD = (np.swapaxes(params[name], 1, 2) for name in ("gate_EDF", "up_EDF"))
    down_EDF = np.swapaxes(params["down_EFD"], 1, 2)
    pairs = [(block.gate.weight, params["router_gate_DE"].T)]
    if fused:
        pairs += [(block.experts.gate_up_proj, np.concatenate([gate_EFD, up_EFD], axis=1))]
        pairs += [(block.experts.down_proj, down_EDF)]
    else:
        for e, expert in enumerate(block.experts):
            pairs += [(expert.w1.weight, gate_EFD[e]), (expert.w3.weight, up_EFD[e]), (expert.w2.weight, down_EDF[e])]
    with torch.no_grad():
        for weight, value in pairs:
            if tuple(weight.shape) != value.shape:
                raise ValueError(f"A weight of the installed transformers is {tuple(weight.shape)}, not {value.shape}.")
            weight.copy_(torch.from_numpy(np.ascontiguousarray(value)))


def calls_of(torch: Any, block: Any, x_BLD: np.ndarray) -> Calls:
    """Forward, and forward with backward by all parameters and the tokens."""
    x = torch.from_numpy(np.array(x_BLD)).requires_grad_()

    def outputs() -> Any:
        made = block(x)
        return made[0] if isinstance(made, tuple) else made

    def forward() -> Any:
        with torch.no_grad():
            return outputs()

    def both() -> None:
        block.zero_grad(set_to_none=True)
        x.grad = None
        (outputs() ** 2).mean().backward()

    return forward, both
