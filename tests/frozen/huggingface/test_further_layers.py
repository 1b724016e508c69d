"""Layers that predict further tokens are left out, and that is said."""

import json

import numpy as np
import pytest

from frozen import format as frozen_format
from frozen.huggingface import (
  __main__ as command,
  config_json,
  exporting,
  further_layers,
  importing,
  safetensors_files,
)
from tests.helpers import frozen_dirs
from tests.helpers.open_weights import hf_files, open_weights

FIELD = further_layers.FIELD
VALUES = {
  **open_weights.SIZES,
  **open_weights.MODELS['deepseek_v3_halves'][1],
  'model_type': 'deepseek_v3',
  'vocab_size': 400,
  'rms_norm_eps': 1e-6,
  'bos_token_id': 1,
  'rope_theta': 10000.0,
}
_, CONFIG = config_json.read(VALUES)
LAYERS = CONFIG.num_layers
JOINS = 'eh_proj.weight'


def _further(n, width=32):
  """Returns tensors of layer `n`, as the published model has them."""
  at, rng = f'model.layers.{n}', np.random.default_rng(n)
  shapes = {
    'eh_proj.weight': (width, 2 * width),
    'enorm.weight': (width,),
    'hnorm.weight': (width,),
    'shared_head.norm.weight': (width,),
    'shared_head.head.weight': (400, width),
    'embed_tokens.weight': (400, width),
    'input_layernorm.weight': (width,),
    'mlp.experts.0.up_proj.weight': (20, width),
  }
  return {
    f'{at}.{name}': rng.normal(0, 1, shape).astype(np.float32)
    for name, shape in shapes.items()
  }


def _save(directory, number, further=(), **fields):
  params = frozen_dirs.params(CONFIG)
  values = {**config_json.write(CONFIG, 'deepseek_v3')[1], **fields}
  pieces = exporting.tensor_map.pieces('deepseek_v3', CONFIG, values)
  tensors = dict(exporting.tensors_of(params, pieces))
  for n in further:
    tensors |= _further(n)
  directory.mkdir()
  safetensors_files.write_directory(
    directory,
    {name: x.shape for name, x in tensors.items()},
    np.float32,
    iter(tensors.items()),
  )
  hf_files.llama3(directory)
  values[FIELD] = number
  exporting._write_json(directory / 'config.json', values)
  return directory


@pytest.mark.slow
@pytest.mark.parametrize('number', [1, 2])
def test_the_main_model_comes_in_and_the_rest_is_counted(tmp_path, number):
  further = range(LAYERS, LAYERS + number)
  theirs = _save(tmp_path / 'theirs', number, further)
  result = importing.import_directory(theirs, tmp_path / 'ours')
  plain = importing.import_directory(
    _save(tmp_path / 'plain', 0), tmp_path / 'plain_ours'
  )
  assert result.manifest.weights_digest == plain.manifest.weights_digest
  size = number * (32 * 64 + 4 * 32 + 2 * 400 * 32 + 20 * 32)
  told = f'{8 * number} tensors, {size:,} params'
  (note,) = (note for note in result.notes if 'left out' in note)
  assert told in note
  assert plain.notes == [n for n in result.notes if n is not note]
  assert further_layers.ORIGIN not in plain.manifest.origin
  manifest = frozen_format.read(tmp_path / 'ours').manifest
  assert told in manifest.origin[further_layers.ORIGIN]
  exported = exporting.export_directory(tmp_path / 'ours', tmp_path / 'again')
  assert any(told in note for note in exported.notes)
  values = json.loads((tmp_path / 'again' / 'config.json').read_text())
  assert values[FIELD] == 0
  again = importing.import_directory(tmp_path / 'again', tmp_path / 'twice')
  assert again.manifest.weights_digest == result.manifest.weights_digest


def test_a_config_may_name_layers_that_are_not_there(tmp_path):
  result = importing.import_directory(
    _save(tmp_path / 'theirs', 1), tmp_path / 'ours'
  )
  assert not any('left out' in note for note in result.notes)


@pytest.mark.parametrize(
  ('number', 'further', 'error'),
  [
    (0, [LAYERS], f'got model.layers.{LAYERS}.eh_proj'),
    (1, [LAYERS + 1], f'got model.layers.{LAYERS + 1}.eh_proj'),
    ('1', [LAYERS], f"got {FIELD} = '1', expected an integer"),
    (-1, [LAYERS], f'got {FIELD} = -1'),
    (True, [LAYERS], f'got {FIELD} = True'),
    (10**9, [LAYERS], f'got {FIELD} = 1000000000'),
  ],
)
def test_numbers_that_lie(tmp_path, number, further, error):
  theirs = _save(tmp_path / 'theirs', number, further)
  with pytest.raises(ValueError, match=error):
    importing.import_directory(theirs, tmp_path / 'ours')
  assert not (tmp_path / 'ours').exists()


def test_a_layer_of_the_main_model_is_never_left_out(tmp_path):
  """A config with one layer too few, and a number that covers for it."""
  theirs = _save(tmp_path / 'theirs', 1, num_hidden_layers=LAYERS - 1)
  with pytest.raises(
    ValueError, match=f'got layer {LAYERS - 1} without {JOINS}'
  ):
    importing.import_directory(theirs, tmp_path / 'ours')


def test_the_command_says_it(tmp_path, capsys):
  theirs = _save(tmp_path / 'theirs', 1, [LAYERS])
  result = importing.import_directory(theirs, tmp_path / 'ours')
  command._tell(result.notes)
  assert (
    'note: left out 1 layer that predicts further' in capsys.readouterr().out
  )
