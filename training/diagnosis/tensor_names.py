"""Readable names of the tensors of a train step.

A leaf of a state is named by its path. A computed tensor is named by the scopes
that Flax modules and the step open; jax stores them with every operation:

    transpose(jvp(Transformer.hidden_and_routing))/Transformer._run_layers
      /layer_3/mlp/down                      layer 3, mlp/down, backward
"""

import re
from typing import Any

import jax

from training import step as step_lib
from training.diagnosis import tensor_checks

_LAYERS = 'layers'  # the stack of a scanned model, in trees and scopes
_RUN_LAYERS = '_run_layers'  # the method that loops over the stack
_TRANSFORMS = re.compile(r'\b(?:jvp|transpose|vmap|jit|pmap)\(|\)')
# Scopes of transformations, and scopes that `nn.scan` and `nn.remat` open.
_NOT_MODULES = ('checkpoint', 'rematted_computation', 'while', 'body')
# Names of operations of the model outside of its modules, by method.
_METHODS = {'embedded': 'embedding', 'weighted_nll': 'loss'}


def leaf(path: tuple[Any, ...]) -> str:
  """Returns the name of a leaf, such as params/layer_0/mlp/up/kernel."""
  names = [
    str(getattr(key, 'name', getattr(key, 'key', '')))
    for key in path
    if not isinstance(key, jax.tree_util.SequenceKey)
  ]
  # Flax's own level `params`, below the `params` of the state, is left out.
  return '/'.join(n for i, n in enumerate(names) if not i or n != 'params')


def leaves(tree: Any) -> list[str]:
  """Returns the name of every leaf, in the order of `jax.tree.leaves`."""
  return [leaf(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def is_stacked(name: str) -> bool:
  """Returns whether a leaf has one slice per layer."""
  return _LAYERS in name.split('/')


def place(tensor: tensor_checks.Computed) -> str:
  """Returns the place of a tensor, such as 'layer 3, mlp/down, backward'."""
  parts = [
    part
    for part in _TRANSFORMS.sub('', tensor.scope).split('/')
    if part and part not in _NOT_MODULES
  ]
  modules = [
    part for part in parts if '.' not in part and part != step_lib.MICROBATCHES
  ]
  if modules and modules[0] == step_lib.UPDATE:
    return "the optimizer's update"
  where = _modules(modules, tensor.loops) or _method(parts)
  if not where:
    return 'the sums and norms of the step'
  if 'transpose(' in tensor.scope or 'rematted_computation' in tensor.scope:
    return f'{where}, backward'
  return f'{where}, forward'


def is_update(tensor: tensor_checks.Computed) -> bool:
  """Returns whether the optimizer computes the tensor."""
  return tensor.scope.split('/')[0] == step_lib.UPDATE


def microbatch(tensor: tensor_checks.Computed) -> int:
  """Returns the micro-batch that a tensor is computed in."""
  found = [
    index
    for scope, index in tensor.loops
    if scope.split('/')[-1] == step_lib.MICROBATCHES
  ]
  return found[0] if found else 0


def _modules(modules, loops) -> str:
  if not modules:
    return ''
  first, *rest = modules
  if match := re.fullmatch(r'layer_(\d+)', first):
    first = f'layer {match.group(1)}'
  elif first == _LAYERS:
    found = [i for scope, i in loops if scope.endswith(_RUN_LAYERS)]
    first = f'layer {found[0]}' if found else 'all layers'
  return ', '.join(filter(None, (first, '/'.join(rest))))


def _method(parts: list[str]) -> str:
  methods = [part.split('.')[-1] for part in parts if '.' in part]
  if not methods:
    return ''
  return _METHODS.get(methods[-1], methods[-1])
