"""GPTQ: inputs that are not rounded yet compensate for the errors so far.

The weights of a kernel are rounded input by input. After each input, the
weights of the remaining inputs change a little, so that the kernel's output on
the calibration text stays close to the original. The inputs with the largest
second moment come first. Scales are the scales of rounding to nearest, so this
order needs no table beside the weights.

Reference: Frantar et al., arXiv:2210.17323, algorithm 1; the order and the
scales are the options `act_order` and `static_groups` of its code.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models.linear.stored import (
  kernel as kernel_lib,
  packing,
  round as rounding,
)

_BLOCK = 128  # inputs whose errors reach the later inputs in one product
_DAMPING = 0.01  # share of the mean second moment, as in the paper


def quantise(w_IO: Any, second_II: Any, scheme: str) -> kernel_lib.Kernel:
  """Returns a kernel in the form of a scheme.

  Args:
    w_IO: the kernel.
    second_II: second moments of its input.
    scheme: one of `models.linear.stored.round.SCHEMES`.
  """
  nearest = rounding.by_scheme(w_IO, scheme)
  order, upper_II = factor(second_II)
  w_OI = jnp.asarray(w_IO, jnp.float32).T
  scales_OI, mins_OI = _spread(nearest)
  moved_OI = compensated(
    w_OI[:, order], scales_OI[:, order], mins_OI[:, order], upper_II,
    form=nearest.form,
  )  # fmt: skip
  back = np.argsort(order)
  codes = rounding.codes_of(
    moved_OI[:, back] - mins_OI, scales_OI, nearest.form
  )
  is_packed = nearest.form in kernel_lib.PACKED
  return kernel_lib.Kernel.make(
    packing.pack(codes) if is_packed else codes,
    nearest.scales,
    form=nearest.form,
    tile=nearest.tile,
    mins=nearest.mins,
    gain=nearest.gain,
  )


def factor(second_II: Any) -> tuple[np.ndarray, jax.Array]:
  """Returns the order of the inputs, and the upper Cholesky factor.

  U^T U is the inverse of the damped second moments in that order. The factor is
  computed in float64, because it is as ill-conditioned as the moments.
  """
  second_II = np.asarray(second_II, np.float64)
  diagonal = np.diagonal(second_II)
  # An input that is always 0 has no error; the damping keeps its row regular.
  damping = _DAMPING * diagonal.mean() or 1.0
  order = np.argsort(-diagonal, kind='stable')
  second_II = second_II[np.ix_(order, order)]
  second_II[np.diag_indices_from(second_II)] += damping
  inverse_II = np.linalg.inv(second_II)
  lower_II = np.linalg.cholesky((inverse_II + inverse_II.T) / 2)
  return order, jnp.asarray(lower_II.T, jnp.float32)


@functools.partial(jax.jit, static_argnames=('form',))
def compensated(
  w_OI: jax.Array,
  scales_OI: jax.Array,
  mins_OI: jax.Array,
  upper_II: jax.Array,
  *,
  form: str,
) -> jax.Array:
  """Returns the weights, each with its value just before it is rounded.

  Args:
    w_OI: rows of weights, with the inputs in the order of rounding.
    scales_OI: scale of each weight.
    mins_OI: min of each weight; 0 if the form has none.
    upper_II: see `factor`.
    form: a form of `models.linear.stored.kernel`.
  """
  rows = w_OI.shape[1]
  padding = -rows % _BLOCK
  # Inputs without a weight, at the end: their errors are 0.
  columns = ((0, 0), (0, padding))
  w_OI, mins_OI = jnp.pad(w_OI, columns), jnp.pad(mins_OI, columns)
  scales_OI = jnp.pad(scales_OI, columns, constant_values=1)
  upper_II = jnp.pad(upper_II, ((0, padding), (0, padding)))
  # 1 on the diagonal of the padding, by which errors are divided.
  upper_II += jnp.diag((jnp.arange(rows + padding) >= rows).astype(jnp.float32))

  def round_block(n, w_OI):
    start = n * _BLOCK

    def cut(of_OI):
      return jax.lax.dynamic_slice_in_dim(of_OI, start, _BLOCK, axis=1)

    upper_bI = jax.lax.dynamic_slice_in_dim(upper_II, start, _BLOCK)
    w_Ob, errors_Ob = _round_columns(
      cut(w_OI), cut(scales_OI), cut(mins_OI), cut(upper_bI), form
    )
    w_OI = jax.lax.dynamic_update_slice_in_dim(w_OI, w_Ob, start, axis=1)
    is_later_I = jnp.arange(rows + padding) >= start + _BLOCK
    return w_OI - errors_Ob @ jnp.where(is_later_I, upper_bI, 0)

  w_OI = jax.lax.fori_loop(0, (rows + padding) // _BLOCK, round_block, w_OI)
  return w_OI[:, :rows]


def _round_columns(w_Ob, scales_Ob, mins_Ob, upper_bb, form):
  """Returns the rounded weights of a block, and their errors."""

  def round_column(i, carry):
    w_Ob, errors_Ob = carry
    w_O, min_O, scale_O = w_Ob[:, i], mins_Ob[:, i], scales_Ob[:, i]
    code_O = rounding.codes_of(w_O - min_O, scale_O, form)
    error_O = (w_O - _number(code_O, form) * scale_O - min_O) / upper_bb[i, i]
    is_later_b = jnp.arange(_BLOCK) > i
    w_Ob -= jnp.outer(error_O, jnp.where(is_later_b, upper_bb[i], 0))
    return w_Ob, errors_Ob.at[:, i].set(error_O)

  return jax.lax.fori_loop(
    0, _BLOCK, round_column, (w_Ob, jnp.zeros_like(w_Ob))
  )


def _number(codes, form):
  if form in ('nf4', 'fp4'):
    return packing.look_up(codes, packing.NF4 if form == 'nf4' else packing.FP4)
  return codes.astype(jnp.float32)


def _spread(kernel: kernel_lib.Kernel) -> tuple[jax.Array, jax.Array]:
  """Returns scale and min of each weight, [out, in]."""
  rows, columns = kernel.shape
  scales = kernel_lib.with_gain(kernel.scales, kernel.gain)
  scales_OI = kernel_lib.spread(scales, kernel.tile, columns, rows)
  scales_OI = jnp.broadcast_to(scales_OI, (columns, rows))
  if kernel.mins is None:
    return scales_OI, jnp.zeros_like(scales_OI)
  mins = kernel.mins.astype(jnp.float32)
  return scales_OI, kernel_lib.spread(mins, kernel.tile, columns, rows)
