"""Directions against formulas of their own, and stacks against their parts."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from models import axes, transformer
from tests.helpers import tiny_models
from training import state as state_lib
from training.optimizer import chain, update_rules

Config = chain.OptimizerConfig
MODEL = tiny_models.llama_like()
STEPS = 20
# Nothing but the direction: a step of rate 1, neither decayed nor clipped.
_BARE = {
  'peak_lr': 1.0, 'schedule': 'constant', 'warmup_steps': 0,
  'weight_decay': 0.0, 'clip_norm': 0.0,
}  # fmt: skip
_SHAPE = 8, 12


def _tree(matrix):
  """The smallest model: one matrix of attention."""
  return {'params': {'layer_0': {'attention': {'query': {'kernel': matrix}}}}}


def _matrix(tree):
  return np.array(jax.tree.leaves(tree)[0], np.float64)


def _gradients(number=4, seed=0):
  return np.random.default_rng(seed).normal(size=(number, *_SHAPE))


def _run(gradients, *, start=None, **fields):
  """Returns the matrix after each step, and the last state."""
  start = np.zeros(_SHAPE) if start is None else start
  params = _tree(jnp.asarray(start, jnp.float32))
  config = Config(**_BARE | fields)
  config.validate(STEPS)
  optimizer = chain.make_optimizer(config, STEPS, MODEL, params)
  state = optimizer.init(params)
  update = jax.jit(optimizer.update)
  found = []
  for gradient in gradients:
    grads = _tree(jnp.asarray(gradient, jnp.float32))
    updates, state = update(grads, state, params)
    params = optax.apply_updates(params, updates)
    found.append(_matrix(params))
  return found, state, params


def _adam(gradients, *, beta1=0.9, beta2=0.95, epsilon=1e-8):
  """Algorithm 1 of arXiv:1412.6980."""
  m, v, x = (np.zeros(_SHAPE) for _ in range(3))
  for t, g in enumerate(gradients, 1):
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g**2
    m_hat, v_hat = m / (1 - beta1**t), v / (1 - beta2**t)
    x = x - m_hat / (np.sqrt(v_hat) + epsilon)
    yield x


def _lion(gradients, *, beta1=0.9, beta2=0.99):
  """Algorithm 2 of arXiv:2302.06675."""
  m, x = np.zeros(_SHAPE), np.zeros(_SHAPE)
  for g in gradients:
    x = x - np.sign(beta1 * m + (1 - beta1) * g)
    m = beta2 * m + (1 - beta2) * g
    yield x


def _ademamix(gradients, *, alpha=5.0, beta3=0.99):
  """Algorithm 1 of arXiv:2409.03137, with equation 4 for its schedulers."""
  beta1, beta2, epsilon = 0.9, 0.95, 1e-8
  m1, m2, v, x = (np.zeros(_SHAPE) for _ in range(4))
  for t, g in enumerate(gradients, 1):
    done = (t - 1) / STEPS  # optax counts from 0
    low, high = math.log(beta1), math.log(beta3)
    slow = math.exp(low * high / ((1 - done) * high + done * low))
    m1 = beta1 * m1 + (1 - beta1) * g
    m2 = slow * m2 + (1 - slow) * g
    v = beta2 * v + (1 - beta2) * g**2
    m1_hat, v_hat = m1 / (1 - beta1**t), v / (1 - beta2**t)
    x = x - (m1_hat + done * alpha * m2) / (np.sqrt(v_hat) + epsilon)
    yield x


def _adafactor(gradients):
  """Algorithm 4 of arXiv:1804.04235, with absolute steps clipped to RMS 1."""
  rows, columns, x = np.zeros(_SHAPE[0]), np.zeros(_SHAPE[1]), np.zeros(_SHAPE)
  for t, g in enumerate(gradients, 1):
    beta = 1 - t**-0.8
    rows = beta * rows + (1 - beta) * (g**2 + 1e-30).mean(axis=1)
    columns = beta * columns + (1 - beta) * (g**2 + 1e-30).mean(axis=0)
    u = g / np.sqrt(np.outer(rows, columns) / rows.mean())
    x = x - u / max(1, np.sqrt((u**2).mean()))
    yield x


@pytest.mark.parametrize(
  ('rule', 'oracle'),
  [
    (update_rules.AdamW(), _adam),
    (update_rules.Lion(beta2=0.99), _lion),
    (update_rules.Ademamix(beta3=0.99), _ademamix),
    (
      update_rules.Adafactor(min_factored_size=4, scale_by_parameter=False),
      _adafactor,
    ),
  ],
  ids=lambda value: type(value).__name__ * isinstance(value, update_rules.Rule),
)
def test_steps_are_those_of_the_paper(rule, oracle):
  gradients = _gradients()
  found, _, _ = _run(gradients, rule=rule)
  # float32 against float64, over four steps of about 1.
  np.testing.assert_allclose(found, list(oracle(gradients)), atol=2e-5)


def test_adafactor_relative_to_the_parameter_is_scaled_by_its_rms():
  start = _gradients(1, seed=7)[0]
  (absolute,), *_ = _run(
    _gradients(1),
    start=start,
    rule=update_rules.Adafactor(scale_by_parameter=False),
  )
  (relative,), *_ = _run(
    _gradients(1), start=start, rule=update_rules.Adafactor()
  )
  np.testing.assert_allclose(
    relative - start,
    (absolute - start) * np.sqrt((start**2).mean()),
    atol=1e-5,
  )


def test_schedule_free_is_its_recursion():
  """Equations 3 to 5 of arXiv:2405.15682, with AdamW's step for z."""
  beta1, beta2, epsilon, decay = 0.9, 0.95, 1e-8, 0.1
  warmup, peak = 2, 0.5
  start, gradients = _gradients(1, seed=7)[0], _gradients(5)
  config = {
    'rule': update_rules.ScheduleFree(), 'warmup_steps': warmup,
    'peak_lr': peak, 'weight_decay': decay,
  }  # fmt: skip
  found, state, params = _run(gradients, start=start, **config)
  x = y = z = start
  v, total = np.zeros(_SHAPE), 0.0
  for t, (g, y_found) in enumerate(zip(gradients, found, strict=True)):
    rate, next_rate = (peak * min(s / warmup, 1) for s in (t, t + 1))
    v = beta2 * v + (1 - beta2) * g**2
    direction = g / (np.sqrt(v / (1 - beta2 ** (t + 1))) + epsilon)
    z = z - rate * (direction + decay * y)
    # optax weighs by the squared rate of the step to come.
    total += next_rate**2
    share = next_rate**2 / total
    x = (1 - share) * x + share * z
    y = (1 - beta1) * z + beta1 * x
    np.testing.assert_allclose(y_found, y, atol=2e-5)
  average = update_rules.ScheduleFree().average(state, params)
  np.testing.assert_allclose(_matrix(average), x, atol=5e-5)


def test_only_schedule_free_has_other_parameters_to_evaluate():
  _, state, params = _run(_gradients(1))
  keeping = [
    name for name, rule in update_rules.RULES.items() if rule.keeps_average
  ]
  assert keeping == ['schedule_free']
  with pytest.raises(NotImplementedError, match='AdamW keeps no average'):
    update_rules.AdamW().average(state, params)


@pytest.mark.parametrize('shape', [(8, 12), (24, 8)])
def test_muon_orthogonalises(shape):
  gradient = np.random.default_rng(0).normal(size=shape)
  (found,), *_ = _run(
    [gradient], start=np.zeros(shape), rule=update_rules.Muon()
  )
  # Five iterations bring singular values to within about 0.3 of 1 (Jordan et
  # al.), scaled by the root of out / in where that is larger than 1.
  scale = max(1, shape[1] / shape[0]) ** 0.5
  values = np.linalg.svd(found, compute_uv=False) / scale
  assert (values > 0.6).all()
  assert (values < 1.3).all()
  # And keeps singular vectors: found = -U S V^T with a symmetric U^T found V.
  u, _, vt = np.linalg.svd(gradient, full_matrices=False)
  inner = -u.T @ found @ vt.T / scale
  np.testing.assert_allclose(inner, np.diag(np.diag(inner)), atol=1e-4)
  assert (np.diag(inner) > 0).all()


# Slow enough that rounding to nearest leaves them at 1.2 to 2.9.
_SLOW = [
  *(update_rules.AdamW(beta1=b, beta2=b) for b in (0.98, 0.99, 0.996, 0.999)),
  update_rules.Lion(beta2=0.996),
  update_rules.Muon(momentum=0.98),
  update_rules.Ademamix(beta1=0.98, beta2=0.996, beta3=0.999),
]


@pytest.mark.fast_cases(5)
@pytest.mark.parametrize('first', [10.0, 0.1], ids=['down', 'up'])
@pytest.mark.parametrize('rule', _SLOW, ids=str)
def test_bfloat16_moments_reach_a_new_level(rule, first):
  """After gradients of another size, by the mean over the matrix."""
  config = Config(
    **_BARE, rule=dataclasses.replace(rule, state_dtype='bfloat16')
  )
  config.validate(STEPS)
  params = _tree(jnp.zeros((16, 32)))
  optimizer = chain.make_optimizer(config, STEPS, MODEL, params)

  def take_step(state, gradient):
    grads = _tree(jnp.full((16, 32), gradient))
    return optimizer.update(grads, state, params)[1], None

  slowest = max(getattr(rule, name) for name in rule.betas)
  gradients = np.ones(int(12 / (1 - slowest)), np.float32)
  gradients[:20] = first
  state, _ = jax.jit(functools.partial(jax.lax.scan, take_step))(
    optimizer.init(params), gradients
  )
  moments = [x for x in jax.tree.leaves(state) if x.ndim == 2]
  assert moments
  assert {x.dtype for x in moments} == {jnp.dtype(jnp.bfloat16)}
  for moment in moments:
    values = np.array(moment, np.float64)
    # A stationary moment deviates by about 2^-4, by the variance of rounding
    # over twice the decay. Six errors of the mean of 512: p < 1e-8.
    assert values.std() < 0.1
    assert values.mean() == pytest.approx(1.0, abs=6 * 2**-4 / 512**0.5)


def test_stochastic_rounding_is_right_on_average_and_keeps_what_fits():
  x = np.float32([1.0, -1.5, 0.0, np.inf, -np.inf, 3.0e38, 1e-30])
  key = jax.random.key(0)
  fits = x.astype(jnp.bfloat16).astype(np.float32)
  np.testing.assert_array_equal(
    np.array(update_rules.round_stochastically(key, fits), np.float32), fits
  )
  assert np.isnan(update_rules.round_stochastically(key, jnp.full(3, np.nan)))[
    0
  ]
  for value in (1 + 2**-10, -(2 - 2**-9), 1e-3, 2**-7 * 1.001):
    rounded = np.array(
      update_rules.round_stochastically(key, jnp.full(10_000, value)),
      np.float64,
    )
    apart = np.unique(rounded)
    assert len(apart) == 2
    assert apart[1] - apart[0] <= 2**-7 * abs(value)
    # A mean of 10,000 is off by less than 1/200 of the distance, 5 times over.
    assert abs(rounded.mean() - value) < 0.025 * (apart[1] - apart[0])


_STACKED = tiny_models.mixture(scan_layers=True, num_experts=3)
# The others go number by number: there are no matrices to tell apart.
_STACK_FIELDS = {
  'muon': {'rule': update_rules.Muon()},
  'adafactor': {'rule': update_rules.Adafactor(min_factored_size=4)},
}


@pytest.mark.fast_cases(2)
@pytest.mark.parametrize('is_staged', [False, True])
@pytest.mark.parametrize('name', _STACK_FIELDS)
def test_a_stack_is_treated_as_its_matrices_one_by_one(name, is_staged):
  """Layers [N, ...] and experts [N, E, ...] against trees of single matrices.

  What each layer and each expert gets is what it would get as the one matrix of
  a model, whether layers are gone through in turn or, in stages, at once.
  """
  params = state_lib.abstract_params(transformer.Transformer(_STACKED))
  rng = np.random.default_rng(0)
  params, grads = (
    jax.tree.map(
      lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), params
    )
    for _ in range(2)
  )
  stacked = _update(name, params, grads, is_staged=is_staged)
  stacked = stacked['params']['layers']
  params, grads = (tree['params']['layers'] for tree in (params, grads))
  for path in (('attention', 'query'), ('moe', 'expert_down')):
    found, param, grad = (
      np.array(tree[path[0]][path[1]]['kernel'])
      for tree in (stacked, params, grads)
    )
    for index in np.ndindex(found.shape[:-2]):
      alone = _update(name, _tree(param[index]), _tree(grad[index]))
      # Sums in another order.
      np.testing.assert_allclose(found[index], _matrix(alone), atol=1e-5)
  # A vector per layer is a vector, not a row of a matrix.
  scale, param, grad = (
    np.array(tree['mlp_norm']['scale']) for tree in (stacked, params, grads)
  )
  for layer in range(_STACKED.num_layers):
    alone = _update(
      name,
      *(_with_vector(tree[layer]) for tree in (param, grad)),
    )
    np.testing.assert_allclose(
      scale[layer], alone['params']['final_norm']['scale'], atol=1e-6
    )


def _with_vector(vector):
  tree = _tree(np.ones((4, 4), np.float32))  # Muon is refused without any
  tree['params']['final_norm'] = {'scale': vector}
  return tree


def _update(name, params, grads, **options):
  params = jax.tree.map(jnp.asarray, params)
  leaves, treedef = jax.tree.flatten(params)
  init, update = _jitted(
    name, treedef, tuple(x.shape for x in leaves), tuple(options.items())
  )
  updates, _ = update(grads, init(params), params)
  return updates


@functools.cache
def _jitted(name, treedef, shapes, options):
  config = Config(**_BARE | _STACK_FIELDS[name])
  params = treedef.unflatten(
    [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  )
  optimizer = chain.make_optimizer(
    config, STEPS, _STACKED, params, **dict(options)
  )
  return optimizer.init, jax.jit(optimizer.update)


@pytest.mark.parametrize('shape', [(8, 8), (8, 12), (12, 8)])
def test_the_axes_of_factored_moments_are_the_ones_that_remain(shape):
  """Told by numbers: a gradient that differs along one axis only.

  Of a square matrix, shapes cannot say what is a row.
  """
  params = {
    'params': {'layers': {'mlp': {'gate': {'kernel': jnp.ones((3, *shape))}}}}
  }
  config = Config(
    **_BARE,
    rule=update_rules.Adafactor(min_factored_size=4),
  )
  optimizer = chain.make_optimizer(config, STEPS, MODEL, params)
  state = state_lib.TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    opt_state=optimizer.init(params),
    key=jax.random.key(0),
  )
  names = state_lib.logical_axes(state, axes.param_axes(params))
  num_checked = 0
  for axis, varied in enumerate(('layers', 'embed', 'mlp')):
    size = (3, *shape)[axis]
    ramp = jnp.expand_dims(
      jnp.arange(1.0, size + 1), [a for a in range(3) if a != axis]
    )
    grads = jax.tree.map(lambda x, ramp=ramp: x * ramp, params)
    _, opt_state = optimizer.update(grads, state.opt_state, params)

    def check(leaf, leaf_names, varied=varied):
      nonlocal num_checked
      if leaf.ndim < 2 or leaf.shape[-1] == 1:
        return  # a count, or a placeholder
      num_checked += 1
      for own_axis, name in enumerate(leaf_names):
        varies = not np.allclose(np.diff(leaf, axis=own_axis), 0)
        assert varies == (name == varied)

    jax.tree.map(check, opt_state, names.opt_state)
  assert num_checked == 3 * 2  # rows and columns


def test_state_of_an_unknown_shape_is_refused():
  params = _tree(jnp.ones((4, 6)))
  state = state_lib.TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    opt_state=_tree(jnp.ones((5, 5))),
    key=jax.random.key(0),
  )
  with pytest.raises(
    ValueError, match=r'got shape \(5, 5\) for a parameter of \(4, 6\)'
  ):
    state_lib.logical_axes(state, axes.param_axes(params))
