"""The parts of a train step, each measured alone: forward and backward.

    products    with the weights of all layers
    attention   of all layers, by the run's own kernel
    loss        with the head
    optimizer   clipping, the rule and the addition of updates
    rest        the remaining time of the step: norms, activations, embedding,
                and memory traffic between the parts

A part that is measured alone finds no operand in a cache that an earlier part
filled, so that a small negative rest is possible.
"""

from collections.abc import Callable
import time
from typing import Any

import jax
import jax.numpy as jnp
import optax

from models.attention import form as form_lib
from models.layers import cross_entropy
from training import learner as learner_lib

_REPEATS = 5


def seconds(learner: learner_lib.Learner, step_seconds: float):
  """Returns the seconds of each part of a step, by name."""
  parts = {
    'products': _products(learner),
    'attention': _attention(learner),
    'loss': _loss(learner),
    'optimizer': _optimizer(learner),
  }
  return parts | {'rest': step_seconds - sum(parts.values())}


def _timed(function: Callable[..., Any], *args: Any) -> float:
  jax.block_until_ready(function(*args))  # compiles
  start = time.perf_counter()
  for _ in range(_REPEATS):
    done = function(*args)
  jax.block_until_ready(done)
  return (time.perf_counter() - start) / _REPEATS


def _gradients(function, arrays, cotangent) -> float:
  def both(arrays, cotangent):
    out, pull = jax.vjp(function, *arrays)
    return out, pull(cotangent)

  return _timed(jax.jit(both), arrays, cotangent)


def _random(*shape: int, dtype: Any) -> jax.Array:
  key = jax.random.key(len(shape))
  return jax.random.normal(key, shape, jnp.float32).astype(dtype)


def _products(learner) -> float:
  model, data = learner.model, learner.experiment.data
  dtype, total = model.dtype, 0.0
  params = learner.abstract_state.params['params']
  layers = {k: v for k, v in params.items() if k.startswith('layer')}
  shapes: dict[tuple[int, int], int] = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(layers):
    if jax.tree_util.keystr(path).endswith("['kernel']"):
      number = leaf.shape[0] if leaf.ndim == 3 else 1
      shape = leaf.shape[-2:]
      shapes[shape] = shapes.get(shape, 0) + number

  def product(x_BTI, w_IO):
    return model.execution.linear(x_BTI, w_IO, None, dtype)

  rows = data.batch_size, data.row_length
  for (wide_in, wide_out), number in shapes.items():
    x_BTI = _random(*rows, wide_in, dtype=dtype)
    w_IO = _random(wide_in, wide_out, dtype=jnp.float32)
    dy_BTO = _random(*rows, wide_out, dtype=dtype)
    total += number * _gradients(product, (x_BTI, w_IO), dy_BTO)
  return total


def _attention(learner) -> float:
  model, data = learner.model, learner.experiment.data
  config, dtype = model.config, model.dtype
  batch, time_, width = data.batch_size, data.row_length, config.head_width
  q_BTHC = _random(batch, time_, config.num_heads, width, dtype=dtype)
  k_BKTC = _random(batch, config.num_kv_heads, time_, width, dtype=dtype)
  segments = jnp.ones((batch, time_), jnp.int32)

  def attend(q_BTHC, k_BKTC, v_BKTC):
    return model.execution.attend(
      q_BTHC,
      k_BKTC,
      v_BKTC,
      segment_ids_BT=segments,
      form=form_lib.of_layer(config, is_local=False),
    )

  once = _gradients(attend, (q_BTHC, k_BKTC, k_BKTC), q_BTHC)
  return config.num_layers * once


def _loss(learner) -> float:
  model, data = learner.model, learner.experiment.data
  config = model.config
  rows = data.batch_size, data.row_length
  hidden_BTD = _random(*rows, config.model_width, dtype=model.dtype)
  head_VD = _random(config.vocab_size, config.model_width, dtype=jnp.float32)
  targets_BT = jnp.zeros(rows, jnp.int32)
  form = cross_entropy.LossForm(dtype=jnp.dtype(model.dtype))

  def nll(hidden_BTD, head_VD):
    return model.execution.weighted_nll(
      hidden_BTD, head_VD, targets_BT, jnp.ones(rows), form
    ).loss

  return _gradients(nll, (hidden_BTD, head_VD), jnp.ones(()))


def _optimizer(learner) -> float:
  def zeros(tree):
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree)

  abstract = learner.abstract_state
  state = zeros((abstract.params, abstract.opt_state))
  grads = zeros(abstract.params)

  def update(state, grads):
    params, opt_state = state
    updates, opt_state = learner.optimizer.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state

  step = jax.jit(update, donate_argnums=0)

  def turn():
    nonlocal state
    state = step(state, grads)
    return state

  return _timed(turn)
