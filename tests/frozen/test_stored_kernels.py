"""Frozen directories with kernels in fewer bits: what goes in comes out."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from frozen import format as frozen_format, manifest as manifest_lib
from frozen.huggingface import exporting, safetensors_files
from models.linear.stored import round as rounding
from tests.helpers import frozen_dirs, tiny_models
from tests.helpers.open_weights import stored_params

_SIZES = {'model_width': 64, 'mlp_width': 96, 'head_width': 16}


def _config(**fields):
  return frozen_dirs.config(**_SIZES, **fields)


def _mixture():
  sizes = {**_SIZES, 'mlp_width': 0, 'expert_width': 32, 'num_experts': 3}
  return tiny_models.mixture(vocab_size=270, max_length=64, **sizes)


def _write(directory, scheme='int4', config=None, **fields):
  config = config or _config()
  params = stored_params.stored(
    frozen_dirs.params(config, dtype='bfloat16'), scheme
  )
  fields = {'config': config, 'dtype': 'bfloat16', 'params': params} | fields
  return frozen_dirs.write(directory, **fields), fields['params']


@pytest.fixture(scope='module')
def original(tmp_path_factory):
  directory = tmp_path_factory.mktemp('stored') / 'tiny'
  _write(directory)
  return directory


@pytest.fixture
def copy(original, tmp_path):
  return shutil.copytree(original, tmp_path / 'copy')


@pytest.mark.fast_cases(3)
@pytest.mark.parametrize('kind', ['separate', 'stacked', 'experts'])
@pytest.mark.parametrize('scheme', [*rounding.SCHEMES, 'ordered', 'Q8_0'])
def test_round_trip(tmp_path, scheme, kind):
  config = _config(scan_layers=kind == 'stacked')
  if kind == 'experts':
    config = _mixture()
  written, params = _write(tmp_path / 'f', scheme, config)
  frozen = frozen_format.read(tmp_path / 'f')
  assert jax.tree.structure(frozen.params) == jax.tree.structure(params)
  for ours, theirs in zip(
    jax.tree.leaves(frozen.params), jax.tree.leaves(params), strict=True
  ):
    assert ours.dtype == theirs.dtype
    np.testing.assert_array_equal(
      np.asarray(ours).reshape(-1).view(np.uint8),
      np.asarray(theirs).reshape(-1).view(np.uint8),
    )
  assert frozen.manifest == written
  assert written.weights_digest == frozen_format.weights_digest(params)
  floats = frozen_dirs.params(config)
  assert written.num_params == sum(x.size for x in jax.tree.leaves(floats))


def test_floats_are_written_as_before_there_were_fewer_bits(tmp_path):
  written = frozen_dirs.write(tmp_path / 'f')
  assert written.quantization == {'kind': 'none'}
  assert written.weights_digest == frozen_format.weights_digest(
    frozen_dirs.params(frozen_dirs.config())
  )


@pytest.mark.slow
def test_a_read_in_floats_has_the_numbers_that_are_stored(original):
  frozen = frozen_format.read_whole(original)
  stored = frozen_format.read(original)
  expected = stored_params.whole(stored.params)
  shapes = frozen_format.abstract_params(frozen.config, 'bfloat16')
  assert jax.tree.structure(frozen.params) == jax.tree.structure(shapes)
  jax.tree.map(
    lambda x, y, like: (
      np.testing.assert_array_equal(x, jnp.asarray(y, jnp.bfloat16)),
      np.testing.assert_equal(x.shape, like.shape),
    ),
    frozen.params,
    expected,
    shapes,
  )
  assert frozen.manifest == stored.manifest


def test_the_record_and_other_files_lie_beside_the_weights(tmp_path):
  record = {'scheme': 'int4', 'method': 'gptq', 'seed': 3}
  written, _ = _write(
    tmp_path / 'f', record=record, texts={'quality.json': '{"kl": 0.1}'}
  )
  assert written.quantization['record'] == record
  assert 'quality.json' in written.files
  frozen_format.read(tmp_path / 'f')
  (tmp_path / 'f' / 'quality.json').write_text('{"kl": 0.0}')
  with pytest.raises(ValueError, match='quality.json: got SHA-256'):
    frozen_format.read(tmp_path / 'f')


def test_the_text_says_forms_bits_and_bytes(tmp_path):
  written, params = _write(tmp_path / 'f', 'int4', record={'scheme': 'int4'})
  text = frozen_format.storage_text(written)
  size = sum(x.nbytes for x in jax.tree.leaves(params))
  # 7 matrices of 2 layers, two tables; a scale of 32 bits per 64 or 96 numbers.
  assert text.startswith('16 x int4 (int4): 4.4')
  assert text.endswith(f'with the rest {size:,} bytes')
  assert frozen_format.storage_text(frozen_dirs.write(tmp_path / 'g')) == ''


def test_every_file_altered_truncated_or_missing_is_refused(original, tmp_path):
  count = 0
  for directory, name in frozen_dirs.damaged(original, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
      frozen_format.read(directory)
    assert name in str(caught.value)
    count += 1
  assert count > 3 * 8


def _lie(directory, change):
  """Changes the field `quantization` and signs the manifest again."""
  fields = json.loads((directory / 'manifest.json').read_text())
  del fields['manifest_digest'], fields['format_version']
  change(fields['quantization'])
  manifest_lib.write(directory, manifest_lib.sign(**fields))


_UP = 'params/layer_0/mlp/up/kernel'


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (
      # The same bytes are other numbers: seen by the digest of the weights.
      lambda kernels: kernels[_UP].update(form='nf4'),
      'got weights with digest',
    ),
    (
      lambda kernels: kernels[_UP].update(form='int3'),
      f"quantization of {_UP}: form: got 'int3', expected one of",
    ),
    (
      lambda kernels: kernels[_UP].update(form='int8'),
      f'{_UP}: dtype of values: got uint8, expected int8',
    ),
    (
      lambda kernels: kernels[_UP].update(tile=[1, 32]),
      f'got float32.96, 1. at {_UP}/scales, expected float32.96, 2.',
    ),
    (
      lambda kernels: kernels[_UP].update(tile=[0, 64]),
      f'{_UP}: tile: got 0, expected at least 1',
    ),
    (
      lambda kernels: kernels[_UP]['arrays'].update(gain='float32'),
      f'got nothing at {_UP}/gain, expected float32',
    ),
    (
      lambda kernels: kernels.update({_UP: {'blocks': 'Q4_0'}}),
      f'got nothing at {_UP}/data, expected uint8.96, 36.',
    ),
    (
      lambda kernels: kernels.update({_UP: {'blocks': 'Q9'}}),
      f"{_UP}: blocks: got 'Q9', expected one of",
    ),
    (
      lambda kernels: kernels.pop(_UP),
      f'expected bfloat16.64, 96.|got nothing at {_UP}',
    ),
    (
      lambda kernels: kernels.update({'params/nowhere/kernel': kernels[_UP]}),
      'got a kernel params/nowhere/kernel, expected kernels of the model',
    ),
    (
      lambda kernels: kernels.update(
        {'params/final_norm/scale': {'blocks': 'Q4_0'}}
      ),
      'got a parameter in fewer bits, expected floats',
    ),
  ],
)
def test_a_manifest_that_lies_is_refused(copy, change, message):
  _lie(copy, lambda quantization: change(quantization['kernels']))
  with pytest.raises(ValueError, match=message):
    frozen_format.read(copy)


def test_another_kind_of_quantization_is_refused(copy):
  _lie(copy, lambda quantization: quantization.update(kind='ternary'))
  with pytest.raises(ValueError, match="expected kind 'stored'"):
    frozen_format.read(copy)


def test_kernels_that_no_product_reads_are_not_written(tmp_path):
  config = tiny_models.mixture(vocab_size=270, max_length=64)
  params = frozen_dirs.params(config)
  router = params['params']['layer_0']['moe']['router']
  router['kernel'] = stored_params.kernel(router['kernel'], 'int8')
  with pytest.raises(ValueError, match='got a parameter in fewer bits'):
    frozen_dirs.write(tmp_path / 'f', config=config, params=params)
  assert not (tmp_path / 'f').exists()


def test_an_export_to_hugging_face_is_in_floats(original, tmp_path):
  done = exporting.export_directory(original, tmp_path / 'hf')
  assert 'kernels in fewer bits are written in bfloat16' in done.notes
  written = safetensors_files.read_header(tmp_path / 'hf' / 'model.safetensors')
  floats = frozen_format.read_whole(original).params['params']
  for name, expected in (
    ('embed_tokens', floats['embed']['embedding']),
    ('layers.0.mlp.up_proj', floats['layer_0']['mlp']['up']['kernel'].T),
  ):
    found = written[f'model.{name}.weight'].whole()
    # The ids at the end that no token has are left out.
    np.testing.assert_array_equal(found, expected[: len(found)])
