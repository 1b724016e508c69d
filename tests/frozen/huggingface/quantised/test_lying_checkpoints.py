"""Quantised checkpoints that lie, or are damaged: one clear error, in time."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

from frozen.huggingface import importing
from frozen.huggingface.quantised import parts, table
from tests.helpers import tiny_models
from tests.helpers.open_weights import compressed_dirs as packed, quantised_dirs

MODULE = 'model.layers.1.mlp.up_proj'
_GROUP = ('config_groups', 'group_0')


@pytest.fixture(scope='module')
def good(tmp_path_factory):
  """Directories that are imported without an error, by method."""
  root = tmp_path_factory.mktemp('good')
  gptq = {'quant_method': 'gptq', 'bits': 4, 'group_size': 16, 'desc_act': True}
  awq = {'quant_method': 'awq', 'bits': 4, 'group_size': 16}
  fp8 = {'quant_method': 'fp8', 'weight_block_size': [24, 20]}
  for name, quantise, field in (
    ('gptq', quantised_dirs.gptq(4, 16, symmetric=True, ordered=True), gptq),
    ('awq', quantised_dirs.awq(16), awq),
    ('fp8', quantised_dirs.fp8((24, 20)), fp8),
    ('packed', packed.int4(16), packed.CONFIG),
    ('mxfp4', packed.mxfp4, packed.MXFP4_CONFIG),
  ):
    quantised_dirs.write(root / name, quantise, field)
    importing.import_directory(root / name, root / f'{name}_ours')
  return root


def _field(*path, **values):
  """Changes fields of the quantization_config, or of an object in it."""

  def spoil(directory):
    file = directory / 'config.json'
    config = json.loads(file.read_text())
    place = config['quantization_config']
    for key in path:
      place = place[key]
    place |= values
    file.write_text(json.dumps(config))

  return spoil


def _config(**values):
  def spoil(directory):
    file = directory / 'config.json'
    file.write_text(json.dumps(json.loads(file.read_text()) | values))

  return spoil


def _tensors(change):
  """Changes the dict of tensors in place."""

  def spoil(directory):
    tensors = quantised_dirs.load(directory)
    change(tensors)
    quantised_dirs.save(directory, tensors)

  return spoil


def _without(part):
  return _tensors(lambda x: x.pop(f'{MODULE}.{part}'))


def _other(part, value):
  """Replaces a tensor of a module by a function of it."""

  def change(tensors):
    name = f'{MODULE}.{part}'
    tensors[name] = value(tensors.get(name))

  return _tensors(change)


def _nan(x):
  x = x.copy()
  x.reshape(-1)[3] = np.nan
  return x


def _with(index, value):
  def change(x):
    x = x.copy()
    x.reshape(-1)[index] = value
    return x

  return change


def _one_float(tensors):
  for part in ('weight_packed', 'weight_shape', 'weight_scale'):
    tensors.pop(f'{MODULE}.{part}')
  tensors[f'{MODULE}.weight'] = np.ones((48, 32), np.float32)


def _tied(directory):
  tensors = quantised_dirs.load(directory)
  head, _ = packed.int4(16)('lm_head', tensors.pop('lm_head.weight'))
  tensors |= {f'lm_head.{part}': x for part, x in head.items()}
  quantised_dirs.save(directory, tensors)
  _field(ignore=[])(directory)
  _config(tie_word_embeddings=True)(directory)


def _truncated(directory):
  path = directory / 'model.safetensors'
  path.write_bytes(path.read_bytes()[:-1000])


# Method, damage, and the message. Headers and config alone show these.
EARLY = [
  ('gptq', _field(quant_method='bitsandbytes'), "quant_method = 'bitsandbyt"),
  ('gptq', _field(quant_method=['gptq']), r"quant_method = \['gptq'\], exp"),
  ('gptq', _config(quantization_config={'bits': 4}), 'got no quantization_co'),
  ('gptq', _config(quantization_config={}), 'got quantization_config = {}, '),
  ('gptq', _config(model_type='bert'), "got model_type = 'bert'"),
  (
    'gptq',
    _config(quantization_config=None),
    'and a quantised .*qweight, expected the f',
  ),
  ('gptq', _field(bits=3), 'got quantization_config.bits = 3, expected 4 or 8'),
  ('gptq', _field(group_size=0), 'group_size = 0, expected an integer from 1'),
  ('gptq', _field(checkpoint_format='marlin'), "checkpoint_format = 'marlin'"),
  ('gptq', _field(dynamic={'-:.*': {}}), r"dynamic = \{'-:.\*': \{\}\}, exp"),
  ('gptq', _field(lora={'rank': 8}), r"lora = \{'rank': 8\}, expected only"),
  ('gptq', _field(modules_in_block_to_quantize=[['mlp.gone']]), "got 'mlp.go"),
  (
    'gptq',
    _field(modules_in_block_to_quantize=[['mlp.up_proj']]),
    'qweight quantised, expected floats by modules_in_block',
  ),
  ('gptq', _without('scales'), 'got no model.layers.1.mlp.up_proj.scales, exp'),
  ('gptq', _without('g_idx'), 'got no model.layers.1.mlp.up_proj.g_idx'),
  ('gptq', _other('scales', lambda x: x[:1]), r'shape \[1, 48\], expected \[2'),
  ('gptq', _other('qzeros', lambda x: x.T.copy()), r'qzeros of shape \[6, 2\]'),
  ('gptq', _other('qweight', lambda x: x.astype(np.int64)), 'as I64'),
  ('gptq', _other('qweight', lambda x: x[:-1]), 'got model.layers.1.mlp.up_pr'),
  (
    'gptq',
    _other('weight', lambda _: np.ones((2, 2), np.float32)),
    'beside qw',
  ),
  ('gptq', _truncated, 'it was truncated or added to'),
  ('awq', _field(version='gemv'), "version = 'gemv', expected"),
  ('awq', _field(zero_point=False), 'zero_point = False, expected True'),
  ('awq', _field(bits=8), 'bits = 8, expected 4'),
  ('awq', _field(backend='llm-awq'), "backend = 'llm-awq'"),
  (
    'awq',
    _field(modules_to_not_convert=['vision']),
    "got 'vision', expected t",
  ),
  ('awq', _field(modules_to_not_convert=['mlp']), 'quantised, expected floats'),
  ('awq', _field(modules_to_not_convert='mlp'), "= 'mlp', expected a list of"),
  ('awq', _without('qzeros'), 'got no model.layers.1.mlp.up_proj.qzeros'),
  ('fp8', _field(weight_block_size=[128]), r'= \[128\], expected two positi'),
  ('fp8', _field(weight_block_size=[24, 0]), r'= \[24, 0\], expected two pos'),
  ('fp8', _field(weight_block_size=[12, 20]), r'shape \[2, 2\], expected \[3,'),
  ('fp8', _field(fmt='e5m2'), "fmt = 'e5m2', expected None or 'e4m3'"),
  ('fp8', _field(expert_dtype='fp4'), "expert_dtype = 'fp4'"),
  ('fp8', _without('weight_scale_inv'), 'got no .*up_proj.weight_scale_inv'),
  ('fp8', _without('weight'), 'got no model.layers.1.mlp.up_proj.weight, exp'),
  (
    'fp8',
    _field(ignored_layers=['model.layers.1.mlp']),
    'quantised, expected floats by modules_to_not_convert',
  ),
  ('packed', _field(format='marlin-24'), "format = 'marlin-24', expected 'pac"),
  ('packed', _field(kv_cache_scheme={'num_bits': 8}), 'kv_cache_scheme = '),
  ('packed', _field(sparsity_config={'format': 'x'}), 'sparse weights are not'),
  (
    'packed',
    _field(transform_config={'config_groups': {'u': {}}}),
    'rotations are not computed',
  ),
  ('packed', _field(config_groups={}), 'config_groups = {}, expected an obj'),
  ('packed', _field(config_groups={'W4A16': ['Linear']}), r"W4A16 = \['Linear"),
  ('packed', _field(more=1), 'more = 1, expected only fields of compressed-t'),
  ('packed', _field(*_GROUP, more=1), 'group_0.more = 1, expected only fiel'),
  ('packed', _field(*_GROUP, weights=None), 'groups without weights are not r'),
  ('packed', _field(*_GROUP, output_activations={'a': 1}), 'output_activatio'),
  ('packed', _field(*_GROUP, input_activations={'a': 1}), 'input_activations.'),
  ('packed', _field(*_GROUP, targets=['Conv2d']), "got 'Conv2d', expected the"),
  ('packed', _field(*_GROUP, targets=['re:(']), 'expected patterns of at most'),
  (
    'packed',
    _field(*_GROUP, targets=['re:.*mlp']),
    'quantised, expected float',
  ),
  (
    'packed',
    _field(*_GROUP, 'weights', num_bits=3),
    'num_bits = 3, expected 4',
  ),
  ('packed', _field(*_GROUP, 'weights', type='float'), 'expected 4 for int or'),
  ('packed', _field(*_GROUP, 'weights', group_size=8), r'expected \[32, 4\]'),
  ('packed', _field(*_GROUP, 'weights', strategy='token'), "strategy = 'token"),
  ('packed', _field(*_GROUP, 'weights', symmetric=False), 'got no .*_zero_poi'),
  (
    'packed',
    _field(*_GROUP, 'weights', actorder='group'),
    'got no .*weight_g_',
  ),
  (
    'packed',
    _field(*_GROUP, 'weights', dynamic=True),
    'dynamic = True, expect',
  ),
  ('packed', _field(*_GROUP, 'weights', more=1), 'weights.more = 1, expected '),
  (
    'packed',
    _field(ignore=['lm_head', 'visual']),
    "got 'visual', expected the",
  ),
  (
    'packed',
    _field(ignore=['lm_head', MODULE]),
    'quantised, expected floats by the targ',
  ),
  (
    'packed',
    _field(ignore=[]),
    'got no lm_head.weight_packed, expected it bes',
  ),
  ('packed', _tensors(_one_float), f'got no {MODULE}.weight_packed, expected'),
  ('packed', _without('weight_scale'), f'got no {MODULE}.weight_scale'),
  ('packed', _without('weight_shape'), f'got no {MODULE}.weight_shape'),
  (
    'packed',
    _other('weight_shape', _with(1, 2**40)),
    r'= \[48, 1099511627776\]',
  ),
  (
    'packed',
    _other('weight_shape', _with(0, 47)),
    r'weight_shape = \[47, 32\]',
  ),
  (
    'packed',
    _other('weight_g_idx', lambda _: np.zeros(32, np.int32)),
    'with it',
  ),
  ('packed', _tied, 'got a quantised lm_head.weight and tie_word_embeddings'),
  ('mxfp4', _other('weight_scale', lambda x: x[:, :1]), r'shape \[48, 1\]'),
]
# Only the values show these.
LATE = [
  ('gptq', _other('scales', _nan), 'scales with numbers that are not finite'),
  (
    'gptq',
    _other('g_idx', _with(0, 2)),
    'g_idx from 0 to 2, expected groups f',
  ),
  (
    'gptq',
    _other('g_idx', _with(0, -1)),
    'g_idx from -1 to 1, expected groups',
  ),
  (
    'gptq',
    _field(desc_act=False),
    'g_idx out of order, expected rising, as de',
  ),
  (
    'gptq',
    _field(checkpoint_format='gptq_v2'),
    'expected 8 alone, as sym is t',
  ),
  ('awq', _other('scales', _nan), 'scales with numbers that are not finite'),
  ('fp8', _other('weight', _nan), 'up_proj.weight with numbers that are not f'),
  ('fp8', _other('weight_scale_inv', _nan), 'with numbers that are not finite'),
  ('packed', _other('weight_scale', _nan), 'with numbers that are not finite'),
  ('mxfp4', _other('weight_scale', _with(0, 255)), 'with 255, expected expon'),
]


def _spoiled(good, tmp_path, method, spoil):
  directory = shutil.copytree(good / method, tmp_path / 'theirs')
  spoil(directory)
  return directory


def _names(cases):
  return [f'{method} {message[:24]}' for method, _, message in cases]


@pytest.mark.parametrize(
  ('method', 'spoil', 'message'), EARLY, ids=_names(EARLY)
)
def test_headers_show_what_is_wrong_before_a_matrix_is_read(
  good, tmp_path, monkeypatch, method, spoil, message
):
  directory = _spoiled(good, tmp_path, method, spoil)

  def read(_):
    raise AssertionError('a matrix was read')

  monkeypatch.setattr(parts.Tensor, 'matrix', read)
  with pytest.raises(ValueError, match=message) as caught:
    importing.import_directory(directory, tmp_path / 'ours')
  assert len(str(caught.value)) < 1200
  assert not (tmp_path / 'ours').exists()


@pytest.mark.parametrize('weights', table.WEIGHTS)
@pytest.mark.parametrize(('method', 'spoil', 'message'), LATE, ids=_names(LATE))
def test_values_that_are_damaged_are_refused(
  good, tmp_path, method, spoil, message, weights
):
  directory = _spoiled(good, tmp_path, method, spoil)
  with pytest.raises(ValueError, match=message) as caught:
    importing.import_directory(directory, tmp_path / 'ours', weights=weights)
  assert 'model.safetensors' in str(caught.value)
  assert not (tmp_path / 'ours').exists()


def test_unequal_groups_become_floats(good, tmp_path):
  """Act-order of a kind that no stored kernel has: floats hold it."""
  spoil = _other(
    'g_idx', lambda _: np.where(np.arange(32) < 5, 1, 0).astype(np.int32)
  )
  directory = _spoiled(good, tmp_path, 'gptq', spoil)
  result = importing.import_directory(
    directory, tmp_path / 'ours', weights='kept'
  )
  assert any('its groups have other sizes' in note for note in result.notes)


def test_a_pattern_without_a_module_is_told(good, tmp_path):
  directory = _spoiled(
    good, tmp_path, 'packed', _field(ignore=['lm_head', 're:.*gate$'])
  )
  result = importing.import_directory(directory, tmp_path / 'ours')
  assert "ignore: 're:.*gate$' names no module" in result.notes


def test_floats_cannot_be_kept_quantised(good, tmp_path):
  def spoil(directory):
    quantised_dirs.save(
      directory,
      {
        name: x.whole()
        for name, x in importing.open_source(directory).tensors.items()
      },
    )

  directory = _spoiled(good, tmp_path, 'fp8', spoil)
  message = 'got no quantised matrix, expected some'
  with pytest.raises(ValueError, match=message):
    importing.import_directory(directory, tmp_path / 'ours')
  _config(quantization_config=None)(directory)
  importing.import_directory(directory, tmp_path / 'ours')
  with pytest.raises(ValueError, match='--weights: got kept .* are floats'):
    importing.import_directory(directory, tmp_path / 'ours', weights='kept')


def test_a_refusal_loads_no_jax(good, tmp_path):
  directory = _spoiled(good, tmp_path, 'packed', _field(ignore=['visual']))
  code = (
    'import sys\nfrom frozen.huggingface.quantised import table\n'
    f'try: table.check({str(directory)!r})\n'
    'except ValueError as error: print(error)\n'
    "print('jax' in sys.modules)"
  )
  result = subprocess.run(
    [sys.executable, '-c', code],
    env=tiny_models.subprocess_env(),
    capture_output=True,
    text=True,
    check=True,
  )
  assert "got 'visual', expected" in result.stdout
  assert result.stdout.endswith('False\n')
