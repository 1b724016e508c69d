"""Import and export of whole directories, without another library."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from frozen import format as frozen_format
from frozen.huggingface import (
  config_json,
  exporting,
  importing,
  safetensors_files,
)
from frozen.huggingface.gguf import token_fields
from models import transformer
from tests.helpers import frozen_dirs, tiny_models
from tests.helpers.open_weights import hf_files, sentencepiece_files
from text import hf_files as hf_files_lib, hf_tokenizer

ROOT = pathlib.Path(__file__).parents[3]
CONFIG = tiny_models.llama_like(vocab_size=400, num_layers=2)


def _save(directory, config=CONFIG, *, dtype='float32', drop=(), **overrides):
  """Writes a Hugging Face directory with a tokenizer, by our tensor maps."""
  params = frozen_dirs.params(config)
  family, values = config_json.write(config)
  pieces = exporting.tensor_map.pieces(family, config, values)
  tensors = {
    name: np.asarray(x, dtype)
    for name, x in exporting.tensors_of(params, pieces)
    if name not in drop
  }
  tensors |= overrides
  directory.mkdir(exist_ok=True)
  safetensors_files.write_directory(
    directory,
    {name: x.shape for name, x in tensors.items()},
    dtype,
    iter(tensors.items()),
  )
  hf_files.llama3(directory)
  exporting._write_json(directory / 'config.json', values)
  exporting._write_json(
    directory / 'generation_config.json',
    {'eos_token_id': [2, 5], 'do_sample': True, 'temperature': 0.6, 'top_k': 9},
  )
  return params


def _equal(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def test_an_import_is_exported_as_it_was(tmp_path):
  params = _save(tmp_path / 'theirs')
  result = importing.import_directory(
    tmp_path / 'theirs', tmp_path / 'ours', origin={'source': 'here'}
  )
  frozen = frozen_format.read(tmp_path / 'ours')
  # The tokenizer has 336 ids. Their import masks the others, and keeps them.
  assert frozen.config == dataclasses.replace(CONFIG, spare_ids=((336, 400),))
  _equal(frozen.params, params)
  manifest = result.manifest
  assert manifest.origin['family'] == 'llama'
  assert manifest.origin['source'] == 'here'
  assert manifest.has_bos
  assert frozen.generation == {
    'temperature': 0.6, 'top_k': 9, 'top_p': 1.0, 'min_p': 0.0,
    'stop_ids': [2, 5],
  }  # fmt: skip
  exported = exporting.export_directory(tmp_path / 'ours', tmp_path / 'again')
  assert exported.family == 'llama'
  _equal_files(tmp_path / 'theirs', tmp_path / 'again', 'model.safetensors')
  values = json.loads((tmp_path / 'again' / 'config.json').read_text())
  assert values['dtype'] == 'float32'
  generation = json.loads(
    (tmp_path / 'again' / 'generation_config.json').read_text()
  )
  assert generation['eos_token_id'] == [2, 5]
  assert (generation['do_sample'], generation['top_k']) == (True, 9)
  again = importing.import_directory(tmp_path / 'again', tmp_path / 'twice')
  assert again.manifest.weights_digest == manifest.weights_digest


@pytest.mark.slow
def test_what_is_given_away_holds_no_path_of_the_machine(tmp_path):
  source = tmp_path / 'my model'
  _save(source)
  config = json.loads((source / 'tokenizer_config.json').read_text())
  config['name_or_path'] = str(tmp_path / 'elsewhere')
  config['special_tokens_map_file'] = str(tmp_path / 'a.json')
  (source / 'tokenizer_config.json').write_text(json.dumps(config))
  _command('import', f'--source={source}', f'--out={tmp_path / "ours"}')
  manifest = importing.import_directory(source, tmp_path / 'alone').manifest
  exporting.export_directory(tmp_path / 'ours', tmp_path / 'theirs')
  files = [
    path
    for name in ('ours', 'alone', 'theirs')
    for path in (tmp_path / name).rglob('*')
    if path.is_file()
  ]
  assert len(files) > 20
  for path in files:
    assert str(tmp_path).encode() not in path.read_bytes(), path
  imported = frozen_format.read(tmp_path / 'ours').manifest
  assert manifest.experiment == imported.experiment == 'my model'
  assert imported.origin['source'] == 'my model'


def test_a_chat_template_comes_along(tmp_path):
  template = '{% for m in messages %}<{{ m.content }}>{% endfor %}'
  _save(tmp_path / 'theirs')
  hf_files.llama3(tmp_path / 'theirs', template=template)
  importing.import_directory(tmp_path / 'theirs', tmp_path / 'ours')
  assert frozen_format.read(tmp_path / 'ours').chat_template == template


@pytest.mark.parametrize('is_legacy', [True, False])
def test_a_slow_tokenizer_comes_along(tmp_path, is_legacy):
  theirs = tmp_path / 'theirs'
  _save(theirs)
  for path in theirs.glob('*token*'):
    path.unlink()
  sentencepiece_files.write(
    theirs, sentencepiece_files.small(), {'legacy': is_legacy}
  )
  importing.import_directory(theirs, tmp_path / 'ours')
  ours = hf_tokenizer.load(tmp_path / 'ours' / 'tokenizer')
  texts = ['hell\u00f6 abc', ' a', 'ab\n bc', 'hello <s> ab']
  ids = [ours.encode(text) for text in texts]
  assert [ours.decode(each) for each in ids] == texts
  exporting.export_directory(tmp_path / 'ours', tmp_path / 'again')
  again = hf_tokenizer.convert(tmp_path / 'again', tmp_path / 'copy')
  assert [again.encode(text) for text in texts] == ids
  # llama.cpp's own form has the same pieces, in the same order of joins.
  specification = hf_files_lib.specification(
    hf_files_lib.read_saved(tmp_path / 'ours' / 'tokenizer')
  )
  fields, notes = token_fields.fields(
    ours, specification, num_ids=400, stop_ids=[2], chat_template=''
  )
  token_fields.tokenizer_lib.write(fields, tmp_path / 'copy', {})
  gguf = hf_tokenizer.convert(tmp_path / 'copy', tmp_path / 'copy')
  assert [gguf.encode(text) for text in texts] == ids
  assert ('space after each special token' in ''.join(notes)) != is_legacy


def _equal_files(a, b, name):
  first, second = (
    safetensors_files.read_header(place / name) for place in (a, b)
  )
  assert first.keys() == second.keys()
  for key, tensor in first.items():
    np.testing.assert_array_equal(tensor.whole(), second[key].whole())


@pytest.mark.parametrize('stored', ['float32', 'float16', 'bfloat16'])
@pytest.mark.parametrize('asked', ['auto', 'float32', 'bfloat16'])
def test_dtypes_are_kept_or_converted_as_asked(tmp_path, stored, asked):
  dtype = ml_dtypes.bfloat16 if stored == 'bfloat16' else stored
  params = _save(tmp_path / 'theirs', dtype=dtype)
  source = importing.open_source(tmp_path / 'theirs')
  chosen = importing.choose_dtype(source, asked)
  expected = {'auto': 'bfloat16' if stored == 'bfloat16' else 'float32'}
  assert chosen == expected.get(asked, asked)
  loaded = importing.load_params(source, chosen)
  rounded = jax.tree.map(
    lambda x: np.asarray(x).astype(dtype).astype(jnp.dtype(chosen)), params
  )
  _equal(loaded, rounded)


def test_weights_go_where_they_are_told(tmp_path):
  params = _save(tmp_path / 'theirs')
  source = importing.open_source(tmp_path / 'theirs')
  mesh = jax.make_mesh((2,), ('x',), devices=jax.devices()[:2])

  def sharding(path, shape):
    axes = ('x',) if shape[0] % 2 == 0 else ()
    del path
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))

  loaded = importing.load_params(source, 'float32', sharding)
  _equal(loaded, params)
  table = loaded['params']['embed']['embedding']
  assert {s.data.shape for s in table.addressable_shards} == {(200, 24)}


def _missing(directory):
  return _save(directory, drop=('model.layers.1.mlp.up_proj.weight',))


def _unknown(directory):
  return _save(directory, **{'model.layers.0.adapter': np.ones(3, np.float32)})


def _lies(directory, **fields):
  _save(directory)
  path = directory / 'config.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def _integers(directory):
  _save(directory)
  path = directory / 'model.safetensors'
  data = path.read_bytes()
  assert data.count(b'"F32"') > 3
  path.write_bytes(data.replace(b'"F32"', b'"I32"', 1))


def _tied_and_not(directory):
  head = np.ones((400, 24), np.float32)
  config = tiny_models.llama_like(vocab_size=400, tie_embeddings=True)
  _save(directory, config, **{'lm_head.weight': head})


def _no_json(directory):
  _save(directory)
  (directory / 'config.json').write_text('{')


def _list_of_settings(directory):
  _save(directory)
  (directory / 'generation_config.json').write_text('[]')


def _few_ids(directory):
  _save(directory, tiny_models.llama_like(vocab_size=100))


@pytest.mark.parametrize(
  ('make', 'message'),
  [
    (_missing, r'got no model.layers.1.mlp.up_proj.weight, expected'),
    (_unknown, 'got model.layers.0.adapter, expected only tensors of'),
    (
      lambda d: _lies(d, num_hidden_layers=3),
      'got no model.layers.2.input_layernorm.weight, .*the config is wr',
    ),
    (
      lambda d: _lies(d, num_hidden_layers=1),
      'got model.layers.1.input_layernorm.weight, .*expected only tens',
    ),
    (
      lambda d: _lies(d, intermediate_size=41),
      r'up_proj.weight \[40, 24\], not \[41, 24\]',
    ),
    (lambda d: _lies(d, num_key_value_heads=1), r'k_proj.weight \[12, 24\], n'),
    (
      lambda d: _lies(d, tie_word_embeddings=True),
      'rs: got lm_head.weight unl',
    ),
    (
      lambda d: _save(d, drop=('lm_head.weight',)),
      'got tie_word_embeddings = false in config.json and no lm_head.weight',
    ),
    (_integers, 'of dtype I32, expected F32, F16 or BF16'),
    (_tied_and_not, 'got lm_head.weight unlike model.embed_tokens.weight'),
    (_no_json, 'config.json: got a file that is not JSON'),
    (_few_ids, 'got a tokenizer of .* ids, expected at most 100'),
    (_list_of_settings, 'generation_config.json holds list, expected an obj'),
  ],
)
def test_a_directory_that_is_not_what_it_says_is_refused(
  tmp_path, make, message
):
  make(tmp_path / 'theirs')
  with pytest.raises(ValueError, match=message):
    importing.import_directory(tmp_path / 'theirs', tmp_path / 'ours')
  assert not (tmp_path / 'ours').exists()


def test_what_repeats_the_config_and_bare_names_are_no_obstacle(tmp_path):
  """Files of old versions, and of models that were saved without a head."""
  config = tiny_models.gpt2_like()
  params = frozen_dirs.params(config)
  family, values = config_json.write(config)
  pieces = exporting.tensor_map.pieces(family, config, values)
  tensors = {
    name.removeprefix('transformer.'): np.asarray(x)
    for name, x in exporting.tensors_of(params, pieces)
  }
  tensors['h.0.attn.bias'] = np.tril(np.ones((1, 1, 32, 32), np.float32))
  safetensors_files.write_directory(
    tmp_path,
    {name: x.shape for name, x in tensors.items()},
    np.float32,
    iter(tensors.items()),
  )
  exporting._write_json(tmp_path / 'config.json', values)
  source = importing.open_source(tmp_path)
  _equal(importing.load_params(source, 'float32'), params)


def test_an_export_in_shards_of_layers_that_were_stacked(tmp_path):
  """A frozen model has separate layers, however training stacked them."""
  frozen_dirs.write(tmp_path / 'ours')
  exported = exporting.export_directory(
    tmp_path / 'ours', tmp_path / 'theirs', shard_bytes=20_000
  )
  assert 'left out the rows of ids 259 to 269' in exported.notes[0]
  assert 'transformers does not read' in exported.notes[1]
  assert len(list((tmp_path / 'theirs').glob('model-*'))) > 1
  source = importing.open_source(tmp_path / 'theirs')
  params = frozen_format.read(tmp_path / 'ours').params['params']
  for table in ('embed', 'head'):
    params[table]['embedding'] = params[table]['embedding'][:259]
  _equal(importing.load_params(source, 'float32'), {'params': params})
  with pytest.raises(ValueError, match='got a path with files, expected a new'):
    exporting.export_directory(tmp_path / 'ours', tmp_path / 'theirs')


def test_what_cannot_be_exported_leaves_nothing(tmp_path):
  frozen_dirs.write(
    tmp_path / 'ours', config=frozen_dirs.config(logit_softcap=3.0)
  )
  with pytest.raises(ValueError, match='logit_softcap is 3.0, there 0.0'):
    exporting.export_directory(tmp_path / 'ours', tmp_path / 'theirs')
  assert sorted(p.name for p in tmp_path.iterdir()) == ['ours', 'tokenizer']


def _command(*args):
  return subprocess.run(
    [sys.executable, '-m', 'frozen.huggingface', *args],
    cwd=ROOT,
    env=tiny_models.subprocess_env(),
    capture_output=True,
    text=True,
    check=False,
  )


@pytest.mark.slow
def test_the_command_imports_exports_and_fails_in_one_line(tmp_path):
  _save(tmp_path / 'theirs')
  out = f'--out={tmp_path / "ours"}'
  result = _command('import', f'--source={tmp_path / "theirs"}', out)
  assert result.returncode == 0, result.stderr
  assert 'llama, ' in result.stdout
  result = _command(
    'export', f'--source={tmp_path / "ours"}', f'--out={tmp_path / "again"}'
  )
  assert result.returncode == 0, result.stderr
  assert 'as llama' in result.stdout
  result = _command('import', f'--source={tmp_path / "nowhere"}', out)
  assert result.returncode == 2
  assert result.stderr.startswith('error: ')
  assert result.stderr.count('\n') == 1
  below_a_file = f'--out={tmp_path / "theirs" / "config.json" / "ours"}'
  result = _command('import', f'--source={tmp_path / "theirs"}', below_a_file)
  assert result.returncode == 2
  assert result.stderr.startswith('error: [Errno 20] Not a directory')
  result = _command('eat', '--source=a', '--out=b')
  assert result.returncode == 1
  assert 'expected one of import, export' in result.stdout + result.stderr


def test_an_imported_model_computes(tmp_path):
  """The loaded arrays, put on a device, compute the model."""
  params = _save(tmp_path)
  source = importing.open_source(tmp_path)
  loaded = importing.load_params(source, 'float32')
  model = transformer.Transformer(source.config)
  tokens_BT = jnp.arange(12).reshape(2, 6)
  got, _ = model.apply(jax.tree.map(jnp.asarray, loaded), tokens_BT)
  expected, _ = model.apply(params, tokens_BT)
  np.testing.assert_array_equal(got, expected)


def test_eos_ids_of_config_json_count_without_generation_config(tmp_path):
  (tmp_path / 'config.json').write_text('{"eos_token_id": [2, 5]}')
  settings, _ = importing.read_generation(tmp_path)
  assert set(settings['stop_ids']) == {2, 5}
  # As in transformers, the other file alone counts where there is one.
  (tmp_path / 'generation_config.json').write_text('{"eos_token_id": [7, 8]}')
  settings, _ = importing.read_generation(tmp_path)
  assert set(settings['stop_ids']) == {7, 8}
