"""The layout of a model over devices: what each device holds of it.

A model is cut into parts that are alike, and each device holds as many of them:
query heads with their key/value heads, columns of the MLP, rows of the tables.
What does not divide is copied or filled with zeros (`parallel.tensor.heads`),
which leaves the function as it is. A device then runs a model of its own parts,
a `Transformer` like any other.

Which dimensions of which weights are cut is written nowhere here: they have
the logical axes of `models/axes.py`, and `parallel.rules` gives the mesh axis,
as in training.
"""

from collections.abc import Callable
import dataclasses
import functools
import math
from typing import Any

import jax
import numpy as np

from models import axes, layout as model_layout, model_config
from parallel.tensor import heads as heads_lib, ports

# Norms over all heads together, and the logical axes of their scales.
_NORMS_OF_HEADS = {'query_norm': 'heads', 'key_norm': 'kv_heads'}
_WORD = 32  # ids of a word of bits, see `penalties.allow`


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
  """The parts of a model."""

  model: model_config.ModelConfig  # of separate layers
  vocab_size: int  # V, ids that may be sampled
  num_parts: int
  num_expert_groups: int = 1  # of parts, see `EngineConfig.experts`

  @functools.cached_property
  def heads(self) -> heads_lib.Heads:
    """The heads of the parts."""
    return heads_lib.fit(
      self.model.num_heads, self.model.num_kv_heads, self.num_parts
    )

  def config(self, num_parts: int) -> model_config.ModelConfig:
    """Returns the config of a model of some parts, all of them or fewer."""
    model, share = self.model, num_parts / self.num_parts
    # Ids behind the vocabulary are masked like those without a token.
    spare = [each for each in model.spare_ids if each[0] < self.vocab_size]
    spare.append((self.vocab_size, self._size('vocab', model.vocab_size)))

    def shared(name: str, size: int) -> int:
      return int(self._size(name, size) * share)

    return dataclasses.replace(
      model,
      num_heads=self.heads.queries_per_part * num_parts,
      num_kv_heads=self.heads.kv_per_part * num_parts,
      mlp_width=shared('mlp', model.mlp_width),
      expert_width=shared('mlp', model.expert_width),
      vocab_size=shared('vocab', model.vocab_size),
      spare_ids=tuple((a, b) for a, b in _merged(spare) if a < b),
    )

  def names_of(self, path: Any, leaf: Any) -> tuple[str | None, ...]:
    """Returns the logical axes of a parameter, as a model in parts has it.

    Args:
      path: of the parameter.
      leaf: the parameter, or its shape.
    """
    owner = axes.names(path)[-2]
    if self.model.qk_norm_whole and owner in _NORMS_OF_HEADS:
      return (_NORMS_OF_HEADS[owner],)
    return axes.names_of(path, leaf)

  def shape(self, leaf: Any, names: Any) -> jax.ShapeDtypeStruct:
    """Returns the shape of a parameter of all parts.

    Args:
      leaf: of the model, or its shape; of one layer.
      names: its logical axes.
    """
    shape = map(self._size, names, leaf.shape)
    return jax.ShapeDtypeStruct(tuple(shape), leaf.dtype)

  def is_cut(self, name: str | None) -> bool:
    """Returns whether parts share a logical axis of a dense layer."""
    return name in _FITS

  def index(self, name: str | None, size: int) -> np.ndarray:
    """Returns what all parts have along an axis, in their order.

    Args:
      name: of the logical axis.
      size: of the model's.

    Returns:
      Places along the axis of the model; -1 where zeros are filled in.
    """
    return self.laid_out(np.arange(1, size + 1), (name,)) - 1

  def laid_out(self, weight: np.ndarray, names: Any) -> np.ndarray:
    """Returns a weight of the model as that of all parts.

    Args:
      weight: of one layer, on the host.
      names: its logical axes.
    """
    for axis, name in enumerate(names):
      if name in _FITS:
        weight = _FITS[name][0](self, weight, axis)
    return weight

  def of_model(
    self, weight: np.ndarray, names: Any, shape: tuple[int, ...]
  ) -> np.ndarray:
    """Returns the weight of the model: the inverse of `laid_out`.

    Args:
      weight: of all parts.
      names: its logical axes.
      shape: of the weight of the model.
    """
    for axis, name in enumerate(names):
      if name in _FITS:
        weight = _FITS[name][1](self, weight, axis)
    return weight[tuple(map(slice, shape))]

  def _size(self, name: str | None, size: int) -> int:
    """Returns the size of a dimension of all parts."""
    model, heads = self.model, self.heads
    if name == 'heads':
      per_part = heads.queries_per_part
      return size // model.num_heads * per_part * self.num_parts
    if name == 'kv_heads':
      return size // model.num_kv_heads * heads.num_kv_total
    if name == 'mlp':
      return -(-size // self.num_parts) * self.num_parts
    if name == 'vocab':
      unit = _WORD * math.lcm(self.num_parts, ports.SUM_PARTS)
      return -(-size // unit) * unit
    return size

  def _filled(self, name: str, weight: np.ndarray, axis: int) -> np.ndarray:
    size = self._size(name, weight.shape[axis])
    return heads_lib.filled(weight, axis, size)


# What is done to a weight along a logical axis, and what undoes it; zeros at
# the end are cut off anyway.
_Fit = Callable[[Layout, np.ndarray, int], np.ndarray]
_FITS: dict[str | None, tuple[_Fit, _Fit]] = {
  'heads': (
    lambda self, x, axis: self.heads.queries(x, axis),
    lambda self, x, axis: self.heads.queries_of_model(x, axis),
  ),
  'kv_heads': (
    lambda self, x, axis: self.heads.keys(x, axis),
    lambda self, x, axis: self.heads.keys_of_model(x, axis),
  ),
  'mlp': (
    lambda self, x, axis: self._filled('mlp', x, axis),
    lambda self, x, axis: x,
  ),
  'vocab': (
    lambda self, x, axis: self._filled('vocab', x, axis),
    lambda self, x, axis: x,
  ),
}


def _merged(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
  """Returns ranges of ids in order; ranges that overlap are joined."""
  found: list[tuple[int, int]] = []
  for first, end in sorted(ranges):
    if found and first <= found[-1][1]:
      found[-1] = found[-1][0], max(end, found[-1][1])
    else:
      found.append((first, end))
  return found


def separate(shapes: Any, model: model_config.ModelConfig) -> Any:
  """Returns the shapes of the params of a model with separate layers."""
  is_stacked = axes.LAYERS in shapes['params']
  model = dataclasses.replace(model, scan_layers=is_stacked)
  return jax.eval_shape(
    lambda tree: model_layout.unstack(tree, model)[0], shapes
  )


def unstacked(tree: dict[str, Any]) -> dict[str, Any]:
  """Returns the weights of a collection with a tree for each layer."""
  tree = dict(tree)
  stacked = tree.pop(axes.LAYERS, None)
  if stacked is None:
    return tree
  leaves, structure = jax.tree.flatten(
    stacked, is_leaf=lambda x: isinstance(x, list)
  )
  for n, layer in enumerate(zip(*leaves, strict=True)):
    tree[f'layer_{n}'] = jax.tree.unflatten(structure, layer)
  return tree


@dataclasses.dataclass(frozen=True)
class OfModel:
  """A weight of the model, which becomes an array when it is asked for."""

  weight: jax.Array  # of all parts
  shape: tuple[int, ...]  # of the model
  inverse: Callable[[np.ndarray], np.ndarray]  # of its layout

  @property
  def dtype(self) -> Any:
    return self.weight.dtype

  def __array__(self, dtype=None, copy=None) -> np.ndarray:
    del dtype, copy
    return np.asarray(self.inverse(np.asarray(self.weight)), order='C')
