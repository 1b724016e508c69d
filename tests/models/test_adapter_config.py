"""Which layers are adapted, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import adapter_config, transformer
from models.layers import adapters
from tests.helpers import tiny_models


def _params(**fields):
  model = transformer.Transformer(
    tiny_models.llama_like(**{'vocab_size': 64, 'num_layers': 2, **fields})
  )
  tokens = jnp.zeros((1, 1), jnp.int32)
  return jax.jit(model.init)(jax.random.key(0), tokens)['params']


_EXPERTS = {
  'mlp_width': 0,
  'num_experts': 4,
  'num_active_experts': 2,
  'num_shared_experts': 1,
  'expert_width': 24,
}
_Config = adapter_config.AdapterConfig


def test_every_linear_layer_is_adapted_and_nothing_else():
  names = set(_Config(rank=2).choices(_params()))
  assert names == {
    f'layer_{n}/{owner}'
    for n in range(2)
    for owner in (
      'attention/query', 'attention/key', 'attention/value', 'attention/out',
      'mlp/gate', 'mlp/up', 'mlp/down',
    )
  }  # fmt: skip


def test_experts_keep_their_matrices_and_routers_are_asked_for():
  params = _params(**_EXPERTS)
  names = {n.split('/', 1)[1] for n in _Config(rank=2).choices(params)}
  assert 'moe/shared/up' in names
  assert not any('expert' in name or 'router' in name for name in names)
  routers = _Config(rank=2, layers='router').choices(params)
  assert set(routers) == {'layer_0/moe/router', 'layer_1/moe/router'}
  with pytest.raises(ValueError, match='which matches layer_0/moe/expert_down'):
    _Config(rank=2, layers='moe/').choices(params)


def test_groups_have_ranks_and_alphas_of_their_own():
  groups = (('attention/query', 5, 10.0), ('attention/', 0, 1.0))
  chosen = _Config(rank=2, alpha=8.0, groups=groups).choices(_params())
  assert chosen['layer_1/attention/query'] == (5, 10.0, 2.0)
  assert chosen['layer_1/mlp/up'] == (2, 8.0, 4.0)
  assert not any('attention/key' in name for name in chosen)


def test_the_scale_of_rslora_is_that_of_a_root():
  chosen = _Config(rank=16, alpha=8.0, rslora=True).choices(_params())
  assert chosen['layer_0/mlp/up'].scale == 2.0


def test_layers_may_be_chosen_by_number():
  names = _Config(rank=2, layers='layer_1/mlp').choices(_params())
  assert set(names) == {f'layer_1/mlp/{x}' for x in ('gate', 'up', 'down')}


def test_a_start_is_random_and_changes_nothing():
  params = _params(scan_layers=True)
  tree = adapter_config.init(_Config(rank=3), params, jax.random.key(0))
  seen = []
  for path, entry in adapters.entries(tree):
    bound = entry['a'].shape[1] ** -0.5
    assert 0.8 * bound < np.abs(entry['a']).max() <= bound, path
    assert not np.any(entry['b'])
    seen.append(float(entry['a'].ravel()[0]) * entry['a'].shape[1] ** 0.5)
  assert len(set(seen)) == len(seen)  # no two layers start alike


def test_the_norms_of_columns_are_those_of_the_whole_matrix():
  params = _params(scan_layers=True)
  kernel = params['layers']['mlp']['up']['kernel']
  rng = np.random.default_rng(0)
  a, b = (
    jnp.asarray(rng.normal(size=(2, *shape)), jnp.float32)
    for shape in ((kernel.shape[1], 3), (3, kernel.shape[2]))
  )
  found = adapter_config.column_norms(kernel, {'a': a, 'b': b}, 0.5)
  whole = np.linalg.norm(kernel + 0.5 * a @ b, axis=1)
  np.testing.assert_allclose(found, whole, rtol=1e-5)


@pytest.mark.parametrize(
  ('fields', 'expected'),
  [
    (
      {'alpha': 8.0},
      'adapter.alpha: got 8.0 with adapter.rank = 0, which',
    ),
    ({'dora': True}, 'adapter.dora: got True with adapter.rank = 0'),
    (
      {'groups': (('mlp', 2, 1.0),)},
      'adapter.groups: got .* with adap',
    ),
    ({'rank': -1}, 'adapter.rank: got -1, expected at least 0'),
    (
      {'rank': 2, 'alpha': 0.0},
      'adapter.alpha: got 0.0, expected a fini',
    ),
    (
      {'rank': 2, 'base': 'nf4'},
      'adapter.base: got .nf4., expected one of',
    ),
    (
      {'rank': 2, 'layers': '('},
      'adapter.layers: got .*expected a regu',
    ),
    ({'rank': 2, 'groups': (('mlp', 2),)}, 'expected triples'),
    ({'rank': 2, 'groups': (('mlp', 2.5, 1.0),)}, 'expected triples'),
  ],
)
def test_values_that_no_run_can_use_are_refused(fields, expected):
  with pytest.raises(ValueError, match=expected):
    _Config(**fields).validate()


@pytest.mark.parametrize(
  ('fields', 'expected'),
  [
    ({'layers': 'attn'}, "adapter.layers: got 'attn', which matches no linear"),
    ({'groups': (('x', 2, 1.0),)}, "adapter.groups: got 'x', which matches no"),
    ({'layers': 'embed'}, 'which matches embed: tables of tokens and matrices'),
    ({'rank': 33}, 'got 33 for layer_0/.* expected at most'),
    ({'groups': (('attention|mlp', 0, 1.0),)}, 'which leave no layer to adapt'),
  ],
)
def test_layers_that_do_not_exist_or_fit_are_refused(fields, expected):
  config = _Config(**{'rank': 2, **fields})
  with pytest.raises(ValueError, match=expected):
    config.choices(_params())
