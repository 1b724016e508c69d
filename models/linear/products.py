"""Chooses which products are computed by own code, and says why.

On a CPU this is native code; on GPU and TPU they are Pallas kernels, which
multiply by kernels in fewer bits alone.
"""

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
    """Whether any weights are multiplied by own code."""
    return self.linear is not None or self.stored is not product.in_blocks


def choose(
  setting: str,
  params: Any,
  dtype: Any,
  platform: str,
  *,
  is_invariant: bool = False,
  is_transposed: bool = False,
) -> Choice:
  """Returns how the weights of params are multiplied.

  Kernels in fewer bits are multiplied by own code wherever they can be. On a
  CPU, so are a few rows by floats, if these are more than a processor's cache
  holds.

  Args:
    setting: 'auto', 'on' (an error where own code cannot be used) or 'off'.
    params: arrays or shapes.
    dtype: dtype of the computation.
    platform: platform of the device: 'cpu', 'gpu' or 'tpu'.
    is_invariant: leaves out code with which the bits of a row depend on the
      other rows: products with floats, and all on GPU and TPU.
    is_transposed: whether kernels of floats lie in memory as [O, I].

  Raises:
    ValueError: the setting is `on` and own code cannot be used.
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
    if not is_invariant and not stored_tree.is_stored(leaf) and leaf.ndim > 1
  ]
  if setting == 'off':
    return plainly('engine.native is off')
  if platform != 'cpu':
    if not kernels and setting != 'on':
      return Choice()
    if is_invariant:
      return plainly('invariant numerics leave sums to plain JAX')
    found = on_accelerator(kernels, dtype, platform)
    return found if found.is_native else plainly(found.reason)
  if not (kernels or setting == 'on' or _is_large(floats)):
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


def on_accelerator(kernels: list[Any], dtype: Any, platform: str) -> Choice:
  """Returns how kernels in fewer bits are multiplied on GPU or TPU.

  Where no kernel of Pallas multiplies, the line says why alone.

  Args:
    kernels: stored ones.
    dtype: dtype of the computation.
    platform: platform of the device.
  """
  if not kernels:
    return Choice(reason='no kernel is in fewer bits')
  # Here: they import Pallas, without which a CPU starts sooner.
  if platform == 'tpu':
    from models.linear.kernels import stored_tpu as ports
  elif platform == 'gpu':
    from models.linear.kernels import stored_gpu as ports
  else:
    return Choice(reason=f'there is no kernel for {platform}')
  refusals = [text for each in kernels if (text := ports.refusal(each, dtype))]
  if len(refusals) == len(kernels):
    return Choice(reason=refusals[0])
  reason = _with_refusals(f'Pallas, {platform}', kernels, refusals)
  return Choice(ports.Port(), reason=reason)


def _with_refusals(reason: str, kernels: list[Any], refusals: list[str]) -> str:
  if not refusals:
    return reason
  return (
    f'{reason}; {len(refusals)} of {len(kernels)} kernels in plain JAX:'
    f' {refusals[0]}'
  )


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
  reason = _with_refusals(f'native, {instructions}', kernels, refusals)
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
