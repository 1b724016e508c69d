"""The two layouts of a parameter tree: layers stacked, or layers apart.

Scanned training stacks the parameters of all blocks on a leading axis N under
'layers'; decoding reads 'layer_0' ... 'layer_<N-1>' faster. The same values
give the same function in either.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from models import model_config


def unstack(
  params: Any, config: model_config.ModelConfig
) -> tuple[Any, model_config.ModelConfig]:
  """Returns the params with layers apart, and the config that says so."""
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
  """Returns the params with layers stacked: the inverse of `unstack`."""
  if config.scan_layers:
    return params, config
  tree = dict(params['params'])
  layers = [tree.pop(f'layer_{n}') for n in range(config.num_layers)]
  tree['layers'] = jax.tree.map(lambda *xs: jnp.stack(xs), *layers)
  return {'params': tree}, dataclasses.replace(config, scan_layers=True)
