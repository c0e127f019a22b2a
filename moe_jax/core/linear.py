"""Linear functions with a transpose of their own, for derivatives of every kind and order.

`jax.custom_vjp` replaces a gradient, but takes forward mode away, and second derivatives with it.
`jax.custom_derivatives.linear_call` has neither vmap nor derivatives by what it is not linear in.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array

Flat = Callable[[list[Array], list[Array]], list[Array]]  # (fixed, x) -> y


@dataclasses.dataclass(frozen=True, eq=False)
class _Rule:
    """A linear function and its transpose, as they are computed, and by JAX's own operations, as they are derived."""

    forward: Flat
    transpose: Flat
    native: Flat
    n_fixed: int


def linear_map(forward: Callable, transpose: Callable, fixed: Any, x: Any, native: Callable | None = None) -> Any:
    """Returns forward(fixed, x), which is linear in x, and whose gradient is transpose(fixed, g).

    Further derivatives, and those by `fixed`, are of `native`.

    fixed, x: trees of arrays; those of x are floating-point.
    forward, transpose: need not be differentiable, but work under vmap; they close over no traced arrays.
    native: the same function as forward, of operations that JAX can differentiate; by default forward is.
    """
    (fixed_L, fixed_tree), (x_L, x_tree) = jax.tree.flatten(fixed), jax.tree.flatten(x)
    out_tree = jax.tree.structure(jax.eval_shape(forward, fixed, x))

    def flat(f: Callable, tree: Any) -> Flat:
        return lambda fixed_L, a_L: jax.tree.leaves(
            f(jax.tree.unflatten(fixed_tree, fixed_L), jax.tree.unflatten(tree, a_L))
        )

    rule = _Rule(flat(forward, x_tree), flat(transpose, out_tree), flat(native or forward, x_tree), len(fixed_L))
    return jax.tree.unflatten(out_tree, _bind(rule, fixed_L, x_L))


def _bind(rule: _Rule, fixed_L: list[Array], x_L: list[Array]) -> list[Array]:
    n = rule.n_fixed
    jaxpr = jax.make_jaxpr(lambda *args: rule.forward(list(args[:n]), list(args[n:])))(*fixed_L, *x_L)
    return _linear_p.bind(*fixed_L, *x_L, jaxpr=jaxpr, rule=rule)


def _evaluate(*args, jaxpr, rule):
    return jaxpr_as_fun(jaxpr)(*args)


def _jvp(primals, tangents, *, jaxpr, rule):
    n = rule.n_fixed
    fixed, x = list(primals[:n]), list(primals[n:])
    moving = [i for i in range(n) if type(tangents[i]) is not ad.Zero]
    found = []
    if any(type(t) is not ad.Zero for t in tangents[n:]):
        found.append(_bind(rule, fixed, [ad.instantiate_zeros(t) for t in tangents[n:]]))
    if moving:

        def of_moving(*values):
            given = dict(zip(moving, values, strict=True))
            return rule.native([given.get(i, a) for i, a in enumerate(fixed)], x)

        found.append(jax.jvp(of_moving, [fixed[i] for i in moving], [tangents[i] for i in moving])[1])
    tangents_out = [sum(parts[1:], parts[0]) for parts in zip(*found, strict=True)]
    return _linear_p.bind(*primals, jaxpr=jaxpr, rule=rule), tangents_out


def _transpose(cotangents, *args, jaxpr, rule):
    n = rule.n_fixed
    like = [a.aval if ad.is_undefined_primal(a) else jax.typeof(a) for a in args[n:]]

    def native(fixed, g):
        anywhere = [ad.instantiate_zeros(ad.Zero(a)) for a in like]  # `jax.linear_transpose` knows no shard_map
        return list(jax.vjp(lambda *x: rule.native(fixed, list(x)), *anywhere)[1](g))

    found = _bind(
        _Rule(rule.transpose, rule.forward, native, n), list(args[:n]), [ad.instantiate_zeros(g) for g in cotangents]
    )
    return [None] * n + [g if ad.is_undefined_primal(a) else None for a, g in zip(args[n:], found, strict=True)]


def _batch(args, axes, *, jaxpr, rule):
    size = next(a.shape[axis] for a, axis in zip(args, axes, strict=True) if axis is not None)
    args = [batching.bdim_at_front(a, axis, size) for a, axis in zip(args, axes, strict=True)]
    each = _Rule(jax.vmap(rule.forward), jax.vmap(rule.transpose), jax.vmap(rule.native), rule.n_fixed)
    out = _bind(each, args[: rule.n_fixed], args[rule.n_fixed :])
    return out, [0] * len(out)


_linear_p = Primitive("linear_with_transpose")
_linear_p.multiple_results = True
_linear_p.def_impl(_evaluate)
# jax 0.12 asks for it where forward sorts: sorts are lowered in two steps.
_linear_p.to_lojax = _evaluate  # type: ignore[method-assign]
_linear_p.def_abstract_eval(lambda *args, jaxpr, rule: jaxpr.out_avals)
ad.primitive_jvps[_linear_p] = _jvp
ad.primitive_transposes[_linear_p] = _transpose
batching.primitive_batchers[_linear_p] = _batch
mlir.register_lowering(_linear_p, mlir.lower_fun(_evaluate, multiple_results=True))
