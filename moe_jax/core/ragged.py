"""The grouped matmul of accelerators, by the platform that a program is lowered for.

XLA has a TPU kernel for it and for the gradient of its rows. Everywhere else its own way, and that of the gradient of
the weights on TPU too, is dense: E times the work (all rows of other experts masked), and on a GPU E times the rows in
memory. What is missing are kernels of ours.
"""

from functools import partial

import jax
from jax import lax
from jaxtyping import Array, Float, Int

from moe_jax.core import ragged_gpu, ragged_tpu
from moe_jax.core.blocks import TYPES
from moe_jax.core.rows import Places, Sent, back


@jax.custom_vjp
def ragged_matmul(
    x_RI: Float[Array, "R I"], w_EIO: Float[Array, "E I O"], sizes_E: Int[Array, "E"]
) -> Float[Array, "R O"]:
    """Every row times its expert's matrix; what comes back for rows past sum(sizes_E) is unspecified."""
    if x_RI.dtype not in TYPES:
        return lax.ragged_dot(x_RI, w_EIO, sizes_E)
    return lax.platform_dependent(x_RI, w_EIO, sizes_E, cuda=ragged_gpu.matmul, default=lax.ragged_dot)


def _ragged_bwd(residuals, g_RO):
    x_RI, w_EIO, sizes_E = residuals
    on_gpu = x_RI.dtype in TYPES
    of_rows = {"cuda": partial(ragged_gpu.matmul, transposed=True)} if on_gpu else {}
    of_weights = {"tpu": ragged_tpu.outer} | ({"cuda": ragged_gpu.outer} if on_gpu else {})
    dx_RI = lax.platform_dependent(g_RO, w_EIO, sizes_E, default=_dot_transposed, **of_rows)
    dw_EIO = lax.platform_dependent(x_RI, g_RO, sizes_E, default=partial(_masked_outer, w_EIO), **of_weights)
    return dx_RI, dw_EIO, None


ragged_matmul.defvjp(lambda *args: (ragged_matmul(*args), args), _ragged_bwd)


def _dot_transposed(g_RO, w_EIO, sizes_E):
    return lax.ragged_dot(g_RO, w_EIO.swapaxes(1, 2), sizes_E)


def _masked_outer(w_EIO, x_RI, g_RO, sizes_E):
    return jax.vjp(lambda w: lax.ragged_dot(x_RI, w, sizes_E), w_EIO)[1](g_RO)[0]


@jax.custom_vjp
def sent_matmul(
    x_TI: Float[Array, "T I"], to: Places, w_EIO: Float[Array, "E I O"], sizes_E: Int[Array, "E"]
) -> Float[Array, "R O"]:
    """The same of rows that are still where their tokens are, on a GPU."""
    return ragged_gpu.matmul(x_TI, w_EIO, sizes_E, Sent(x_TI, to).token_R)


def _sent_bwd(residuals, g_RO):
    x_TI, to, w_EIO, sizes_E = residuals
    dx_RI = ragged_gpu.matmul(g_RO, w_EIO, sizes_E, transposed=True)
    return back(dx_RI, to), None, ragged_gpu.outer(x_TI, g_RO, sizes_E, Sent(x_TI, to).token_R), None


sent_matmul.defvjp(lambda *args: (sent_matmul(*args), args), _sent_bwd)
