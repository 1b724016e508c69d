"""The glossary of axes: one letter per array axis, one name per logical axis.

Arrays whose shape is known end in it: `x_BTD`, `logits_BTV`. A digit is a
literal axis (`mask_1TS`). Einsum strings use the same letters.

  B batch                      H query heads
  T tokens in this call        K key/value heads
  S tokens in memory (cache)   G query heads per key/value head, H / K
  D model width                C channels per head
  F feed-forward width         V vocabulary
  N layers                     R queries of a tile or of a chunk
  E experts                    M tokens of all rows, B x T
  A active experts             J copies of tokens for experts, M x A
  P pages in a pool            Q tokens per page
  Y keys and values of heads   L pages of a sequence, its page table
    in turn, 2K                X chunks of prompts in a step
  U width of a latent, from which keys and values are computed

A logical axis names the meaning of an axis of a parameter or an activation.
Only `parallel/rules.py` knows the mesh axis, if any, that splits it.
"""

from collections.abc import Callable
from typing import Any

import jax

# Logical axes of the residual stream, [B, T, D], and of a gathered embedding.
STREAM = ('batch', 'time', 'width')
# Logical axes of the final hidden states. Stages may split `head_time`: these
# states are laid out once per pass, not once per layer.
HEAD_STREAM = ('batch', 'head_time', 'width')
VOCAB = 'vocab'
WIDTH = 'width'

# Logical axes of parameters, by the name of the module that owns them. Matrices
# are stored [in, out]. The embeddings and the head are [vocab, width], which
# suits a lookup, a tied head and a row-wise matrix-vector product.
_MATRIX_AXES: dict[str, tuple[str | None, ...]] = {
  'query': ('embed', 'heads'),
  'key': ('embed', 'kv_heads'),
  'value': ('embed', 'kv_heads'),
  'out': ('heads', 'embed'),
  'gate': ('embed', 'mlp'),
  'up': ('embed', 'mlp'),
  'down': ('mlp', 'embed'),
  # Each device computes whole latents, because its heads need them.
  'query_down': ('embed', None),
  'query_up': ('embed', 'heads'),
  'latent': ('embed', None),
  'key_rope': ('embed', None),
  'key_up': ('embed', 'heads'),
  'value_up': ('embed', 'heads'),
  # Every device routes its own tokens. The weights of experts have their own
  # axes: parallel/expert_parallel.py gathers them, not the compiler.
  'router': ('embed', None),
  'router_correction': (None, None),  # a bias: its first axis is dropped
  'expert_gate': ('experts', 'expert_embed', 'mlp'),
  'expert_up': ('experts', 'expert_embed', 'mlp'),
  'expert_down': ('experts', 'mlp', 'expert_embed'),
  'embed': ('vocab', 'embed'),
  'head': ('vocab', 'embed'),
  'position_embed': ('position', 'embed'),
}
# Modules that own tables; rows of a table are looked up, or are classes.
TABLES = ('embed', 'head', 'position_embed')
_NORMS = (
  'attention_norm', 'attention_norm_after', 'query_norm', 'key_norm',
  'query_latent_norm', 'latent_norm', 'mlp_norm', 'mlp_norm_after',
  'final_norm',
)  # fmt: skip
LAYERS = 'layers'
# The collection of an objective's own parameters. A head reads the residual
# stream; its outputs have no name.
HEADS = 'heads'
_HEAD_AXES: dict[str, tuple[str | None, ...]] = {
  'kernel': ('embed', None),
  'bias': (None,),
}
# The collection of adapters, see models/layers/adapters.py, and the axis
# between the two matrices of an adapter.
ADAPTERS = 'adapters'
RANK = 'rank'


def param_axes(
  params: Any, is_leaf: Callable[[Any], bool] | None = None
) -> Any:
  """Returns a tuple of axis names, or None, for every parameter, as a tree.

  Args:
    params: arrays or shapes.
    is_leaf: whether a node counts as one parameter: a stored kernel then has
      the axes of the floats in its place.

  Raises:
    ValueError: a parameter that this file does not know.
  """
  return jax.tree_util.tree_map_with_path(_leaf_axes, params, is_leaf=is_leaf)


def names_of(path: tuple[Any, ...], leaf: Any) -> tuple[str | None, ...]:
  """Returns the logical axes of one parameter; raises as `param_axes`."""
  return _leaf_axes(path, leaf)


def names(path: tuple[Any, ...]) -> list[str]:
  """Returns the keys of a parameter's path, outermost module first."""
  return [str(getattr(part, 'key', part)) for part in path]


def _adapter_axes(
  kind: str, into: str | None, out: str | None
) -> tuple[str | None, ...]:
  return {
    'a': (into, RANK), 'b': (RANK, out), 'magnitude': (out,)
  }[kind]  # fmt: skip


def _stored_axes(kind: str, axes: tuple[str | None, ...]):
  """Returns the axes of an array of a kernel of models/linear/stored/."""
  if axes[0] == VOCAB:
    axes = axes[::-1]  # the kernel of its product, see models/layers/table.py
  *leading, _, out = axes
  # Inputs are not split: tiles of inputs need not divide over the devices.
  own = {'order': (None,), 'gain': ()}.get(kind, (out, None))
  return (*leading, *own)


def _leaf_axes(path: tuple[Any, ...], leaf: Any) -> tuple[str | None, ...]:
  keys = names(path)
  owner, kind = keys[-2], keys[-1]
  if keys[0] == HEADS and kind in _HEAD_AXES:
    axes: tuple[str | None, ...] = _HEAD_AXES[kind]
  elif keys[0] == ADAPTERS and owner in _MATRIX_AXES:
    axes = _adapter_axes(kind, *_MATRIX_AXES[owner])
  elif owner in ('kernel', 'embedding') and keys[-3] in _MATRIX_AXES:
    axes = _stored_axes(kind, _MATRIX_AXES[keys[-3]])
  elif owner in _NORMS and kind in ('scale', 'bias'):
    axes = ('norm',)
  elif owner in _MATRIX_AXES and kind in ('kernel', 'embedding'):
    axes = _MATRIX_AXES[owner]
  elif owner in _MATRIX_AXES and kind == 'bias':
    axes = _MATRIX_AXES[owner][1:]
  else:
    raise ValueError(
      f'no logical axes for parameter {"/".join(keys)}: got an unknown'
      ' name, expected a name of models/axes.py; add it there'
    )
  if LAYERS in keys:
    axes = (LAYERS, *axes)
  if len(axes) != leaf.ndim:
    raise ValueError(
      f'parameter {"/".join(keys)}: got {leaf.ndim} axes, expected'
      f' {len(axes)} {axes}; correct models/axes.py or the module'
    )
  return axes
