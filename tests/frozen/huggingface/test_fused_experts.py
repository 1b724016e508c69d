"""Checkpoints in which all experts of a layer share a tensor."""

import json

import jax
import numpy as np
import pytest

from frozen.huggingface import importing, safetensors_files, tensor_map
from models import transformer
from tests.helpers.open_weights import open_weights

_WHY = 'the oracle is not installed: pip install -r requirements-peer.txt'
torch = pytest.importorskip('torch', reason=_WHY)
transformers = pytest.importorskip('transformers', reason=_WHY)

MODELS = ['mixtral', 'qwen3_moe_dense_first', 'deepseek_v2', 'deepseek_v3']
# float32 sums in another order, on logits of up to about 10.
TOLERANCE = 2e-4


def _save(root, name):
  """Saves a model of transformers in its two forms."""
  theirs = open_weights.build(name)
  open_weights.save(theirs, root / 'each')
  open_weights.save(theirs, root / 'fused', save_original_format=False)
  return theirs


@pytest.mark.slow
@pytest.mark.parametrize('name', MODELS)
def test_both_forms_are_the_same_model(tmp_path, name):
  root, params = tmp_path, {}
  theirs = _save(root, name)
  for form in ('each', 'fused'):
    source = importing.open_source(root / form)
    is_fused = tensor_map.has_fused_experts(source.tensors)
    assert is_fused == (form == 'fused')
    for dtype in ('float32', 'bfloat16'):
      params[form, dtype] = importing.load_params(source, dtype)
  for dtype in ('float32', 'bfloat16'):
    jax.tree.map(
      np.testing.assert_array_equal,
      params['each', dtype],
      params['fused', dtype],
    )
  tokens_BT = np.random.default_rng(0).integers(0, 61, (2, 24))
  with torch.inference_mode():
    expected_BTV = theirs(torch.tensor(tokens_BT)).logits.numpy()
  model = transformer.Transformer(source.config)
  logits_BTV, _ = jax.jit(model.apply)(params['fused', 'float32'], tokens_BT)
  np.testing.assert_allclose(logits_BTV, expected_BTV, atol=TOLERANCE, rtol=0)


def _spoil(directory, root, change):
  """Writes a fused checkpoint whose tensors `change` has changed."""
  tensors = {
    name: tensor.whole()
    for name, tensor in safetensors_files.open_directory(root).items()
  }
  change(tensors)
  directory.mkdir()
  safetensors_files.write_directory(
    directory,
    {name: x.shape for name, x in tensors.items()},
    np.float32,
    iter(tensors.items()),
  )
  values = json.loads((root / 'config.json').read_text())
  (directory / 'config.json').write_text(json.dumps(values))
  return directory


def _last(tensors, name):
  return max(key for key in tensors if key.endswith(f'.experts.{name}'))


def _one_less(axis):
  def change(tensors):
    name = _last(tensors, 'gate_up_proj')
    tensors[name] = np.delete(tensors[name], 0, axis)

  return change


def _turned(tensors):
  name = _last(tensors, 'down_proj')
  tensors[name] = np.ascontiguousarray(tensors[name].swapaxes(1, 2))


def _missing(tensors):
  del tensors[_last(tensors, 'down_proj')]


def _both(tensors):
  name = _last(tensors, 'down_proj')
  tensors[name.replace('down_proj', '0.down_proj.weight')] = tensors[name][0]


@pytest.mark.parametrize(
  ('change', 'error'),
  [
    (_one_less(0), r'gate_up_proj \[3, 80, 32\], not \[4, 80, 32\]'),
    (_one_less(1), r'gate_up_proj \[4, 79, 32\], not \[4, 80, 32\]'),
    (_one_less(2), r'gate_up_proj \[4, 80, 31\], not \[4, 80, 32\]'),
    (_turned, r'down_proj \[4, 40, 32\], not \[4, 32, 40\]'),
    (_missing, r'got no model.layers.1.mlp.experts.down_proj'),
    (
      _both,
      r'got model.layers.1.mlp.experts.0.down_proj.weight, expected only',
    ),
  ],
)
def test_shapes_that_lie_are_refused_by_name(tmp_path, change, error):
  _save(tmp_path, 'mixtral')
  fused = tmp_path / 'fused'
  source = importing.open_source(_spoil(tmp_path / 'a', fused, change))
  with pytest.raises(ValueError, match=error):
    importing.load_params(source, 'float32')
