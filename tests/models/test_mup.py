"""The table of muP: initial scales, learning rates and constants.

tests/training/test_mup.py shows that steps have one size at every width.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import mup, transformer
from models.attention import dense
from tests.helpers import tiny_models

# Four times the base, heads wider by as much.
RATIO = 4
WIDE = tiny_models.llama_like(
  model_width=96,
  head_width=24,
  mlp_width=160,
  mup_base_width=24,
  mup_base_head_width=6,
)
MIXTURE = tiny_models.mixture(
  model_width=96, expert_width=80, mup_base_width=24, scan_layers=True
)
STANDARD = {'mup_base_width': 0, 'mup_base_head_width': 0}
HIDDEN = ('query', 'key', 'value', 'out', 'gate', 'up', 'down')
HIDDEN += ('expert_gate', 'expert_up', 'expert_down')


@functools.cache
def _params(config):
  model = transformer.Transformer(config)
  return jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))


def _by_owner(tree):
  """Yields (owner, kind, leaf)."""
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    yield path[-2].key, path[-1].key, leaf


@pytest.mark.slow
@pytest.mark.parametrize('config', [WIDE, MIXTURE], ids=['dense', 'mixture'])
def test_initial_scales(config):
  """The same key draws the same numbers, at another scale."""
  standard = _params(dataclasses.replace(config, **STANDARD))
  for (owner, kind, ours), (*_, theirs) in zip(
    _by_owner(_params(config)), _by_owner(standard), strict=True
  ):
    scale = 1.0
    if kind == 'kernel':
      scale = 1 / RATIO if owner == 'router' else RATIO**-0.5
    np.testing.assert_allclose(ours, scale * theirs, rtol=1e-6, err_msg=owner)


@pytest.mark.parametrize('config', [WIDE, MIXTURE], ids=['dense', 'mixture'])
def test_learning_rates(config):
  config = dataclasses.replace(config, use_bias=not config.num_experts)
  shapes = jax.eval_shape(
    transformer.Transformer(config).init,
    jax.random.key(0),
    jnp.zeros((1, 1), jnp.int32),
  )
  multipliers = mup.lr_multipliers(config, shapes)
  assert jax.tree.structure(multipliers) == jax.tree.structure(shapes)
  found = {}
  for owner, kind, multiplier in _by_owner(multipliers):
    assert isinstance(multiplier, float)
    is_hidden = kind == 'kernel' and owner in (*HIDDEN, 'router')
    assert multiplier == (1 / RATIO if is_hidden else 1.0), (owner, kind)
    found.setdefault(multiplier, set()).add(owner)
  assert {'embed', 'head', 'final_norm'} <= found[1.0]
  standard = mup.lr_multipliers(dataclasses.replace(config, **STANDARD), shapes)
  assert set(jax.tree.leaves(standard)) == {1.0}


@pytest.mark.fast_cases(1)
@pytest.mark.parametrize('tie_embeddings', [False, True])
def test_logits_are_divided_by_the_ratio(tie_embeddings):
  config = dataclasses.replace(WIDE, tie_embeddings=tie_embeddings)
  config = dataclasses.replace(config, mup_base_head_width=0)
  standard = dataclasses.replace(config, **STANDARD)
  tokens_BT = jnp.arange(12)[None]
  ours, theirs = (
    jax.jit(transformer.Transformer(c).apply)(_params(config), tokens_BT)[0]
    for c in (config, standard)
  )
  np.testing.assert_allclose(RATIO * ours, theirs, rtol=1e-5)


def test_scores_are_scaled_by_one_over_channels():
  """1 / C, and as usual at the base: sqrt(6) / 24 for 1 / sqrt(24)."""
  seen = []

  def attend(q_BTHC, k_BKTC, v_BKTC, **kwargs):
    seen.append(np.asarray(q_BTHC))
    return dense.attend(q_BTHC, k_BKTC, v_BKTC, **kwargs)

  for config in (WIDE, dataclasses.replace(WIDE, mup_base_head_width=0)):
    model = transformer.Transformer(config)
    execution = dataclasses.replace(model.execution, attend=attend)
    model.clone(execution=execution).apply(_params(WIDE), jnp.arange(5)[None])
  scaled, plain = seen[0], seen[2]  # of the first of two layers
  np.testing.assert_allclose(scaled, plain * np.sqrt(6 / 24), rtol=1e-5)
  scale = scaled / plain / np.sqrt(24)
  np.testing.assert_allclose(scale, np.sqrt(6) / 24, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('make', [tiny_models.llama_like, tiny_models.mixture])
def test_at_its_base_it_is_the_standard_parametrisation(make):
  standard = make()
  base = make(mup_base_width=24, mup_base_head_width=6)
  jax.tree.map(np.testing.assert_array_equal, _params(base), _params(standard))
  assert mup.logit_multiplier(base) == mup.query_multiplier(base) == 1.0
  tokens_BT = jnp.arange(9)[None]
  np.testing.assert_array_equal(
    *(
      jax.jit(transformer.Transformer(c).apply)(_params(base), tokens_BT)[0]
      for c in (base, standard)
    )
  )
