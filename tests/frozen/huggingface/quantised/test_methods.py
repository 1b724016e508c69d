"""GPTQ, AWQ and fp8 checkpoints, packed by loops that know no reader."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from frozen import format as frozen_format
from frozen.huggingface import importing
from frozen.huggingface.quantised import bits, kept as kept_lib, parts
from models import transformer
from models.linear.stored import tree as stored_tree
from models.native import build
from tests.helpers.open_weights import compressed_dirs, quantised_dirs

_GPTQ = {'quant_method': 'gptq', 'bits': 4, 'group_size': 16}
_AWQ = {
  'quant_method': 'awq',
  'bits': 4,
  'group_size': 16,
  'version': 'gemm',
  'zero_point': True,
}
_FP8 = {'quant_method': 'fp8', 'weight_block_size': [24, 20]}
# Quantiser, quantization_config, and the form of the kernels.
CASES = {
  'gptq': (quantised_dirs.gptq(4, 16), {**_GPTQ, 'sym': False}, 'uint4'),
  'gptq symmetric': (
    quantised_dirs.gptq(4, 16, symmetric=True),
    {**_GPTQ, 'sym': True},
    'int4',
  ),
  'gptq v2': (
    quantised_dirs.gptq(4, 16, version=2),
    {**_GPTQ, 'sym': False, 'checkpoint_format': 'gptq_v2'},
    'uint4',
  ),
  'gptq act-order': (
    quantised_dirs.gptq(4, 16, ordered=True),
    {**_GPTQ, 'sym': False, 'desc_act': True},
    'uint4',
  ),
  'gptq 8 bits': (
    quantised_dirs.gptq(8, -1),
    {**_GPTQ, 'bits': 8, 'group_size': -1, 'sym': False},
    'int8',
  ),
  'gptq 8 bits symmetric, act-order': (
    quantised_dirs.gptq(8, 8, ordered=True, symmetric=True),
    {**_GPTQ, 'bits': 8, 'group_size': 8, 'desc_act': True},
    'int8',
  ),
  'awq': (quantised_dirs.awq(16), _AWQ, 'uint4'),
  'awq with a list': (
    quantised_dirs.awq(8),
    {**_AWQ, 'group_size': 8, 'modules_to_not_convert': ['lm_head', 'norm']},
    'uint4',
  ),
  'fp8 blocks': (quantised_dirs.fp8((24, 20)), _FP8, 'fp8'),
  'fp8 blocks of powers': (
    quantised_dirs.fp8((24, 20), dtype=ml_dtypes.float8_e8m0fnu),
    {**_FP8, 'scale_fmt': 'ue8m0', 'activation_scheme': 'dynamic'},
    'fp8',
  ),
  # The package of compressed-tensors no longer reads act-order.
  'packed act-order': (
    compressed_dirs.int4(16, ordered=True),
    compressed_dirs.config(
      'pack-quantized',
      num_bits=4,
      strategy='group',
      group_size=16,
      actorder='group',
    ),
    'int4',
  ),
  'packed in act-order at first': (
    compressed_dirs.int4(16),
    compressed_dirs.config(
      'pack-quantized', num_bits=4, group_size=16, actorder='weight'
    ),
    'int4',
  ),
  'exponents': (
    compressed_dirs.mxfp4,
    compressed_dirs.MXFP4_CONFIG,
    'fp4',
  ),
  'fp8 matrices': (
    quantised_dirs.fp8(None, scale='weight_scale'),
    {**_FP8, 'weight_block_size': None},
    'fp8',
  ),
}


@pytest.fixture(scope='module', params=list(CASES))
def checkpoint(request, tmp_path_factory):
  """A directory, the floats of its matrices, and the form of its kernels."""
  quantise, field, form = CASES[request.param]
  directory = tmp_path_factory.mktemp('theirs')
  floats = quantised_dirs.write(directory, quantise, field)
  return directory, floats, form


def test_matrices_are_the_numbers_that_were_packed(checkpoint):
  directory, floats, _ = checkpoint
  source = importing.open_source(directory)
  read = {
    name: tensor.whole()
    for name, tensor in source.tensors.items()
    if tensor.dtype == parts.DTYPE
  }
  assert read.keys() == floats.keys()
  for name, expected in floats.items():
    np.testing.assert_array_equal(read[name], expected, err_msg=name)


@pytest.mark.fast_cases(6)
def test_kept_matrices_are_the_same_numbers_and_have_the_same_logits(
  checkpoint,
):
  directory, floats, form = checkpoint
  source = importing.open_source(directory)
  kept = kept_lib.kernels(source.tensors, importing.check_tensors(source))
  assert not kept.notes
  assert kept.names == floats.keys()
  assert {kernel.form for kernel in kept.kernels.values()} == {form}
  whole = importing.load_params(source, 'float32')
  for path, x in frozen_format.leaves_by_path(whole['params']).items():
    if path in kept.kernels:
      # In float32, code and zero are scaled apart: half a bit each.
      got = kept.kernels[path].whole(jnp.float32)
      np.testing.assert_allclose(got, x, rtol=0, atol=1e-6, err_msg=path)
  stored = importing.load_params(source, 'float32', kept=kept.kernels)
  model = transformer.Transformer(source.config)
  tokens = jnp.arange(16).reshape(2, 8)
  expected, got = (
    np.asarray(model.apply(jax.tree.map(jnp.asarray, params), tokens)[0])
    for params in (whole, stored)
  )
  np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(expected).max())


def test_words_by_hand():
  word = np.array([[0x76543210]], np.int32)
  np.testing.assert_array_equal(
    bits.unpack(word, 4), [[0, 1, 2, 3, 4, 5, 6, 7]]
  )
  np.testing.assert_array_equal(
    bits.unpack(word, 8), [[0x10, 0x32, 0x54, 0x76]]
  )
  # AWQ: the nibbles from the lowest on are outputs 0, 2, 4, 6, 1, 3, 5, 7.
  np.testing.assert_array_equal(
    bits.in_awq_order(bits.unpack(word, 4)), [[0, 4, 1, 5, 2, 6, 3, 7]]
  )
  np.testing.assert_array_equal(bits.pack(bits.unpack(word, 4), 4), word)
  assert bits.pack(np.array([[15] * 9], np.uint8), 4).tolist() == [[-1, 15]]


def test_a_zero_of_version_1_is_stored_minus_one_modulo_its_bits():
  """By hand: code 9, stored zero 7 is 8; stored zero 15 is 0; scale 0.5."""
  from frozen.huggingface.quantised import gptq

  method = gptq.Gptq(4, 8, False, False, 1, False, None, '')
  tensors = {
    'qweight': np.full((1, 8), -0x66666667, np.int32),  # 0x99999999
    'qzeros': np.array([[0x7777777F]], np.int32),
    'scales': np.full((1, 8), 0.5, np.float16),
  }
  opened = method.open(
    parts.Parts('here', 'm', {k: _Held(x) for k, x in tensors.items()}), ''
  )
  assert opened is not None
  expected = np.full((8, 8), 0.5)
  expected[0] = 4.5
  np.testing.assert_array_equal(opened.whole(), expected)


class _Held:
  """A tensor in memory."""

  path, place = 'here', ('here', 0)

  def __init__(self, x):
    self._x, self.shape = x, x.shape
    self.dtype = {'int32': 'I32', 'float16': 'F16'}[x.dtype.name]

  def whole(self):
    return self._x


@pytest.mark.parametrize('weights', ['float', 'kept'])
def test_a_frozen_directory_tells_how_it_was_quantised(tmp_path, weights):
  quantise, field, _ = CASES['fp8 blocks']
  quantised_dirs.write(tmp_path / 'theirs', quantise, field)
  result = importing.import_directory(
    tmp_path / 'theirs', tmp_path / 'ours', weights=weights
  )
  assert any('activations stay in floats' in note for note in result.notes)
  frozen = frozen_format.read(tmp_path / 'ours')
  origin = frozen.manifest.origin
  assert origin['scheme'] == 'fp8, scales of blocks of [24, 20]'
  assert 'activations stay in floats' in origin['notes']
  leaves = jax.tree.leaves(frozen.params, is_leaf=stored_tree.is_stored)
  num_stored = sum(map(stored_tree.is_stored, leaves))
  assert num_stored == (14 if weights == 'kept' else 0)
  if weights == 'kept':
    record = frozen.manifest.quantization['record']
    assert record['method'] == 'kept'
    assert '14 x fp8' in frozen_format.storage_text(frozen.manifest)


def _kept_mixture(directory, quantise, field):
  """Returns the source of a mixture, its kept kernels, and its floats."""
  floats = quantised_dirs.write(
    directory, quantise, field, quantised_dirs.MIXTURE
  )
  source = importing.open_source(directory)
  kept = kept_lib.kernels(source.tensors, importing.check_tensors(source))
  return source, kept, floats


def _check_experts(kept, floats, *, names=('gate', 'up', 'down')):
  """Compares kept kernels of experts with the floats of each expert."""
  theirs = {'gate': 'w1', 'up': 'w3', 'down': 'w2'}
  for n in range(quantised_dirs.MIXTURE.num_layers):
    at = f'model.layers.{n}.block_sparse_moe.experts'
    for name in names:
      kernel = kept.kernels[f'layer_{n}/moe/expert_{name}/kernel']
      expected = [floats[f'{at}.{e}.{theirs[name]}.weight'].T for e in range(8)]
      np.testing.assert_allclose(
        kernel.whole(jnp.float32), np.stack(expected), rtol=0, atol=1e-6
      )


@pytest.mark.slow
@pytest.mark.parametrize(
  'case',
  ['gptq', 'gptq act-order', 'awq', 'fp8 blocks', 'exponents', 'fp8 matrices'],
)
def test_experts_stay_quantised_and_routers_become_floats(tmp_path, case):
  quantise, field, form = CASES[case]
  source, kept, floats = _kept_mixture(tmp_path, quantise, field)
  _check_experts(kept, floats)
  (note,) = kept.notes
  assert note.startswith('2 quantised matrices became floats, such as model.l')
  assert note.endswith('moe.gate.weight: routers and the matrices that latent'
                       ' attention folds')  # fmt: skip
  assert {kernel.form for kernel in kept.kernels.values()} == {form}
  whole = importing.load_params(source, 'float32')
  stored = importing.load_params(source, 'float32', kept=kept.kernels)
  model = transformer.Transformer(source.config)
  tokens = jnp.arange(16).reshape(2, 8)
  expected, got = (
    np.asarray(model.apply(jax.tree.map(jnp.asarray, params), tokens)[0])
    for params in (whole, stored)
  )
  np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(expected).max())


def test_experts_with_other_zeros_or_order_share_a_kernel(tmp_path):
  """All zeros of one are 8, and the inputs of another lie in order."""

  def quantise(module, w_OI):
    expert = module.partition('.experts.')[2]
    return quantised_dirs.gptq(
      4, 16, symmetric=expert == '1.w3', ordered=not expert.startswith('2.')
    )(module, w_OI)

  field = {**_GPTQ, 'sym': False, 'desc_act': True}
  _, kept, floats = _kept_mixture(tmp_path, quantise, field)
  _check_experts(kept, floats)
  kernel = kept.kernels['layer_0/moe/expert_up/kernel']
  assert kernel.form == 'uint4'
  np.testing.assert_array_equal(kernel.order[2], np.arange(32))


def test_a_layer_with_an_expert_in_floats_has_its_kernel_in_floats(tmp_path):
  def quantise(module, w_OI):
    if module.endswith('experts.3.w2'):
      return {'weight': w_OI}, w_OI
    return quantised_dirs.gptq(4, 16)(module, w_OI)

  _, kept, floats = _kept_mixture(tmp_path, quantise, {**_GPTQ, 'sym': False})
  _check_experts(kept, floats, names=('gate', 'up'))
  assert not any('down' in path for path in kept.kernels)
  assert any('other experts of their layer are floats' in x for x in kept.notes)


@pytest.mark.parametrize(
  ('case', 'num_stored'), [('gptq', 14), ('fp8 blocks', 0)]
)
def test_auto_keeps_what_native_code_multiplies_by(
  tmp_path, monkeypatch, case, num_stored
):
  monkeypatch.setattr(build, 'registered', lambda: ('target', 'avx2'))
  quantise, field, _ = CASES[case]
  quantised_dirs.write(tmp_path / 'theirs', quantise, field)
  result = importing.import_directory(
    tmp_path / 'theirs', tmp_path / 'ours', weights='auto'
  )
  said = (
    f'{num_stored} of 14 matrices stay quantised, since products are native'
  )
  why_not = 'matrices become floats, since products are in plain JAX'
  expected = said if num_stored else why_not
  assert any(note.startswith(expected) for note in result.notes)
  params = frozen_format.read(tmp_path / 'ours').params
  leaves = jax.tree.leaves(params, is_leaf=stored_tree.is_stored)
  assert sum(map(stored_tree.is_stored, leaves)) == num_stored
