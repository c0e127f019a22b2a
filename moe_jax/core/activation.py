from collections.abc import Callable

import jax
import jax.numpy as jnp

ACTIVATIONS: dict[str, Callable] = {
    "relu": jax.nn.relu,
    "gelu": jax.nn.gelu,
    "silu": jax.nn.silu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "sigmoid": jax.nn.sigmoid,
    "tanh": jnp.tanh,
}


def activation(name: str) -> Callable:
    """The activation of this name."""
    if name not in ACTIVATIONS:
        raise ValueError(f"Activation {name!r} is unknown; use one of {', '.join(ACTIVATIONS)}.")
    return ACTIVATIONS[name]
