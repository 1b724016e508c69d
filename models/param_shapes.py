"""Shapes and dtypes of a model's parameters, without computing one.

Training, freezing, serving and plans ask for them again and again, and tracing
a model takes longer than most uses of the shapes. So a config is traced once in
a process, and only one of several equal layers is traced.
"""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from models import model_config, transformer


def of(config: model_config.ModelConfig) -> dict[str, Any]:
  """Returns the variables of a model's `init`, as `jax.ShapeDtypeStruct`s."""
  leaves, structure = _traced(config)
  return jax.tree.unflatten(structure, leaves)


# The cache holds the configs of a sweep over shapes, which has some dozens.
@functools.lru_cache(maxsize=128)
def _traced(
  config: model_config.ModelConfig,
) -> tuple[list[jax.ShapeDtypeStruct], Any]:
  num_traced = 1 if config.is_uniform else config.num_layers
  model = transformer.Transformer(
    dataclasses.replace(config, num_layers=num_traced, scan_layers=False)
  )
  tokens_11 = jax.ShapeDtypeStruct((1, 1), np.int32)
  variables = jax.eval_shape(model.init, jax.random.key(0), tokens_11)
  tree = dict(variables['params'])
  if config.scan_layers:
    tree['layers'] = jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(
        (config.num_layers, *leaf.shape), leaf.dtype
      ),
      tree.pop('layer_0'),
    )
  elif config.is_uniform:
    for n in range(1, config.num_layers):
      tree[f'layer_{n}'] = tree['layer_0']
  return jax.tree.flatten({**variables, 'params': tree})
