"""Adapters in the model: the function, merges, and several in one batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import adapter_config, execution, kv_cache, layout, transformer
from models.layers import adapters
from models.linear import invariant
from tests.helpers import tiny_models

MODELS = {
  'llama': {},
  'biased': {'use_bias': True, 'norm': 'layernorm', 'mlp': 'gelu'},
  'latent': {
    'num_kv_heads': 4,
    'latent_width': 12,
    'query_latent_width': 10,
    'rotary_width': 4,
  },
  'experts': {
    'mlp_width': 0,
    'num_experts': 4,
    'num_active_experts': 2,
    'num_shared_experts': 1,
    'expert_width': 24,
  },
}
# Of logits of up to about 3, in float32: another order of sums, up to 1.03e-5
# on one processor and less on others. A wrong adapter changes them by 1e-2.
TOLERANCE = 3e-5


def _model(kind='llama', **fields):
  fields = {'vocab_size': 64, 'num_layers': 2, **MODELS[kind], **fields}
  return transformer.Transformer(tiny_models.llama_like(**fields))


def _params(model):
  tokens = jnp.zeros((1, 1), jnp.int32)
  params = jax.jit(model.init)(jax.random.key(0), tokens)
  # As initialised, the logits would hardly depend on the layers.
  return jax.tree.map(lambda x: 2 * x if x.ndim > 1 else x, params)


def _adapters(params, *, rank=3, seed=1, **fields):
  """Returns adapters with random values, as a model reads them."""
  config = adapter_config.AdapterConfig(rank=rank, **fields)
  tree = adapter_config.init(config, params['params'], jax.random.key(seed))
  leaves, structure = jax.tree.flatten(tree)
  keys = jax.random.split(jax.random.key(seed), len(leaves))
  leaves = [
    x + 0.1 * jax.random.normal(key, x.shape)
    for x, key in zip(leaves, keys, strict=True)
  ]
  tree = jax.tree.unflatten(structure, leaves)
  return adapter_config.effective(config, params['params'], tree)


def _tokens(rows=3, length=16):
  return jax.random.randint(jax.random.key(7), (rows, length), 0, 64)


def _logits(model, params, tree=None, tokens=None):
  variables = params if tree is None else {**params, 'adapters': tree}
  tokens = _tokens() if tokens is None else tokens
  return np.asarray(jax.jit(model.apply)(variables, tokens)[0])


def _merged(params, tree):
  merged = jax.tree.map(lambda x: x, params)
  for path, entry in adapters.entries(tree):
    owner = merged['params']
    for name in path.split('/'):
      owner = owner[name]
    owner['kernel'] = adapters.merged(owner['kernel'], entry)
  return merged


@pytest.mark.slow
@pytest.mark.parametrize('dora', [False, True])
@pytest.mark.parametrize('scan', [False, True])
@pytest.mark.parametrize('kind', MODELS)
def test_a_merge_computes_the_same(kind, scan, dora):
  model = _model(kind, scan_layers=scan)
  params = _params(model)
  tree = _adapters(params, dora=dora)
  adapted = _logits(model, params, tree)
  assert np.abs(adapted - _logits(model, params)).max() > 0.02
  np.testing.assert_allclose(
    adapted, _logits(model, _merged(params, tree)), atol=TOLERANCE, rtol=0
  )


@pytest.mark.slow
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('dora', [False, True])
@pytest.mark.parametrize('kind', MODELS)
def test_a_new_adapter_has_the_bits_of_the_base(kind, dora, dtype):
  model = _model(kind).clone(dtype=jnp.dtype(dtype))
  params = _params(model)
  config = adapter_config.AdapterConfig(rank=4, dora=dora)
  tree = adapter_config.init(config, params['params'], jax.random.key(1))
  tree = adapter_config.effective(config, params['params'], tree)
  np.testing.assert_array_equal(
    _logits(model, params, tree), _logits(model, params)
  )


@pytest.mark.slow
@pytest.mark.parametrize('kind', MODELS)
def test_prefill_and_decode_steps_are_the_whole_pass(kind):
  model = _model(kind)
  params = _params(model)
  variables = {**params, 'adapters': _adapters(params)}
  tokens = _tokens()
  whole, _ = model.apply(variables, tokens)
  cache = kv_cache.init(model.config, batch_size=3, length=16)
  positions = jnp.broadcast_to(jnp.arange(16), tokens.shape)
  step = jax.jit(model.apply)
  found = []
  for part in (slice(0, 9), *(slice(n, n + 1) for n in range(9, 16))):
    logits, cache = step(variables, tokens[:, part], positions[:, part], cache)
    found.append(logits)
  np.testing.assert_allclose(
    jnp.concatenate(found, axis=1), whole, atol=TOLERANCE, rtol=0
  )


def test_layouts_keep_adapters():
  model = _model(scan_layers=True)
  params = _params(model)
  variables = {**params, 'adapters': _adapters(params)}
  apart, config = layout.unstack(variables, model.config)
  assert set(apart['adapters']) == {'layer_0', 'layer_1'}
  np.testing.assert_allclose(
    _logits(transformer.Transformer(config), apart, apart['adapters']),
    _logits(model, params, variables['adapters']),
    atol=TOLERANCE,
    rtol=0,
  )
  again, _ = layout.stack(apart, config)
  jax.tree.map(np.testing.assert_array_equal, again, variables)


def _three(params, **fields):
  """Returns adapters that differ in rank, in layers and in kind."""
  return [
    _adapters(params, rank=2, seed=2, **fields),
    _adapters(params, rank=5, seed=3, layers='mlp/|moe/shared'),
    _adapters(params, rank=3, seed=4, layers='attention/out', dora=True),
  ]


@pytest.mark.slow
@pytest.mark.parametrize('ports', ['fast', 'invariant'])
@pytest.mark.parametrize('kind', ['llama', 'biased', 'experts'])
def test_each_row_of_a_batch_has_its_own_adapter(kind, ports):
  model = _model(kind)
  if ports == 'invariant':
    model = model.clone(execution=invariant.execution())
  params = _params(model)
  trees = _three(params)
  table = adapters.table(trees)
  slots = jnp.array([0, 3, 1, 2])
  tokens = _tokens(rows=4)
  slots_BT = jnp.broadcast_to(slots[:, None], tokens.shape)
  found = _logits(model, params, adapters.routed(table, slots_BT), tokens)
  for row, slot in enumerate(slots):
    tree = trees[slot - 1] if slot else None
    alone = _logits(model, params, tree, tokens)[row]
    np.testing.assert_allclose(found[row], alone, atol=TOLERANCE, rtol=0)


@pytest.mark.slow
def test_a_row_does_not_depend_on_the_adapters_of_others():
  model = _model().clone(execution=invariant.execution())
  params = _params(model)
  table = adapters.table(_three(params))
  tokens = _tokens(rows=4)

  def logits(*slots):
    slots_BT = jnp.broadcast_to(jnp.array(slots)[:, None], tokens.shape)
    return _logits(model, params, adapters.routed(table, slots_BT), tokens)

  first = logits(1, 2, 3, 0)
  other = logits(1, 0, 2, 0)
  for row in (0, 3):
    np.testing.assert_array_equal(first[row], other[row])
  # Slot 0 has the bits of the base.
  np.testing.assert_array_equal(
    first[3], _logits(model, params, None, tokens)[3]
  )
  # Values of a slot that a token does not have may be anything.
  broken = jax.tree.map(lambda x: x, table)
  entry = broken['layer_0']['mlp']['up']
  entry['a'] = entry['a'].at[:, 2].set(jnp.inf)
  table = broken
  np.testing.assert_array_equal(logits(1, 0, 3, 0)[0], first[0])


@pytest.mark.slow
def test_slots_may_differ_within_a_row():
  model = _model()
  params = _params(model)
  trees = _three(params)
  tokens = _tokens(rows=1)
  slots_1T = (jnp.arange(16) >= 8)[None].astype(jnp.int32) * 2
  found = _logits(
    model, params, adapters.routed(adapters.table(trees), slots_1T), tokens
  )
  base = _logits(model, params, None, tokens)
  np.testing.assert_allclose(found[0, :8], base[0, :8], atol=TOLERANCE, rtol=0)
  assert np.abs(found[0, 8:] - base[0, 8:]).max() > 0.01


@pytest.mark.slow
def test_a_table_of_latent_projections_is_refused():
  model = _model('latent')
  params = _params(model)
  table = adapters.table([_adapters(params)])
  slots_BT = jnp.ones((3, 16), jnp.int32)
  with pytest.raises(ValueError, match='got several adapters of key_up, expec'):
    model.apply(
      {**params, 'adapters': adapters.routed(table, slots_BT)}, _tokens()
    )


@pytest.mark.slow
@pytest.mark.parametrize('remat', execution.REMAT[:3])
def test_gradients_reach_adapters_alone(remat):
  model = _model(scan_layers=True).clone(
    execution=execution.Execution(remat=remat)
  )
  params = _params(model)
  tree = _adapters(params)

  def loss(tree):
    return jnp.sum(
      jnp.square(model.apply({**params, 'adapters': tree}, _tokens())[0])
    )

  gradients = jax.jit(jax.grad(loss))(tree)
  for path, entry in adapters.entries(gradients):
    for name, gradient in entry.items():
      assert np.abs(gradient).max() > 0, (path, name)
  # Along one direction, the difference quotient says the same.
  by = jax.tree.map(lambda g: g / jnp.linalg.norm(g.ravel()), gradients)

  def at(step):
    return loss(jax.tree.map(lambda x, d: x + step * d, tree, by))

  slope = (at(3e-4) - at(-3e-4)) / 6e-4
  expected = sum(jnp.linalg.norm(g.ravel()) for g in jax.tree.leaves(gradients))
  np.testing.assert_allclose(slope, expected, rtol=1e-2)
