"""Checks of the tokens that a layer is called with."""

from typing import Any

import jax.numpy as jnp
import numpy as np


def check_tokens(x_BLD: Any, mask_BL: Any = None) -> None:
    """Refuses tokens that are no vectors of real numbers in sequences, [B, L, D], and a mask of other tokens."""
    shape = tuple(np.shape(x_BLD))
    if len(shape) != 3:
        hint = " One sequence is x[None]." if len(shape) == 2 else ""
        raise ValueError(f"x has the shape {shape}, but a layer needs sequences of tokens, [B, L, D].{hint}")
    if not jnp.issubdtype(dtype := jnp.result_type(x_BLD), jnp.floating):
        raise ValueError(
            f"x has the type {dtype}, but tokens are vectors of real numbers; embed ids first, or cast: "
            "x.astype(jnp.float32)."
        )
    if mask_BL is not None and tuple(np.shape(mask_BL)) != shape[:2]:
        raise ValueError(
            f"mask_BL has the shape {tuple(np.shape(mask_BL))}, but x has {shape[0]} sequences of {shape[1]} tokens; "
            f"give a mask of shape {shape[:2]}."
        )
