"""The quality table: closed forms, and logits of the whole model."""

import jax
import numpy as np
import pytest

from frozen.quantize import activations, quality
from models import transformer
from tests.helpers import frozen_dirs, tiny_models

_TOKENS_RT = np.random.default_rng(1).integers(0, 61, (3, 16), np.int32)


def _hidden(config, params):
  """Returns the output of the last layer, as the module has it."""
  layers = params['params']
  outer = {name: x for name, x in layers.items() if 'layer_' not in name}
  batches = activations.embedded(config, outer, _TOKENS_RT)
  for n in range(config.num_layers):
    block = activations.block(config, n)
    batches = activations.advance(block, layers[f'layer_{n}'], batches)
  return outer, batches


def _logprobs(config, params):
  logits, _ = transformer.Transformer(config).apply(params, _TOKENS_RT)
  return np.asarray(jax.nn.log_softmax(logits), np.float64)[:, :-1]


@pytest.mark.parametrize('spare_ids', [(), ((7, 8), (60, 61))])
def test_numbers_are_those_of_the_two_models_logits(spare_ids):
  config = tiny_models.llama_like(spare_ids=spare_ids)
  is_spare_RT = np.isin(_TOKENS_RT, [first for first, _ in spare_ids])
  tokens_RT = np.where(is_spare_RT, 0, _TOKENS_RT)
  old = frozen_dirs.params(config)
  new = jax.tree.map(lambda x: x, old)
  for n in range(config.num_layers):
    mlp = new['params'][f'layer_{n}']['mlp']
    mlp['down']['kernel'] = mlp['down']['kernel'] * -1
  outer, old_batches = _hidden(config, old)
  _, new_batches = _hidden(config, new)
  got = quality.table(config, outer, old_batches, new_batches, tokens_RT)

  p, q = _logprobs(config, old), _logprobs(config, new)
  kl_R = np.where(np.exp(p) > 0, np.exp(p) * (p - q), 0).sum(-1).mean(-1)
  same_R = (p.argmax(-1) == q.argmax(-1)).mean(-1)
  chosen = tokens_RT[:, 1:, None]
  change_R = (
    np.take_along_axis(p, chosen, 2) - np.take_along_axis(q, chosen, 2)
  ).mean((1, 2))
  ratio = np.exp(change_R.mean())
  for name, expected in (
    ('kl', kl_R.mean()),
    ('kl_error', kl_R.std(ddof=1) / 3**0.5),
    ('same_top1', same_R.mean()),
    ('perplexity_ratio', ratio),
    ('perplexity_ratio_error', ratio * change_R.std(ddof=1) / 3**0.5),
    ('perplexity', np.exp(-np.take_along_axis(q, chosen, 2).mean())),
  ):
    assert got[name] == pytest.approx(expected, rel=1e-3), name
  assert got['kl'] > 0.01
  assert got['rows'] == 3


def test_a_model_is_no_distance_from_itself():
  config = tiny_models.llama_like()
  outer, batches = _hidden(config, frozen_dirs.params(config))
  got = quality.table(config, outer, batches, batches, _TOKENS_RT)
  assert got['kl'] == 0
  assert got['same_top1'] == 1
  assert got['perplexity_ratio'] == 1
  assert got['perplexity_ratio_error'] == 0
