"""What an engine of several devices does not do yet, refused when it starts."""

from collections.abc import Iterable
from typing import Any

import jax

from inference.engine import engine_config
from models import axes, model_config
from models.linear.stored import tree as stored_tree


def check(
  config: engine_config.EngineConfig,
  model: model_config.ModelConfig,
  params: Any,
) -> None:
  """Refuses an engine that works on one device only.

  Args:
    config: of the engine.
    model: that it serves.
    params: their shapes.

  Raises:
    ValueError: something of the config or of the model is not supported over
      several devices.
  """
  if found := problem(config, model, _stored(params)):
    raise ValueError(found)


def problem(
  config: engine_config.EngineConfig,
  model: model_config.ModelConfig,
  stored: Iterable[str],
) -> str | None:
  """Returns why an engine of several devices is refused, None if it works.

  Args:
    config: of the engine.
    model: that it serves.
    stored: paths of the kernels in fewer bits.
  """
  if config.num_parts == 1:
    return None
  if found := _of_config(config) or _of_model(config, model, stored):
    got, expected = found
    return f'engine.tensor: got {config.tensor} and {got}, expected {expected}'
  return None


def _of_config(config: engine_config.EngineConfig) -> tuple[str, str] | None:
  if config.native == 'on':
    return (
      'engine.native = on',
      'off: native products compute on one device; leave it out',
    )
  return None


def _of_model(
  config: engine_config.EngineConfig,
  model: model_config.ModelConfig,
  stored: Iterable[str],
) -> tuple[str, str] | None:
  if any(path.split('/')[-2].startswith('expert_') for path in stored):
    return (
      'experts in fewer bits',
      'experts of floats over several devices; serve the directory that was'
      ' quantised, or use one device',
    )
  if model.expert_width % config.num_parts:
    return (
      f'experts of width {model.expert_width}',
      'a divisor of the width; choose another number of devices',
    )
  if config.experts > 1 and not model.num_experts:
    return (
      f'engine.experts = {config.experts} of a model without experts',
      '1; leave it out',
    )
  if model.num_experts % config.experts:
    return (
      f'engine.experts = {config.experts} of {model.num_experts} experts',
      'a divisor of their number; choose another one',
    )
  return None


def _stored(params: Any) -> list[str]:
  """Returns the paths of the kernels in fewer bits."""
  leaves = jax.tree_util.tree_leaves_with_path(
    params, is_leaf=stored_tree.is_stored
  )
  return [
    '/'.join(axes.names(path))
    for path, leaf in leaves
    if stored_tree.is_stored(leaf)
  ]
