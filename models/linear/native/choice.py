"""Chooses how kernels in fewer bits are multiplied on a CPU."""

from typing import Any, NamedTuple

import jax

from models.linear.native import build, product as native_product
from models.linear.stored import product, tree as stored_tree


class Choice(NamedTuple):
  """A port `Execution.stored`, and the reason for it, one line."""

  port: Any
  reason: str


def choose(setting: str, params: Any, dtype: Any, platform: str) -> Choice:
  """Returns how the stored kernels of params are multiplied.

  Args:
    setting: 'auto', 'on' (an error where there is no native product) or 'off'.
    params: arrays or shapes.
    dtype: dtype of the computation.
    platform: platform of the device: 'cpu', 'gpu' or 'tpu'.

  Raises:
    ValueError: the setting is `on` and there is no native product.
  """

  def plain(reason: str) -> Choice:
    if setting == 'on':
      raise ValueError(
        f"engine.native: got 'on', but {reason}; set engine.native = auto"
      )
    return Choice(product.in_blocks, f'plain JAX: {reason}')

  if setting == 'off':
    return plain('engine.native is off')
  if platform != 'cpu':
    return plain(f'the native product is for CPUs, not for {platform}')
  kernels = [
    leaf
    for leaf in jax.tree.leaves(params, is_leaf=stored_tree.is_stored)
    if stored_tree.is_stored(leaf)
  ]
  refusals = [
    text for each in kernels if (text := native_product.refusal(each, dtype))
  ]
  if len(refusals) == len(kernels):
    return plain(refusals[0] if refusals else 'no kernel is in fewer bits')
  try:
    target, instructions = build.registered()
  except build.BuildError as error:
    return plain(str(error))
  reason = f'native, {instructions}'
  if refusals:
    reason += f'; {len(refusals)} of {len(kernels)} kernels in plain JAX:'
    reason += f' {refusals[0]}'
  return Choice(native_product.Port(target, instructions), reason)
