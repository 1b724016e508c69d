"""The two layouts of a parameter tree: stacked layers and separate layers.

Scanned training stacks the parameters of all blocks on a leading axis N, under
'layers'. Decoding is faster with separate layers 'layer_0' to 'layer_<N-1>'.
Both layouts compute the same function.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from models import model_config


def unstack(
  params: Any, config: model_config.ModelConfig
) -> tuple[Any, model_config.ModelConfig]:
  """Returns the params with separate layers, and their config."""
  if not config.scan_layers:
    return params, config
  tree = dict(params['params'])
  stacked = tree.pop('layers')
  for n in range(config.num_layers):
    tree[f'layer_{n}'] = jax.tree.map(lambda x, n=n: x[n], stacked)
  return {'params': tree}, dataclasses.replace(config, scan_layers=False)


def stack(
  params: Any, config: model_config.ModelConfig
) -> tuple[Any, model_config.ModelConfig]:
  """Returns the params with stacked layers, and their config."""
  if config.scan_layers:
    return params, config
  tree = dict(params['params'])
  layers = [tree.pop(f'layer_{n}') for n in range(config.num_layers)]
  tree['layers'] = jax.tree.map(lambda *xs: jnp.stack(xs), *layers)
  return {'params': tree}, dataclasses.replace(config, scan_layers=True)
