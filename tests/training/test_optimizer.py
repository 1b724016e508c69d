"""Schedules against closed forms; what AdamW decays and clips."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from models import axes, transformer
from tests import fixtures
from training import (
  checkpoint,
  config as config_lib,
  optimizer as optimizer_lib,
  state as state_lib,
  step as step_lib,
)
from training.objectives import next_token

Config = optimizer_lib.OptimizerConfig
PEAK, END, WARMUP, STEPS = 2e-3, 2e-4, 10, 50


def _closed_form(schedule, step):
  if step < WARMUP:
    return PEAK * step / WARMUP
  progress = (step - WARMUP) / (STEPS - WARMUP)
  if schedule == 'constant':
    return PEAK
  if schedule == 'linear':
    return PEAK + (END - PEAK) * progress
  if schedule == 'cosine':
    return END + (PEAK - END) * 0.5 * (1 + math.cos(math.pi * progress))
  decay = max(0.0, (step - (STEPS - 20)) / 20)
  return PEAK + (END - PEAK) * decay


@pytest.mark.parametrize('schedule', optimizer_lib.SCHEDULES)
def test_schedule_values(schedule):
  config = Config(
    peak_lr=PEAK,
    end_lr=END,
    schedule=schedule,
    warmup_steps=WARMUP,
    decay_steps=20 if schedule == 'wsd' else 0,
  )
  config.validate(STEPS)
  rate = optimizer_lib.make_schedule(config, STEPS)
  for step in (0, 1, WARMUP - 1, WARMUP, 25, STEPS - 20, STEPS - 1, STEPS):
    assert float(rate(step)) == pytest.approx(
      _closed_form(schedule, step), rel=1e-5, abs=1e-10
    )


def test_without_warmup_the_first_step_has_the_peak_rate():
  rate = optimizer_lib.make_schedule(
    Config(peak_lr=PEAK, warmup_steps=0), STEPS
  )
  assert float(rate(0)) == pytest.approx(PEAK)


def test_weight_decay_is_decoupled_and_spares_vectors():
  config = Config(
    schedule='constant', warmup_steps=0, peak_lr=0.1, weight_decay=0.5,
    clip_norm=0.0,
  )  # fmt: skip
  optimizer = optimizer_lib.make_optimizer(config, STEPS)
  params = {
    'query': {'kernel': jnp.ones((2, 2))},
    'final_norm': {'scale': jnp.ones(2)},
  }
  zeros = jax.tree.map(jnp.zeros_like, params)
  updates, _ = optimizer.update(zeros, optimizer.init(params), params)
  # AdamW, line 12 of algorithm 2: theta loses rate * decay * theta.
  np.testing.assert_allclose(updates['query']['kernel'], -0.05, rtol=1e-6)
  np.testing.assert_array_equal(updates['final_norm']['scale'], 0.0)


def test_clipping_is_by_the_global_norm():
  config = Config(
    schedule='constant', warmup_steps=0, weight_decay=0.0, clip_norm=1.0,
    beta1=0.0,
  )  # fmt: skip
  optimizer = optimizer_lib.make_optimizer(config, STEPS)
  params = {'query': {'kernel': jnp.zeros((1, 2))}}
  state = optimizer.init(params)
  grads = {'query': {'kernel': jnp.array([[30.0, 40.0]])}}
  _, state = optimizer.update(grads, state, params)
  (mu,) = [
    leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    if 'mu' in jax.tree_util.keystr(path)
  ]
  np.testing.assert_allclose(mu, [[0.6, 0.8]], rtol=1e-6)


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'schedule': 'step'}, "got 'step', expected one of constant"),
    ({'peak_lr': -1.0}, 'peak_lr: got -1.0, expected > 0'),
    ({'peak_lr': float('nan')}, 'peak_lr: got nan, expected > 0'),
    ({'peak_lr': float('inf')}, 'peak_lr: got inf, expected a finite number'),
    ({'beta2': 1.0}, 'beta2: got 1.0, expected 0 <= beta < 1'),
    ({'clip_norm': -1.0}, 'clip_norm: got -1.0, expected >= 0'),
    ({'warmup_steps': 51}, 'warmup_steps = 51 and decay_steps = 0'),
    ({'schedule': 'wsd'}, "got 0 with schedule 'wsd'"),
    ({'decay_steps': 5}, "got 5 with schedule 'cosine'"),
    ({'state_dtype': 'float16'}, "got 'float16', expected one of float32"),
    (
      {'state_dtype': 'bfloat16', 'beta2': 0.999},
      'beta2: got 0.999 with state_dtype = bfloat16, expected at most 0.99609',
    ),
    (
      {'state_dtype': 'bfloat16', 'beta1': 0.997},
      'beta1: got 0.997 with state_dtype = bfloat16',
    ),
  ],
)
def test_impossible_settings_are_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    Config(**{'warmup_steps': 1, **fields}).validate(STEPS)


@pytest.mark.parametrize('state_dtype', optimizer_lib.STATE_DTYPES)
def test_moments_are_laid_out_like_their_parameters(state_dtype):
  model = transformer.Transformer(fixtures.llama_like(scan_layers=True))
  optimizer = optimizer_lib.make_optimizer(
    Config(state_dtype=state_dtype), 1000
  )
  state = jax.eval_shape(
    lambda key: state_lib.init(model, optimizer, key), jax.random.key(0)
  )
  names = state_lib.logical_axes(
    state, optimizer, axes.param_axes(state.params)
  )
  is_axes = lambda x: type(x) is tuple and not hasattr(x, '_fields')  # noqa: E731
  shapes = jax.tree.leaves(state)
  found = jax.tree.leaves(
    names,
    is_leaf=lambda x: (
      is_axes(x) and all(name is None or isinstance(name, str) for name in x)
    ),
  )
  assert len(shapes) == len(found)
  for leaf, leaf_axes in zip(shapes, found, strict=True):
    assert len(leaf_axes) == leaf.ndim
  mu = [
    leaf_axes
    for (path, _), leaf_axes in zip(
      jax.tree_util.tree_leaves_with_path(state), found, strict=True
    )
    if 'mu' in jax.tree_util.keystr(path)
    and "['gate']" in jax.tree_util.keystr(path)
  ]
  assert mu == [('layers', 'embed', 'mlp')]


def test_the_chain_is_adamw():
  """Same updates, and a state of the same structure, as optax.adamw's."""
  params = {'query': {'kernel': jnp.array([[1.0, -2.0], [0.5, 3.0]])}}
  grads = {'query': {'kernel': jnp.array([[0.1, 0.2], [-0.3, 0.4]])}}
  config = Config(clip_norm=0.0, warmup_steps=0)
  ours = optimizer_lib.make_optimizer(config, STEPS)
  theirs = optax.adamw(
    optimizer_lib.make_schedule(config, STEPS), config.beta1, config.beta2,
    config.epsilon, weight_decay=config.weight_decay, mask=axes.is_decayed,
  )  # fmt: skip
  state, expected_state = ours.init(params), theirs.init(params)
  for _ in range(3):
    updates, state = ours.update(grads, state, params)
    expected, expected_state = theirs.update(grads, expected_state, params)
    jax.tree.map(np.testing.assert_array_equal, updates, expected)
  assert jax.tree.structure(state) == jax.tree.structure(expected_state)


def _moments(state):
  return [x for x in jax.tree.leaves(state.opt_state) if x.ndim]


@functools.cache
def _learner(state_dtype):
  model = transformer.Transformer(fixtures.llama_like(scan_layers=True))
  optimizer = optimizer_lib.make_optimizer(
    Config(state_dtype=state_dtype, warmup_steps=2, peak_lr=1e-2), STEPS
  )
  init = jax.jit(functools.partial(state_lib.init, model, optimizer))
  train_step = jax.jit(
    step_lib.make_train_step(model, next_token.next_token, optimizer)
  )
  return init, train_step


def _train(state_dtype, state=None, *, first=0, last=STEPS):
  init, train_step = _learner(state_dtype)
  state = init(jax.random.key(0)) if state is None else state
  losses = []
  for index in range(first, last):
    batch = fixtures.batch(num_segments=2, num_padding=3, seed=index % 4)
    state, metrics = train_step(state, batch)
    losses.append(float(metrics['loss']))
  return state, np.array(losses)


def test_bfloat16_moments_take_half_the_memory_and_learn_the_same():
  state, losses = _train('bfloat16')
  reference_state, reference = _train('float32')
  moments, reference_moments = _moments(state), _moments(reference_state)
  assert {x.dtype for x in moments} == {jnp.dtype(jnp.bfloat16)}
  num_bytes = sum(x.nbytes for x in moments)
  assert 2 * num_bytes == sum(x.nbytes for x in reference_moments)
  assert {x.dtype for x in jax.tree.leaves(state.params)} == {
    jnp.dtype(jnp.float32)
  }
  # The first update is computed before anything is rounded.
  np.testing.assert_array_equal(losses[:2], reference[:2])
  # Rounding to 8 bits moves each update by about 2^-9 of itself at random; on
  # its way down from 4.1 the loss may end up that far off, several times over.
  assert reference[-1] < 0.8 * reference[0]
  assert not np.array_equal(losses, reference)
  np.testing.assert_allclose(losses, reference, rtol=0.02)


def test_bfloat16_moments_resume_bit_for_bit(tmp_path):
  whole, losses = _train('bfloat16', last=6)
  half, _ = _train('bfloat16', last=3)
  checkpoints = checkpoint.Checkpoints(tmp_path, config_lib.CheckpointConfig())
  checkpoints.save(half, checkpoint.Progress())
  checkpoints.wait()
  restored, _ = checkpoints.restore(_abstract(half))
  resumed, rest = _train('bfloat16', restored, first=3, last=6)
  np.testing.assert_array_equal(rest, losses[3:])
  jax.tree.map(
    np.testing.assert_array_equal,
    (resumed.params, resumed.opt_state),
    (whole.params, whole.opt_state),
  )
  # Cast, moments would go on as others than those that were saved.
  init, _ = _learner('float32')
  with pytest.raises(
    ValueError, match='optimizer state: got bfloat16, expected float32; set'
  ):
    checkpoints.restore(_abstract(init(jax.random.key(0))))
  checkpoints.close()


def _abstract(state):
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
  )
