"""What every optimizer has in common: clipping, multipliers, decay, rates."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from models import transformer
from tests.helpers import tiny_models
from training import state as state_lib, step as step_lib
from training.objectives import next_token
from training.optimizer import chain, param_groups, update_rules

Config = chain.OptimizerConfig
STEPS = 50
MODEL = tiny_models.llama_like()
# A step of rate 0.1 from the first on.
PLAIN = {
  'schedule': 'constant', 'warmup_steps': 0, 'peak_lr': 0.1, 'clip_norm': 0.0,
}  # fmt: skip
RULES = {name: rule() for name, rule in update_rules.RULES.items()} | {
  'muon': update_rules.Muon(adam_peak_lr=0.02),
  'ademamix': update_rules.Ademamix(beta3=0.99),
}
every_optimizer = pytest.mark.parametrize('name', RULES)


def _params(value=1.0, **shapes):
  """A matrix of attention, a table and a vector."""
  shapes = {'kernel': (2, 3), 'embedding': (4, 2), 'scale': (2,)} | shapes
  full = lambda kind: {kind: jnp.full(shapes[kind], value)}  # noqa: E731
  return {
    'params': {
      'layer_0': {'attention': {'query': full('kernel')}},
      'embed': full('embedding'),
      'final_norm': full('scale'),
    }
  }


def _first_updates(grads, params=None, *, model=MODEL, **fields):
  """Returns what the first step adds to the matrix, the table, the vector."""
  config = Config(**PLAIN | fields)
  config.validate(STEPS)
  params = _params() if params is None else params
  optimizer = chain.make_optimizer(config, STEPS, model, params)
  updates, _ = optimizer.update(grads, optimizer.init(params), params)
  tree = updates['params']
  return (
    np.array(tree['layer_0']['attention']['query']['kernel']),
    np.array(tree['embed']['embedding']),
    np.array(tree['final_norm']['scale']),
  )


@pytest.mark.fast_cases(4)
@every_optimizer
def test_decay_is_the_rate_times_the_weight_in_every_group(name):
  """AdamW, line 12 of algorithm 2; whatever the multipliers of groups are."""
  matrix, table, vector = _first_updates(
    _params(0.0),
    rule=RULES[name],
    weight_decay=0.5,
    lr_multipliers=(('', 3.0),),
  )
  rate, table_rate = (0.1, 0.02) if name == 'muon' else (0.1, 0.1)
  # Schedule-free's step is a difference of two points of about 1.
  np.testing.assert_allclose(matrix, -rate * 0.5, rtol=5e-6)
  np.testing.assert_allclose(table, -table_rate * 0.5, rtol=5e-6)
  np.testing.assert_array_equal(vector, 0.0)


@pytest.mark.parametrize(
  ('mask', 'decayed'),
  [
    ('matrices', (True, True, False)),
    ('no_embeddings', (True, False, False)),
    ('all', (True, True, True)),
  ],
)
def test_the_mask_says_what_is_decayed(mask, decayed):
  found = _first_updates(_params(0.0), weight_decay_mask=mask)
  assert tuple(bool((x < 0).all()) for x in found) == decayed


@every_optimizer
def test_multipliers_scale_the_step_of_their_group_only(name):
  grads = jax.tree.map(
    lambda x: jnp.asarray(np.random.default_rng(0).normal(size=x.shape)),
    _params(),
  )
  fields = {'rule': RULES[name], 'weight_decay': 0.0}
  plain = _first_updates(grads, **fields)
  scaled = _first_updates(grads, **fields, lr_multipliers=(('query', 0.25),))
  assert np.abs(plain[0]).min() > 0
  # Schedule-free's step is a difference of two points: it is rounded twice.
  np.testing.assert_allclose(scaled[0], 0.25 * plain[0], atol=1e-6)
  jax.tree.map(np.testing.assert_array_equal, scaled[1:], plain[1:])


def test_what_is_frozen_is_not_counted_by_clipping():
  grads = _params(0.0)
  grads['params']['layer_0']['attention']['query']['kernel'] = jnp.array(
    [[30.0, 40.0, 0.0], [0.0, 0.0, 0.0]]
  )
  grads['params']['embed']['embedding'] += 1e6
  params = _params()
  config = Config(
    **PLAIN | {'clip_norm': 1.0, 'lr_multipliers': (('embed/', 0.0),)}
  )
  optimizer = chain.make_optimizer(config, STEPS, MODEL, params)
  _, state = optimizer.update(grads, optimizer.init(params), params)
  # First moments after one step: a tenth of the clipped gradient.
  mu = {
    jax.tree_util.keystr(path): np.array(leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    if '.mu' in jax.tree_util.keystr(path)
  }
  assert not any('embed' in name for name in mu)
  (matrix,) = (leaf for name, leaf in mu.items() if 'query' in name)
  np.testing.assert_allclose(matrix[0], [0.06, 0.08, 0.0], rtol=1e-6)


def test_frozen_parameters_are_served_as_they_are():
  config = Config(
    **PLAIN, rule=update_rules.ScheduleFree(), lr_multipliers=(('embed/', 0.0),)
  )
  params = _params()
  optimizer = chain.make_optimizer(config, STEPS, MODEL, params)
  updates, state = optimizer.update(params, optimizer.init(params), params)
  params = optax.apply_updates(params, updates)
  average = config.rule.average(state, params)
  np.testing.assert_array_equal(average['params']['embed']['embedding'], 1.0)
  # After one step the average is the iterate.
  np.testing.assert_allclose(
    average['params']['final_norm']['scale'], 1.0 - 0.1, rtol=1e-5
  )


@every_optimizer
def test_mup_scales_the_steps_of_hidden_matrices_but_not_muons(name):
  model = tiny_models.llama_like(mup_base_width=MODEL.model_width // 4)
  grads = jax.tree.map(
    lambda x: jnp.asarray(np.random.default_rng(0).normal(size=x.shape)),
    _params(),
  )
  fields = {'rule': RULES[name], 'weight_decay': 0.0}
  if name == 'adafactor':
    with pytest.raises(
      ValueError,
      match='scale_by_parameter: got True with model.mup_base_width = 6',
    ):
      _first_updates(grads, **fields, model=model)
    fields['rule'] = update_rules.Adafactor(scale_by_parameter=False)
  plain = _first_updates(grads, **fields)
  scaled = _first_updates(grads, **fields, model=model)
  expected = 1.0 if name == 'muon' else 0.25
  np.testing.assert_allclose(scaled[0], expected * plain[0], atol=1e-6)
  jax.tree.map(np.testing.assert_array_equal, scaled[1:], plain[1:])


def test_muon_without_a_matrix_to_orthogonalise_is_refused():
  config = Config(
    **PLAIN, rule=update_rules.Muon(), lr_multipliers=(('attention', 0.0),)
  )
  with pytest.raises(
    ValueError, match='optimizer.rule: got Muon without any matrix of atten'
  ):
    chain.make_optimizer(config, STEPS, MODEL, _params())


def test_the_chain_is_adamw():
  """Same updates as optax.adamw's, clipped by the global norm."""
  params = _params()
  grads = jax.tree.map(
    lambda x: jnp.asarray(np.random.default_rng(1).normal(size=x.shape)), params
  )
  rule = update_rules.AdamW()
  config = Config(rule=rule, warmup_steps=2, clip_norm=0.5)
  ours = chain.make_optimizer(config, STEPS, MODEL, params)
  theirs = optax.chain(
    optax.clip_by_global_norm(0.5),
    optax.adamw(
      chain.make_schedule(config, STEPS), rule.beta1, rule.beta2,
      rule.epsilon, weight_decay=config.weight_decay,
      mask=functools.partial(param_groups.is_decayed, 'matrices'),
    ),
  )  # fmt: skip
  state, expected_state = ours.init(params), theirs.init(params)
  for _ in range(3):
    updates, state = ours.update(grads, state, params)
    expected, expected_state = theirs.update(grads, expected_state, params)
    jax.tree.map(np.testing.assert_array_equal, updates, expected)


@pytest.mark.parametrize('name', ['adamw', 'muon', 'schedule_free'])
def test_the_state_has_one_structure_whatever_the_numbers(name):
  """So that a run can go on with other numbers than it began with."""
  structures = {
    jax.tree.structure(
      jax.eval_shape(
        chain.make_optimizer(
          Config(**PLAIN | {'rule': RULES[name]} | fields),
          STEPS,
          MODEL,
          _params(),
        ).init,
        _params(),
      )
    )
    for fields in (
      {},
      {'clip_norm': 1.0},
      {'weight_decay': 0.0, 'weight_decay_mask': 'all'},
      {'lr_multipliers': (('embed', 0.5),)},
    )
  }
  assert len(structures) == 1


# How far from the optimum each may be, of numbers of about 1. Steps shrink to
# nothing along a line, or are averaged. Those that do not shrink with the
# gradient, Lion's and Muon's, are off by the last ones of them: the rate falls
# by 2.5e-4 per step, and momentum carries ten.
_OFF = {
  'adamw': 1e-4,
  'muon': 2e-3,
  'adafactor': 1e-4,
  'lion': 5e-3,
  'schedule_free': 1e-3,
  'ademamix': 1e-3,
}


@every_optimizer
def test_the_known_optimum_is_reached(name):
  """Linear regression, badly conditioned: numpy knows the solution."""
  num_steps, rng = 400, np.random.default_rng(0)
  x_BI = rng.normal(size=(32, 6)) * np.linspace(1, 3, 6)
  y_BO = x_BI @ rng.normal(size=(6, 4)) + 0.1 * rng.normal(size=(32, 4))
  optimum, *_ = np.linalg.lstsq(x_BI, y_BO, rcond=None)
  schedule = (
    {'schedule': 'constant'}
    if name == 'schedule_free'
    else {'schedule': 'linear', 'end_lr': 0.0}
  )
  config = Config(
    **PLAIN | schedule,
    rule=RULES[name],
    weight_decay=0.0,
  )
  config.validate(num_steps)
  params = _params(0.5, kernel=optimum.shape)
  optimizer = chain.make_optimizer(config, num_steps, MODEL, params)

  def loss(params):
    matrix = params['params']['layer_0']['attention']['query']['kernel']
    return jnp.mean((jnp.asarray(x_BI) @ matrix - y_BO) ** 2)

  def take_step(carry, _):
    params, state = carry
    updates, state = optimizer.update(jax.grad(loss)(params), state, params)
    return (optax.apply_updates(params, updates), state), None

  @jax.jit
  def run(params):
    carry = params, optimizer.init(params)
    return jax.lax.scan(take_step, carry, length=num_steps)[0]

  params, state = run(params)
  if config.rule.keeps_average:
    params = config.rule.average(state, params)
  found = params['params']['layer_0']['attention']['query']['kernel']
  np.testing.assert_allclose(found, optimum, atol=_OFF[name])


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    (
      {'rule': 'sgd'},
      "optimizer.rule: got 'sgd', expected a rule of .*, as AdamW",
    ),
    (
      {'rule': update_rules.AdamW(beta2=1.0)},
      'rule.beta2: got 1.0, expected 0 <= beta < 1',
    ),
    (
      {'rule': update_rules.AdamW(beta1=-0.1)},
      'rule.beta1: got -0.1, expected 0 <= beta < 1',
    ),
    (
      {'rule': update_rules.AdamW(epsilon=0.0)},
      'epsilon: got 0.0, expected > 0',
    ),
    (
      {'rule': update_rules.AdamW(epsilon=math.inf)},
      'epsilon: got inf, expected a finite number',
    ),
    ({'peak_lr': 0.0}, 'peak_lr: got 0.0, expected > 0'),
    ({'clip_norm': -1.0}, 'clip_norm: got -1.0, expected >= 0'),
    ({'weight_decay': -0.1}, 'weight_decay: got -0.1, expected >= 0'),
    (
      {'weight_decay_mask': 'kernels'},
      "weight_decay_mask: got 'kernels', expected one of matrices, no_embed",
    ),
    (
      {'lr_multipliers': (('a', -1),)},
      r"got \('a', -1\) in .*, expected pairs",
    ),
    (
      {'rule': update_rules.AdamW(state_dtype='float16')},
      "state_dtype: got 'float16', expected one of float32",
    ),
    (
      {'rule': update_rules.AdamW(beta2=0.999999)},
      'rule.beta2: got 0.999999, expected at most 0.999992: float32 rounds',
    ),
    (
      {'rule': update_rules.Muon(momentum=1.0)},
      'rule.momentum: got 1.0, expected 0 <= beta < 1',
    ),
    (
      {'rule': update_rules.Muon(adam_peak_lr=0.0)},
      'rule.adam_peak_lr: got 0.0, expected > 0',
    ),
    (
      {'rule': update_rules.Muon(newton_schulz_steps=0)},
      'rule.newton_schulz_steps: got 0, expected > 0',
    ),
    (
      {'rule': update_rules.Ademamix(beta3=0.0)},
      'rule.beta3: got 0.0, expected > 0',
    ),
    (
      {'rule': update_rules.ScheduleFree()},
      "schedule: got 'cosine' with rule ScheduleFree, expected constant",
    ),
    (
      {'rule': update_rules.ScheduleFree(beta1=0.0), 'schedule': 'constant'},
      'beta1: got 0.0, expected > 0',
    ),
  ],
)
def test_impossible_settings_are_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    Config(**{'warmup_steps': 1, **fields}).validate(STEPS)


def _moments(state):
  return [x for x in jax.tree.leaves(state.opt_state) if x.ndim]


@functools.cache
def _learner(state_dtype):
  model = transformer.Transformer(tiny_models.llama_like(scan_layers=True))
  optimizer = chain.make_optimizer(
    Config(
      rule=update_rules.AdamW(state_dtype=state_dtype),
      warmup_steps=2,
      peak_lr=1e-2,
    ),
    STEPS,
    model.config,
    state_lib.abstract_params(model),
  )
  init = jax.jit(functools.partial(state_lib.init, model, optimizer))
  train_step = jax.jit(
    step_lib.make_train_step(model, next_token.NextToken(), optimizer)
  )
  return init, train_step


def _train(state_dtype):
  init, train_step = _learner(state_dtype)
  state = init(jax.random.key(0))
  losses = []
  for index in range(STEPS):
    batch = tiny_models.batch(num_segments=2, num_padding=3, seed=index % 4)
    state, metrics = train_step(state, batch)
    losses.append(float(metrics['loss']))
  return state, np.array(losses)


@pytest.mark.slow
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
