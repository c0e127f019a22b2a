"""Kernels by the platform that a program is lowered for, also where that is several at once (`jax.export`)."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import batching, mlir

PLATFORMS = ("cuda", "tpu")  # that have kernels


def by_platform(*args: Any, default: Callable, **kernels: Callable) -> Any:
    """default(*args), or on a platform that `kernels` names ("cuda", "tpu") that kernel, which has the same result.

    `lax.platform_dependent` lowers every branch for every platform of an export, and a kernel refuses others than its
    own. There are no derivatives: see `core.linear`.
    """
    leaves, tree = jax.tree.flatten(args)
    flat = lambda f: lambda *leaves: jax.tree.leaves(f(*jax.tree.unflatten(tree, leaves)))  # noqa: E731
    jaxprs = {name: jax.make_jaxpr(flat(f))(*leaves) for name, f in {"default": default, **kernels}.items()}
    out = _by_platform_p.bind(*leaves, jaxprs=tuple(jaxprs.items()))
    return jax.tree.unflatten(jax.tree.structure(jax.eval_shape(default, *args)), out)


def _evaluate(*args, jaxprs, platform):
    found = dict(jaxprs)
    return jaxpr_as_fun(found.get(platform, found["default"]))(*args)


def _batch(args, axes, *, jaxprs):
    each = {name: jax.vmap(jaxpr_as_fun(jaxpr), in_axes=tuple(axes)) for name, jaxpr in jaxprs}
    out = by_platform(*args, **each)
    return out, [0] * len(out)


_by_platform_p = Primitive("by_platform")
_by_platform_p.multiple_results = True
_by_platform_p.def_impl(lambda *args, jaxprs: jax.jit(partial(_by_platform_p.bind, jaxprs=jaxprs))(*args))
_by_platform_p.def_abstract_eval(lambda *args, jaxprs: dict(jaxprs)["default"].out_avals)
batching.primitive_batchers[_by_platform_p] = _batch
for _platform in (*PLATFORMS, None):
    _rule = mlir.lower_fun(partial(_evaluate, platform=_platform or "default"), multiple_results=True)
    mlir.register_lowering(_by_platform_p, _rule, platform=_platform)
