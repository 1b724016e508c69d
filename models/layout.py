"""The two layouts of a parameter tree: stacked layers and separate layers.

Scanned training stacks the parameters of all blocks on a leading axis N, under
'layers'. Decoding is faster with separate layers 'layer_0' to 'layer_<N-1>'.
Both layouts compute the same function.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from models import model_config

# Matrices that are not used directly as the kernel of a linear layer.
RESHAPED = ('key_up', 'value_up')


class Transposed(NamedTuple):
  """The kernel of a linear layer, stored as its transpose."""

  kernel_OI: jax.Array


def transpose_kernels(params: Any) -> Any:
  """Returns the params with `Transposed` kernels, for `whole_kernels`.

  XLA:CPU multiplies a few rows faster by a bfloat16 matrix that is stored this
  way: 1.6 times for two rows (1024 x 2048, a Xeon with AMX).
  """
  return jax.tree_util.tree_map_with_path(
    lambda path, x: transpose_kernel('/'.join(key.key for key in path), x),
    params,
    is_leaf=_is_transposed,
  )


def transpose_kernel(path: str, x: Any) -> Any:
  """Returns a parameter as `transpose_kernels` does.

  Args:
    path: names with '/' between them, as 'params/layer_0/mlp/up/kernel'.
    x: the parameter; a kernel may be `Transposed` already.
  """
  *_, owner, name = path.split('/')
  is_kernel = name == 'kernel' and not _is_transposed(x) and x.ndim == 2
  return Transposed(x.T) if is_kernel and owner not in RESHAPED else x


def whole_kernels(params: Any) -> Any:
  """Returns the params of a model; XLA folds the transposes into products."""
  return jax.tree.map(
    lambda x: x.kernel_OI.T if isinstance(x, Transposed) else x,
    params,
    is_leaf=_is_transposed,
  )


def host_kernels(params: Any) -> Any:
  """Returns the params as `whole_kernels` does, as views of host memory.

  A view takes no further memory if the weights are in host memory.
  """
  return jax.tree.map(
    lambda x: np.asarray(x.kernel_OI).T if _is_transposed(x) else x,
    params,
    is_leaf=_is_transposed,
  )


def _is_transposed(x: Any) -> bool:
  return isinstance(x, Transposed)


def unstack(
  params: Any, config: model_config.ModelConfig
) -> tuple[Any, model_config.ModelConfig]:
  """Returns the params with separate layers, and their config.

  It separates the layers of every collection: `params` and `adapters`.
  """
  if not config.scan_layers:
    return params, config

  def unstacked(tree):
    tree = dict(tree)
    stacked = tree.pop('layers', {})
    for n in range(config.num_layers if stacked else 0):
      tree[f'layer_{n}'] = jax.tree.map(lambda x, n=n: x[n], stacked)
    return tree

  trees = {name: unstacked(tree) for name, tree in params.items()}
  return trees, dataclasses.replace(config, scan_layers=False)


def stack(
  params: Any, config: model_config.ModelConfig
) -> tuple[Any, model_config.ModelConfig]:
  """Returns the params with stacked layers, and their config."""
  if config.scan_layers:
    return params, config

  def stacked(tree):
    tree = dict(tree)
    layers = [tree.pop(f'layer_{n}', None) for n in range(config.num_layers)]
    if layers[0] is not None:
      tree['layers'] = jax.tree.map(lambda *xs: jnp.stack(xs), *layers)
    return tree

  trees = {name: stacked(tree) for name, tree in params.items()}
  return trees, dataclasses.replace(config, scan_layers=True)
