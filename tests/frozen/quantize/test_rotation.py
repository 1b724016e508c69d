"""A turned model has the function of the original, and no large channels."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from frozen import format as frozen_format
from frozen.quantize import calibration, quantizing, rotation
from models import transformer
from models.linear.stored import round as rounding
from tests.helpers import frozen_dirs, tiny_models

_CONFIGS = {
  'tied': tiny_models.llama_like(tie_embeddings=True, embed_multiplier=3.0),
  'odd_heads': tiny_models.odd_heads(),
  'biases': tiny_models.llama_like(qkv_bias=True, out_bias=True, mlp_bias=True),
  'from_one': tiny_models.llama_like(norm_from_one=True, qk_norm=True),
  'learned': tiny_models.gpt2_like(norm='rmsnorm'),
  'parallel': tiny_models.gpt2_like(norm='rmsnorm', parallel_residual=True),
  'mixture': tiny_models.mixture(norm_from_one=True),
  'muP': tiny_models.llama_like(mup_base_width=12),
  'attention_only': tiny_models.llama_like(mlp='none', mlp_width=0),
}
_TOKENS_BT = np.random.default_rng(5).integers(0, 61, (2, 20), np.int32)


def _params(config):
  """Returns params whose norms and biases are not those of a new model."""
  params = frozen_dirs.params(config)['params']
  rng = np.random.default_rng(0)

  def moved(tree):
    return {
      name: moved(x)
      if isinstance(x, dict)
      else x + jnp.asarray(rng.normal(size=x.shape) * 0.2, x.dtype)
      if name in ('scale', 'bias')
      else x
      for name, x in tree.items()
    }

  return {'params': moved(params)}


def _logits(config, params):
  config = dataclasses.replace(config, scan_layers=False)
  model = transformer.Transformer(config, jnp.float32)
  logits_BTV, _ = model.apply(params, _TOKENS_BT)
  return logits_BTV


@pytest.mark.parametrize('width', [1, 16, 24, 45])
def test_the_matrix_is_orthogonal_and_keeps_no_channel(width):
  turn_DD = rotation.matrix(width, np.random.default_rng(3))
  np.testing.assert_allclose(turn_DD @ turn_DD.T, np.eye(width), atol=1e-12)
  if width == 16:
    np.testing.assert_allclose(np.abs(turn_DD), 0.25)
  again = rotation.matrix(width, np.random.default_rng(3))
  np.testing.assert_array_equal(turn_DD, again)
  other = rotation.matrix(width, np.random.default_rng(4))
  assert width == 1 or not np.array_equal(turn_DD, other)


@pytest.mark.fast_cases(4)
@pytest.mark.parametrize('name', sorted(_CONFIGS))
def test_the_function_stays(name):
  config = _CONFIGS[name]
  params = _params(config)
  turned, new_config = rotation.rotated(params, config, 7)
  assert not new_config.tie_embeddings
  expected = _logits(config, params)
  np.testing.assert_allclose(
    _logits(new_config, turned),
    expected,
    rtol=0,
    atol=1e-5 * float(jnp.abs(expected).max()),
  )
  # All of them were turned, and no part was left as it was.
  same = [
    path
    for path in ('embed/embedding', 'layer_0/attention/query/kernel')
    if np.array_equal(_leaf(turned, path), _leaf(params, path))
  ]
  assert not same
  scale_D = _leaf(turned, 'layer_0/attention_norm/scale')
  assert np.all(scale_D == 1 - config.norm_from_one)


def _leaf(params, path):
  found = params['params']
  for name in path.split('/'):
    found = found[name]
  return np.asarray(found)


def test_a_large_channel_is_spread():
  config = tiny_models.llama_like(model_width=64, head_width=16)
  params = _params(config)
  up = params['params']['layer_0']['mlp']['up']
  up['kernel'] = up['kernel'].at[5].multiply(100)
  turned, _ = rotation.rotated(params, config, 0)

  def error(params):
    w_IO = jnp.asarray(_leaf(params, 'layer_0/mlp/up/kernel'))
    delta_IO = rounding.by_scheme(w_IO, 'int4').whole(jnp.float32) - w_IO
    # Of the channels that are not large; all of them are, once turned.
    delta_IO, w_IO = (
      jnp.where(jnp.arange(64)[:, None] == 5, 0, x) for x in (delta_IO, w_IO)
    )
    return float(jnp.linalg.norm(delta_IO) / jnp.linalg.norm(w_IO))

  # Its step is too coarse for all the others: they become 0.
  assert error(params) > 0.8
  assert error(turned) < 0.2


@pytest.mark.parametrize(
  ('config', 'text'),
  [
    (tiny_models.gpt2_like(), "norm = 'layernorm', expected 'rmsnorm'"),
    (tiny_models.llama_like(norm_place='both'), "norm_place = 'both'"),
    (
      tiny_models.llama_like(latent_width=8, rotary_width=4),
      'layer_0/attention/',
    ),
  ],
)
def test_a_stream_that_cannot_be_turned_is_refused(config, text):
  with pytest.raises(ValueError, match=f'--rotate: got a model with {text}'):
    rotation.rotated(frozen_dirs.params(config), config, 0)


def test_a_directory_is_turned_and_quantised(tmp_path):
  config = frozen_dirs.config(num_layers=1)
  frozen_dirs.write(tmp_path / 'float', config=config)
  text = calibration.Config(rows=4, length=32, held_out=4, seed=3)
  _, report = quantizing.quantise_directory(
    tmp_path / 'float',
    tmp_path / 'out',
    scheme='int8',
    method='rtn',
    text=text,
    rotate=True,
  )
  assert report['rotation'] == 3
  assert report['quality']['kl'] < 1e-2
  opened = frozen_format.open_directory(tmp_path / 'out')
  assert not opened.config.tie_embeddings
  assert opened.manifest.quantization['record']['rotation'] == 3
  assert '(int8 rtn turned)' in frozen_format.storage_text(opened.manifest)
