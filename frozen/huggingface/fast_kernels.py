"""The matrices of an import that stay quantised, for speed on this machine."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from models.linear.native import (
  choice as native_choice,
  product as native_product,
)
from models.linear.stored import product


def choose(kept: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
  """Returns the kernels with which this machine computes fast, and notes.

  Native code decodes with them faster than with floats; plain JAX is several
  times slower.

  Args:
    kept: stored kernels, by path.
  """
  if not kept:
    return {}, []
  chosen = native_choice.choose(
    'auto', dict(kept), jnp.float32, jax.default_backend()
  )
  if chosen.stored is product.in_blocks:
    return {}, [
      f'matrices become floats, since products are in {chosen.reason};'
      ' --weights=kept leaves them as they are nevertheless'
    ]
  found = {
    path: kernel
    for path, kernel in kept.items()
    if not native_product.refusal(kernel, jnp.float32)
  }
  return found, [
    f'{len(found)} of {len(kept)} matrices stay quantised, since products are'
    f' {chosen.reason}; --weights=float dequantises all, for a machine with an'
    ' accelerator or without a compiler'
  ]
