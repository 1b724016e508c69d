"""Stored kernels in a tree of parameters."""

from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from models import axes
from models.linear.stored import (
  across as across_lib,
  blocks as blocks_lib,
  kernel as kernel_lib,
  round as rounding,
)

TYPES = (kernel_lib.Kernel, blocks_lib.Blocks, across_lib.Across)
# Kernels that are not used in a plain product, and kernels of routers.
WHOLE = ('router', 'key_up', 'value_up')
# The forms of a base of QLoRA, with the steps up to the largest number (as in
# qwix), and the inputs that share a scale. Runs that resume rely on them.
BASES = {'int8': 127.5, 'int4': 7.5}
_BASE_TILE = 64


def is_stored(x: Any) -> bool:
  """Returns whether a leaf of a tree is a stored kernel."""
  return isinstance(x, TYPES)


def param(module: nn.Module, init: Any, shape: tuple[int, ...]) -> Any:
  """Returns the kernel of a module: a parameter, or a stored kernel."""
  kernel = given(module, 'kernel')
  return module.param('kernel', init, shape) if kernel is None else kernel


def given(module: nn.Module, name: str) -> Any:
  """Returns the stored kernel of a name in a module's variables, or None."""
  if module.has_variable('params', name):
    kernel = module.get_variable('params', name)
    if is_stored(kernel):
      return kernel
  return None


def as_base(w_IO: Any, form: str) -> kernel_lib.Kernel:
  """Returns a kernel [..., in, out] as a base of QLoRA is stored."""
  rows = w_IO.shape[-2]
  # The largest divisor; runs that resume rely on this choice, too.
  tile = next(n for n in range(min(rows, _BASE_TILE), 0, -1) if not rows % n)
  return rounding.quantise(w_IO, form, (1, tile), largest=BASES[form])


def quantise_kernels(params: Any, form: str) -> Any:
  """Returns the collection `params` as a base of QLoRA is stored.

  Routers, and kernels that are not used in a plain product, stay as they are,
  like tables, norms and biases.
  """

  def quantised(path, leaf):
    *_, owner, kind = axes.names(path)
    is_linear = kind == 'kernel' and owner not in WHOLE
    return as_base(leaf, form) if is_linear else leaf

  return jax.tree_util.tree_map_with_path(quantised, params)


def whole_kernels(params: Any, dtype: Any = jnp.float32) -> Any:
  """Returns the tree with its kernels dequantised; tables are [V, D]."""

  def whole(path, x):
    if not is_stored(x):
      return x
    is_table = axes.names(path)[-1] == 'embedding'
    whole = x.whole(dtype)
    return jnp.swapaxes(whole, -1, -2) if is_table else whole

  return jax.tree_util.tree_map_with_path(whole, params, is_leaf=is_stored)
