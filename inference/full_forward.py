"""The cache-free forward: log-probabilities straight from the weights.

    forward = FullForward(params, config, dtype=..., vocab_size=...)
    logprobs = forward.logprobs(ids, first=num_prompt)

It computes one sequence alone, as training computes it: no pages, no batch, no
chunks, no cached prefix. The self-audit of the server and
`inference.server.replay` compare the answers of the engine with it.

Layers that are alike are one program, called once per layer, so that little is
compiled, and the caller can stop between two layers. Sequences are padded to a
power of two; a token sees nothing after it.
"""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from inference.engine import steps
from inference.engine.compiled import layered
from inference.sampling import logprobs as logprobs_lib
from models import (
  block as block_lib,
  execution as execution_lib,
  kv_cache,
  layout,
  model_config,
  transformer,
)
from models.layers import adapters as adapters_lib
from models.linear import invariant
from models.linear.stored import product as stored_product

_LEAST_LENGTH = 64  # of a padded sequence
_ROWS = 64  # logits that are computed together: few, since each has V numbers
# Differences of a log-probability, in nats, that the order of sums explains. At
# 200 new tokens of SmolLM2-135M on a CPU, the largest was 3e-5 in float32, 0.35
# in bfloat16, and 0.2 in float32 over a KV cache of int8.
_TOLERANCE = {'float32': 1e-2, 'float16': 0.2, 'bfloat16': 1.0}
# The precision of float32 products on a platform: TF32 has as many digits as
# float16, and TPUs multiply in bfloat16.
_PRODUCTS = {'gpu': 'float16', 'tpu': 'bfloat16'}


def tolerance(
  dtype: Any, *, platform: str = 'cpu', kv_dtype: Any = ''
) -> float:
  """Returns the largest difference that rounding explains, in nats.

  Args:
    dtype: dtype of the computation.
    platform: platform of the device.
    kv_dtype: dtype of the KV cache that the other side reads, if quantised.
  """
  name = jnp.dtype(dtype).name
  if name == 'float32':
    name = _PRODUCTS.get(platform, name)
  is_quantized = str(kv_dtype) in ('int8', 'fp8')
  least = _TOLERANCE['bfloat16'] if is_quantized else 0.0
  return max(_TOLERANCE[name], least)


class FullForward:
  """The forward pass of one model over whole sequences."""

  def __init__(
    self,
    params: Any,
    config: model_config.ModelConfig,
    *,
    dtype: Any,
    vocab_size: int,
    is_invariant: bool = False,
    adapter: adapters_lib.Tree | None = None,
    stored: stored_product.Computed = stored_product.in_blocks,
  ):
    """Takes the model.

    Args:
      params: the params of a checkpoint, or params as an engine lays them out.
      config: the config of the model.
      dtype: dtype of the computation.
      vocab_size: V, the number of ids that may be sampled.
      is_invariant: compute with the products of `--engine.numerics=invariant`,
        to compare bits. Attention then reads a cache, which is empty at first,
        because the invariant numerics are defined that way.
      adapter: the adapter beside the params; None: the base alone. To compare
        bits, pad it to the rank of the engine: `adapter_table.alone`.
      stored: how kernels in fewer bits are multiplied. To compare bits, pass
        the value of the engine: `Backend.execution.stored`.
    """
    is_stacked = 'layers' in params['params']
    config = dataclasses.replace(config, scan_layers=is_stacked)
    params, config = layout.unstack(params, config)
    if adapter is not None:
      params = {**params, adapters_lib.COLLECTION: adapter}
    self._shared, self._layers = layered.parted(params)
    execution = execution_lib.Execution()
    if is_invariant:
      execution = invariant.execution()
    execution = dataclasses.replace(execution, stored=stored)
    self._is_invariant, self._vocab_size = is_invariant, vocab_size
    self._model = transformer.Transformer(config, jnp.dtype(dtype), execution)

  def logprobs(
    self,
    ids: Sequence[int],
    first: int,
    pause: Callable[[], None] = lambda: None,
  ) -> np.ndarray:
    """Returns the log-probability of each of ids[first:], float32.

    Args:
      ids: the ids of the sequence.
      first: index of the first id to score, at least 1.
      pause: called between two programs; it may raise, to stop.
    """
    found = []
    for start, logits_RV in self.logits(ids, first, pause):
      targets = np.asarray(ids[start : start + _ROWS], np.int32)
      targets_R = np.zeros(_ROWS, np.int32)
      targets_R[: len(targets)] = targets
      found.append(np.asarray(_scored(logits_RV, targets_R))[: len(targets)])
    return np.concatenate(found)

  def logits(
    self,
    ids: Sequence[int],
    first: int,
    pause: Callable[[], None] = lambda: None,
  ) -> Iterator[tuple[int, jax.Array]]:
    """Yields pieces of the logits, each with the index of its first id.

    The arguments are the same as of `logprobs`. Logits are float32, [R, V];
    rows after the last id are padding.
    """
    hidden_TD = self._hidden(ids, pause)
    for start in range(first, len(ids), _ROWS):
      rows_R = np.minimum(np.arange(start, start + _ROWS), len(ids) - 1) - 1
      logits_RV = _logits(
        self._shared,
        hidden_TD,
        rows_R.astype(np.int32),
        model=self._model,
        vocab_size=self._vocab_size,
      )
      jax.block_until_ready(logits_RV)
      pause()
      yield start, logits_RV

  def _hidden(self, ids: Sequence[int], pause: Callable[[], None]) -> jax.Array:
    """Returns the final hidden states of a padded sequence, [T, D]."""
    model, config = self._model, self._model.config
    length = max(_LEAST_LENGTH, 1 << (len(ids) - 1).bit_length())
    tokens_1T = np.zeros((1, length), np.int32)
    tokens_1T[0, : len(ids)] = ids
    x_1TD, shared = _embedded(self._shared, tokens_1T, model=model)
    for n, variables in enumerate(self._layers):
      block = block_lib.Block(
        config, model.dtype, model.execution, config.layer(n), parent=None
      )
      x_1TD = _layer(
        variables, x_1TD, shared, block=block, is_cached=self._is_invariant
      )
      jax.block_until_ready(x_1TD)
      pause()
    return _normalised(self._shared, x_1TD, model=model)


@functools.partial(jax.jit, static_argnames=('model',))
def _embedded(params, tokens_1T, *, model):
  # A position past the context is padding; a table has no row for it.
  last = model.config.max_length - 1
  positions_1T = jnp.minimum(jnp.arange(tokens_1T.shape[1]), last)[None]
  return steps.apply(
    model,
    params,
    tokens_1T,
    positions_1T,
    # Some rotations depend on the length of the text: here, as in serving, on
    # the number of tokens before each token.
    has_cache=True,
    method='embedded',
  )


@functools.partial(
  jax.jit, donate_argnames=('x_1TD',), static_argnames=('block', 'is_cached')
)
def _layer(
  variables, x_1TD, shared, *, block: block_lib.Block, is_cached: bool
):
  variables = layout.whole_kernels(variables)
  entry = None
  if is_cached:
    (entry, *_) = kv_cache.init(
      block.config,
      batch_size=1,
      length=x_1TD.shape[1],
      dtype=block.dtype,
    )
  # Flax's type of the result fits no block in particular.
  result: Any = block.apply(variables, x_1TD, entry, *shared)
  return result[0]


@functools.partial(jax.jit, static_argnames=('model',))
def _normalised(params, x_1TD, *, model):
  return steps.apply(model, params, x_1TD, method='normalised')[0]


@functools.partial(jax.jit, static_argnames=('model', 'vocab_size'))
def _logits(params, hidden_TD, rows_R, *, model, vocab_size: int):
  logits_RV = steps.apply(model, params, hidden_TD[rows_R], method='unembed')
  return logits_RV[:, :vocab_size]


@jax.jit
def _scored(logits_RV, targets_R):
  wanted_R = jnp.zeros(targets_R.shape, jnp.int32)
  return logprobs_lib.logprobs(logits_RV, targets_R, wanted_R).chosen_B
