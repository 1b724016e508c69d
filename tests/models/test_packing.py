"""Packing invariance: a document is the same function in any row, and served.

For every kind of rotary scaling, of layer, of attention and of routing.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import kv_cache, model_config, transformer
from models.attention import rope_scaling
from tests.helpers import tiny_models
from tests.helpers.training import tiny_experiment
from training import execution

ORIGINAL = 6  # a trained length between those of the documents
LENGTHS = 4, 9, 6
_DIVISORS = {
  'short_divisors': (1.0, 1.5, 2.0),
  'long_divisors': (1.0, 4.0, 9.0),
}
SCALINGS = {
  'none': {},
  'linear': {'factor': 3.0},
  'llama3': {
    'factor': 8.0, 'original_length': ORIGINAL, 'low_frequency': 1.0,
    'high_frequency': 4.0,
  },
  'yarn': {
    'factor': 4.0, 'original_length': ORIGINAL, 'beta_fast': 32.0,
    'beta_slow': 1.0, 'amplitude': 1.1,
  },
  'dynamic': {'factor': 2.0, 'original_length': ORIGINAL},
  'longrope': {'original_length': ORIGINAL, 'amplitude': 1.2, **_DIVISORS},
}  # fmt: skip
_GROUPS = {'num_expert_groups': 4, 'num_active_groups': 2}
OPTIONS = {
  **{
    f'rope {kind}': {
      'rope_scaling': rope_scaling.RopeScaling(kind=kind, **fields)
    }
    for kind, fields in SCALINGS.items()
  },
  'local base': {
    'rope_local_base': 100.0, 'window': 3, 'layer_pattern': 'lg',
    'rope_scaling': rope_scaling.RopeScaling(
      kind='dynamic', **SCALINGS['dynamic']
    ),
  },
  'partial rotation': {'rotary_width': 2},
  **{f'layers {kind}': {'window': 3, 'layer_pattern': kind}
     for kind in model_config.LAYER_KINDS},
  'softcap': {'attention_softcap': 2.0},
  'scale': {'query_scale': 0.7},
  'latent': {
    'latent_width': 16, 'rotary_width': 2, 'num_kv_heads': 4, 'value_width': 8,
  },
  'norms of heads': {'qk_norm': True},
  'norms of all heads': {'qk_norm': True, 'qk_norm_whole': True},
  'parallel residual': {'parallel_residual': True},
}  # fmt: skip
MIXTURES = {
  **{f'router {score}': {'router_score': score}
     for score in model_config.SCORES},
  'groups': _GROUPS,
  'correction': {'router_correction': True, 'router_score': 'sigmoid'},
}  # fmt: skip


def _configs():
  make = functools.partial(tiny_models.llama_like, init_std=0.3)
  found = {name: make(**fields) for name, fields in OPTIONS.items()}
  make = functools.partial(tiny_models.mixture, init_std=0.3)
  found |= {name: make(**fields) for name, fields in MIXTURES.items()}
  return found | {'learned': tiny_models.gpt2_like(init_std=0.3)}


CONFIGS = _configs()
every_option = pytest.mark.parametrize('name', CONFIGS)
# Sums in another order, on logits of up to about 20.
TOLERANCE = 1e-4


@functools.cache
def _model(name):
  model = transformer.Transformer(CONFIGS[name])
  params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
  params = jax.tree.map(
    lambda x: x + 0.1 * jax.random.normal(jax.random.key(1), x.shape), params
  )
  return params, jax.jit(model.apply)


def _documents(name, seed=0):
  rng = np.random.default_rng(seed)
  vocab_size = CONFIGS[name].vocab_size
  return [rng.integers(0, vocab_size, length) for length in LENGTHS]


def _packed(name, documents, row_length=24, numbers=(1, 2, 3)):
  """Returns the logits of each document, all of them in one row."""
  params, apply = _model(name)
  tokens, positions, segments = (np.zeros((1, row_length), int) for _ in 'abc')
  starts = np.cumsum([2, *map(len, documents)])  # padding in front, too
  places = [slice(a, b) for a, b in zip(starts[:-1], starts[1:], strict=True)]
  for number, place, document in zip(numbers, places, documents, strict=True):
    tokens[0, place], segments[0, place] = document, number
    positions[0, place] = np.arange(len(document))
  logits_BTV, _ = apply(params, tokens, positions, None, segments)
  return [np.asarray(logits_BTV[0, place]) for place in places]


@pytest.mark.slow
@every_option
def test_a_document_is_the_same_in_any_row(name):
  """Alone, among neighbours, among others in another order and numbering."""
  params, apply = _model(name)
  documents, others = _documents(name), _documents(name, seed=1)
  among = _packed(name, documents)
  for i, document in enumerate(documents):
    alone_BTV, _ = apply(params, jnp.asarray(document[None]))
    np.testing.assert_allclose(among[i], alone_BTV[0], atol=TOLERANCE)
    assert np.ptp(alone_BTV) > 1.0
    changed = [*others[:i], document, *others[i + 1 :]]
    again = _packed(name, changed[::-1], numbers=(17, 5, 1))[::-1]
    np.testing.assert_allclose(again[i], among[i], atol=TOLERANCE)


@pytest.mark.fast_cases(1)
@every_option
def test_packed_training_computes_what_is_served(name):
  """A prefill in two chunks, then single steps, over a cache."""
  params, apply = _model(name)
  config = CONFIGS[name]
  scaling = config.rope_scaling
  documents = _documents(name)
  for document, trained in zip(
    documents, _packed(name, documents), strict=True
  ):
    if scaling.kind == 'dynamic' and len(document) > scaling.original_length:
      continue  # such rows are refused, see below
    cache = kv_cache.init(config, batch_size=1, length=12)
    found, ends = [], [2, *range(3, len(document) + 1)]
    for start, end in zip([0, *ends], ends, strict=False):
      logits_BTV, cache = apply(
        params,
        jnp.asarray(document[None, start:end]),
        jnp.arange(start, end)[None],
        cache,
      )
      found.append(logits_BTV[0])
    np.testing.assert_allclose(np.concatenate(found), trained, atol=TOLERANCE)


def test_every_member_of_every_table_is_tried():
  assert set(SCALINGS) == set(rope_scaling.KINDS)
  patterns = {config.layer_pattern for config in CONFIGS.values()}
  assert patterns >= set(model_config.LAYER_KINDS)
  assert {c.positions for c in CONFIGS.values()} == set(model_config.POSITIONS)
  scores = {c.router_score for c in CONFIGS.values() if c.num_experts}
  assert scores == set(model_config.SCORES)


def test_longrope_takes_the_table_of_the_model_for_every_text():
  """With another max_length the same weights are another function."""
  config = CONFIGS['rope longrope']
  params, apply = _model('rope longrope')
  short = transformer.Transformer(
    tiny_models.llama_like(
      init_std=0.3, max_length=ORIGINAL, rope_scaling=config.rope_scaling
    )
  )
  tokens_BT = jnp.asarray(_documents('rope longrope')[0][None])
  difference = apply(params, tokens_BT)[0] - short.apply(params, tokens_BT)[0]
  assert np.abs(difference).max() > 0.1


@pytest.mark.parametrize('kind', rope_scaling.KINDS)
def test_training_refuses_rows_that_serving_cannot_compute(kind):
  def check(row_length):
    experiment = tiny_experiment.make(
      model=CONFIGS[f'rope {kind}'], data={'row_length': row_length}
    )
    execution.check_model(experiment)

  check(ORIGINAL)
  if kind != 'dynamic':
    check(ORIGINAL + 1)
    return
  with pytest.raises(
    ValueError, match='data.row_length: got 7 .* = dynamic, expected at most'
  ):
    check(ORIGINAL + 1)
