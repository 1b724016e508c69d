"""The inputs of a layer's kernels on a text, from the model's own function.

    moments, routed = inputs_of(block, params, batches)
    batches = advance(block, params, batches)

A port `Execution.linear` keeps the input of every kernel that passes through
it. A kernel whose product does not pass through the port is not seen here, and
is not quantised either. Of a mixture of experts, a port `apply_experts` keeps
its input and the experts of each token; `experts.py` makes the moments of each
expert of them.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from frozen import format as frozen_format
from models import (
  block as block_lib,
  model_config,
  transformer,
)
from models.linear import plain
from models.moe import dispatch

_BATCH = 4  # rows of text that are computed together


class Moments(NamedTuple):
  """Statistics of the input x of a kernel, over all tokens."""

  second_II: Any  # mean of x x^T
  mean_I: Any  # mean of |x|
  largest_I: Any  # largest |x|

  def scaled(self, scale_I: Any) -> 'Moments':
    """Returns the moments of x * scale, for a positive scale."""
    return Moments(
      self.second_II * scale_I[:, None] * scale_I[None],
      self.mean_I * scale_I,
      self.largest_I * scale_I,
    )


class Routed(NamedTuple):
  """The input of the experts of a layer, for all N tokens."""

  x_ND: np.ndarray  # float32
  ids_NA: np.ndarray  # the experts of each token


class Batch(NamedTuple):
  """The input of a layer for some rows of text."""

  x_BTD: Any
  shared: transformer.Shared


def block(config: model_config.ModelConfig, n: int) -> block_lib.Block:
  """Returns layer n of a model, computed in float32."""
  model = transformer.Transformer(config)
  return block_lib.Block(
    config, model.dtype, model.execution, config.layer(n), parent=None
  )


def embedded(
  config: model_config.ModelConfig, outer: Any, tokens_RT: np.ndarray
) -> list[Batch]:
  """Returns the input of the first layer.

  Args:
    config: config of the model.
    outer: params outside of the layers.
    tokens_RT: rows of text.
  """
  model = transformer.Transformer(config)
  return [
    Batch(*_embedded({'params': outer}, tokens_RT[n : n + _BATCH], model=model))
    for n in range(0, len(tokens_RT), _BATCH)
  ]


@functools.partial(jax.jit, static_argnames=('model',))
def _embedded(variables, tokens_BT, *, model):
  # Some rotations depend on the length of the text. Here, as in serving, they
  # depend on the tokens up to each token.
  return model.apply(variables, tokens_BT, has_cache=True, method='embedded')


def inputs_of(
  block: block_lib.Block, params: Any, batches: Sequence[Batch]
) -> tuple[Mapping[str, Moments], Routed | None]:
  """Returns the inputs of a layer's kernels.

  Returns:
    The moments of each kernel's input, by its path in the layer, without
    kernels of experts; and the input of these, None in a layer without any.
  """
  num_tokens = sum(x_BTD.shape[0] * x_BTD.shape[1] for x_BTD, _ in batches)
  found, routed = None, []
  for batch in batches:
    sums, of_experts = _sums(params, *batch, block=block)
    found = sums if found is None else _added(found, sums)
    if of_experts is not None:
      routed.append(
        [np.asarray(x.reshape(-1, x.shape[-1])) for x in of_experts]
      )
  assert found is not None, 'a text has at least one row'
  moments = {
    path: Moments(
      sums.second_II / num_tokens, sums.mean_I / num_tokens, sums.largest_I
    )
    for path, sums in found.items()
  }
  if not routed:
    return moments, None
  return moments, Routed(*map(np.concatenate, zip(*routed, strict=True)))


def advance(
  block: block_lib.Block, params: Any, batches: Sequence[Batch]
) -> list[Batch]:
  """Returns the input of the next layer."""
  return [
    Batch(_applied(params, *batch, block=block), batch.shared)
    for batch in batches
  ]


@functools.partial(jax.jit, static_argnames=('block',))
def _applied(params, x_BTD, shared, *, block):
  result: Any = block.apply({'params': params}, x_BTD, None, *shared)
  return result[0]


@functools.partial(jax.jit, static_argnames=('block',))
def _sums(params, x_BTD, shared, *, block):
  port = _Recorder(params)
  execution = dataclasses.replace(
    block.execution, linear=port, apply_experts=port.apply_experts
  )
  recording = block_lib.Block(
    block.config, block.dtype, execution, block.layer, parent=None
  )
  recording.apply({'params': params}, x_BTD, None, *shared)
  return {path: _sum(x) for path, x in port.inputs.items()}, port.routed


def _sum(x) -> Moments:
  x_NI = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
  second_II = jnp.matmul(x_NI.T, x_NI, precision=jax.lax.Precision.HIGHEST)
  return Moments(second_II, jnp.abs(x_NI).sum(0), jnp.abs(x_NI).max(0))


@functools.partial(jax.jit, donate_argnums=(0,))
def _added(a, b):
  return {
    path: Moments(
      a[path].second_II + b[path].second_II,
      a[path].mean_I + b[path].mean_I,
      jnp.maximum(a[path].largest_I, b[path].largest_I),
    )
    for path in a
  }


class _Recorder:
  """The ports `linear` and `apply_experts` that keep the inputs of kernels.

  It is used while one program is traced. There, a kernel is the same object in
  the params and in the call.
  """

  def __init__(self, params: Any):
    self._paths = {
      id(leaf): path
      for path, leaf in frozen_format.leaves_by_path(params).items()
    }
    self.inputs: dict[str, jax.Array] = {}
    self.routed: tuple[jax.Array, jax.Array] | None = None

  def __call__(self, x, w_IO, bias_O, dtype):
    path = self._paths.get(id(w_IO), '')
    if path.endswith('/kernel'):
      self.inputs[path] = x
    return plain.linear(x, w_IO, bias_O, dtype)

  def apply_experts(self, x_BTD, ids_BTA, gates_BTA, kernels, dtype):
    self.routed = x_BTD.astype(jnp.float32), ids_BTA
    return dispatch.apply_experts(x_BTD, ids_BTA, gates_BTA, kernels, dtype)
