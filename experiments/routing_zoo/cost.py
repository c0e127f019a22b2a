"""Times every router, alone and in a layer, against TopK(K=2).

    python -m experiments.routing_zoo.cost
    python -m experiments.routing_zoo.cost --nolayer

Times the forward and backward pass of every router (its decision and its statistics) alone on one device, and of a
whole layer with it, against those of TopK(K=2), which run in turn with them. Prints a Markdown table.
"""

import dataclasses
import inspect
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments import cli
from experiments.routing_zoo.present import lines
from moe_jax.core.context import Context, Ids
from moe_jax.core.routing import SlotChoice, SoftSlots, TokenChoice
from moe_jax.core.stats import stats
from moe_jax.core.traits import traits
from moe_jax.dispatch import Einsum, Gather, Scatter
from moe_jax.experts import MLP
from moe_jax.losses import LoadBalance
from moe_jax.moe import MoE, MoEConfig
from moe_jax.routers import ROUTERS, Hash, Hierarchical, MixtureOfDepths, SoftMoE, TopK
from moe_jax.xla import compiler_options

QUICK = cli.flag(flags.DEFINE_bool, "quick", False, "Few tokens, few experts, no layer: a smoke test.")
LAYER = flags.DEFINE_bool("layer", True, "Also time whole layers of 8 experts.")
JSON = cli.as_json()

REFERENCE = TopK(K=2)
DISPATCH = {TokenChoice: Scatter(1.25), SlotChoice: Gather(), SoftSlots: Einsum(None)}
TASKS = 8
PATIENCE = 10.0  # seconds


class Size(NamedTuple):
    """T tokens in groups of S, of width D; experts of width F."""

    T: int
    S: int
    D: int
    F: int
    experts: tuple[int, ...]
    repeats: int


FULL = Size(T=4096, S=512, D=512, F=1024, experts=(8, 64), repeats=15)
SMALL = Size(T=64, S=32, D=8, F=8, experts=(8,), repeats=2)


def main() -> None:
    size, layer, file = SMALL if QUICK.value else FULL, LAYER.value and not QUICK.value, cli.file("json", JSON.value)
    with jax.default_device(jax.devices()[0]):
        rows = table(size, layer)
    print(lines(heads(size, layer), rows, left=(0, 1, 2)), end="")
    cli.write_json(file, [dict(zip(heads(size, layer), row, strict=True)) for row in rows])


def heads(size: Size, layer: bool) -> list[str]:
    routing = [f"routing, E={E}" for E in size.experts]
    return ["router", "file", "paper", *routing, *([f"layer, E={size.experts[0]}"] if layer else [])]


def table(size: Size, layer: bool) -> list[list[str]]:
    """A row for each registered router: its times over the reference's."""
    references = {E: routing_pass(REFERENCE, E, size) for E in size.experts}
    reference_pass = layer_pass(REFERENCE, size.experts[0], size) if layer else None
    found = []
    for number, cls in enumerate(ROUTERS, 1):
        ratios = []
        for E, reference in references.items():
            ratios.append(compare(routing_pass(instance(cls, E, size), E, size), reference, size.repeats))
        if reference_pass:
            E = size.experts[0]
            ratios.append(
                compare(layer_pass(instance(cls, E, size), E, size), reference_pass, max(3, size.repeats // 5))
            )
        router = instance(cls, size.experts[0], size)
        found.append([f"`{words(router)}`", file_of(cls), paper_of(cls), *(f"{ratio:.2f}" for ratio in ratios)])
        print(f"[{number}/{len(ROUTERS)}] {words(router)}: {', '.join(found[-1][3:])}", file=sys.stderr, flush=True)
    return found


def instance(cls: type, E: int, size: Size) -> Any:
    """A router with K=2 where possible; Soft MoE with as many slots as tokens."""
    if cls is SoftMoE:
        return SoftMoE(C=max(1, size.S // E))
    if cls is Hierarchical:
        return Hierarchical(M=4, outer=2, inner=1)
    return Hash(K=2) if cls is Hash else cls()


def words(router: Any) -> str:
    """A router with its K and its non-default fields."""
    shown = [f for f in dataclasses.fields(router) if f.name == "K" or getattr(router, f.name) != f.default]
    return f"{type(router).__name__}({', '.join(f'{f.name}={getattr(router, f.name)!r}' for f in shown)})"


def file_of(cls: type) -> str:
    return f"`routers/{Path(inspect.getfile(cls)).name}`"


def paper_of(cls: type) -> str:
    """The first paper that a docstring names."""
    found = re.search(r"arXiv:(\d{4}\.\d{4,5})", cls.__doc__ or "")
    return f"[{found[1]}](https://arxiv.org/abs/{found[1]})" if found else "-"


# ---------------------------------------------------------------- timed functions


def layer_of(router: Any, E: int, size: Size) -> MoEConfig:
    """A layer with this router; of one expert where the router allows only one."""
    dispatch = DISPATCH[traits(router).routing]
    E = 1 if isinstance(router, MixtureOfDepths) else E
    return MoEConfig(E=E, router=router, experts=MLP(F=size.F), dispatch=dispatch, S=size.S)


def inputs(cfg: MoEConfig, size: Size) -> tuple[dict[str, jax.Array], jax.Array, tuple[Any, ...]]:
    """Parameters of a layer, tokens of unit variance, and (mask, key, ids); rows are the routing groups.

    Pass all of them as arguments to compiled functions: XLA folds constants.
    """
    rng = np.random.default_rng(0)
    x_GSD = jnp.asarray(rng.standard_normal((size.T // size.S, size.S, size.D)), jnp.float32)
    token_GS, task_GS = (jnp.asarray(rng.integers(0, n, x_GSD.shape[:2])) for n in (256, TASKS))
    shapes = jax.eval_shape(MoE(cfg).init, jax.random.key(0), x_GSD)["params"]
    params = {n: jnp.asarray(rng.standard_normal(s.shape) * size.D**-0.5, jnp.float32) for n, s in shapes.items()}
    return params, x_GSD, (jnp.ones(x_GSD.shape[:2], bool), jax.random.key(2), Ids(token_GS, task_GS))


def routing_pass(router: Any, E: int, size: Size) -> Callable[[], Any]:
    """Forward and backward of a router's decision and statistics, compiled."""
    cfg = layer_of(router, E, size)
    params, x_GSD, other_args = inputs(cfg, size)
    own = {n: params[f"router_{n}"] for n in router.params}
    c_E = jnp.asarray(np.random.default_rng(1).standard_normal(cfg.E), jnp.float32)

    def value(own, x_GSD, mask_GS, key, ids):
        ctx = Context(cfg.E, jax.random.split(key, len(x_GSD)), key, cfg.init_state(), ids.token_BL, ids.task_BL)
        routing = router(own, x_GSD, mask_GS, ctx)
        s = stats(routing, mask_GS[..., None], len(x_GSD))
        # Combine weights and the balancing loss have gradients.
        return (s.combine_E * c_E).sum() + LoadBalance()(s, {}, router), s

    return compiled(value, own, x_GSD, *other_args)


def layer_pass(router: Any, E: int, size: Size) -> Callable[[], Any]:
    """Forward and backward of a whole layer, compiled."""
    cfg = layer_of(router, E, size)
    params, x_GSD, other_args = inputs(cfg, size)

    def value(params, x_GSD, mask_GS, key, ids):
        y_GSD, aux = MoE(cfg).apply({"params": params}, x_GSD, mask_GS, key, cfg.init_state(), ids)
        return (y_GSD**2).mean() + aux.loss, aux.stats

    return compiled(value, params, x_GSD, *other_args)


def compiled(value: Callable, *inputs: Any) -> Callable[[], Any]:
    """A call that waits for the value's gradients by its first two inputs."""
    options = compiler_options(jax.devices()[0])
    program = jax.jit(jax.value_and_grad(value, (0, 1), has_aux=True), compiler_options=options or None)
    program = program.lower(*inputs).compile()
    return lambda: jax.block_until_ready(program(*inputs))


def compare(candidate: Callable[[], Any], reference: Callable[[], Any], repeats: int) -> float:
    """The candidate's median time over the reference's; they run in turn, so that both see the same machine.

    Slow ones are repeated less often: three times, and until PATIENCE seconds are over.
    """
    times: dict[Callable[[], Any], list[float]] = {candidate: [], reference: []}
    start = time.perf_counter()
    for number in range(repeats + 1):
        if number > 3 and time.perf_counter() - start > PATIENCE:
            break
        for program, sample in times.items():
            began = time.perf_counter()
            program()
            if number:  # the first warms up
                sample.append(time.perf_counter() - began)
    return statistics.median(times[candidate]) / statistics.median(times[reference])


if __name__ == "__main__":
    cli.run(main)
