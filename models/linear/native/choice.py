"""Chooses which products are computed by native code on a CPU, and says why."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from models.linear.native import few_rows, product as native_product
from models.linear.stored import product, tree as stored_tree
from models.native import build

PLAIN = 'plain JAX'


class Choice(NamedTuple):
  """Ports of an `Execution`, and a line that names them and says why.

  Where there is nothing to choose, the line is 'plain JAX' alone.
  """

  stored: Any = product.in_blocks
  # Of kernels and heads of floats; None: the default ports.
  linear: few_rows.Linear | None = None
  unembed: few_rows.Unembed | None = None
  reason: str = PLAIN

  @property
  def is_native(self) -> bool:
    """Whether any weights are multiplied natively."""
    return self.linear is not None or self.stored is not product.in_blocks


def choose(
  setting: str,
  params: Any,
  dtype: Any,
  platform: str,
  *,
  has_floats: bool = True,
  is_transposed: bool = False,
) -> Choice:
  """Returns how the weights of params are multiplied.

  Kernels in fewer bits are multiplied natively wherever they can be. So are a
  few rows by floats, if these are more than a processor's cache holds.

  Args:
    setting: 'auto', 'on' (an error where there is no native product) or 'off'.
    params: arrays or shapes.
    dtype: dtype of the computation.
    platform: platform of the device: 'cpu', 'gpu' or 'tpu'.
    has_floats: False leaves products with floats to other ports.
    is_transposed: whether kernels of floats lie in memory as [O, I].

  Raises:
    ValueError: the setting is `on` and there is no native product.
  """

  def plainly(reason: str) -> Choice:
    if setting == 'on':
      raise ValueError(
        f"engine.native: got 'on', but {reason}; set engine.native = auto"
      )
    return Choice(reason=f'{PLAIN}: {reason}')

  leaves = jax.tree.leaves(params, is_leaf=stored_tree.is_stored)
  kernels = [leaf for leaf in leaves if stored_tree.is_stored(leaf)]
  floats = [
    leaf
    for leaf in leaves
    if has_floats and not stored_tree.is_stored(leaf) and leaf.ndim > 1
  ]
  if setting == 'off':
    return plainly('engine.native is off')
  if platform != 'cpu' and (kernels or setting == 'on'):
    return plainly(f'the native product is for CPUs, not for {platform}')
  if platform != 'cpu' or not (kernels or setting == 'on' or _is_large(floats)):
    return Choice()
  refusals = [
    text for each in kernels if (text := native_product.refusal(each, dtype))
  ]
  is_stored = len(refusals) < len(kernels)
  of_floats = _refusal(floats, dtype)
  are_few = not of_floats and (_is_large(floats) or setting == 'on')
  if not (is_stored or are_few):
    return plainly(refusals[0] if refusals else of_floats)
  try:
    found = _of_stored(kernels, refusals) if is_stored else Choice()
    return _with_few_rows(found, is_transposed) if are_few else found
  except build.BuildError as error:
    return plainly(str(error))


def _is_large(floats: list[Any]) -> bool:
  num_bytes = sum(
    math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize for leaf in floats
  )
  return num_bytes >= few_rows.LEAST_BYTES


def _refusal(floats: list[Any], dtype: Any) -> str:
  """Returns why all weights are refused, '' if one is accepted."""
  refusals = [few_rows.refusal(leaf.dtype, dtype) for leaf in floats]
  if not refusals:
    return (
      'no kernel is in fewer bits, and floats are multiplied natively on one'
      ' device in fast numerics alone'
    )
  return '' if '' in refusals else refusals[0]


def _of_stored(kernels: list[Any], refusals: list[str]) -> Choice:
  target, instructions = build.registered()
  reason = f'native, {instructions}'
  if refusals:
    reason += f'; {len(refusals)} of {len(kernels)} kernels in plain JAX:'
    reason += f' {refusals[0]}'
  return Choice(native_product.Port(target, instructions), reason=reason)


def _with_few_rows(choice: Choice, is_transposed: bool) -> Choice:
  """Returns a choice that multiplies floats natively, too."""
  target, instructions = build.registered(source=build.FEW_ROWS)
  reason = f'native up to {few_rows.MOST_ROWS} rows, {instructions}'
  if choice.reason != PLAIN:
    reason = f'{choice.reason}; floats {reason}'
  return choice._replace(
    linear=few_rows.Linear(target, is_transposed),
    unembed=few_rows.Unembed(target),
    reason=reason,
  )
