"""Exports to GGUF files, and blocks that an import keeps."""

import dataclasses

import jax
import numpy as np
import pytest

from frozen import format as frozen_format
from frozen.huggingface import config_json, importing
from frozen.huggingface.gguf import (
  header as header_lib,
  reading,
  token_fields,
  writing,
)
from models.linear.stored import blocks as blocks_lib
from tests.frozen.huggingface.gguf import (
  test_architectures,
  test_reading,
  test_tokenizer,
)
from tests.helpers import frozen_dirs, tiny_models
from tests.helpers.open_weights import open_weights, stored_params
from text import hf_files, hf_tokenizer

gguf = pytest.importorskip('gguf', reason='requirements-hub.txt')


def _bytes(path):
  """Returns kind, shape and bytes of every tensor of a file."""
  data = path.read_bytes()
  return {
    name: (x.kind, x.shape, data[x.start : x.start + x.num_bytes])
    for name, x in header_lib.entries(header_lib.read(path)).items()
  }


def _freeze(directory, config, params, family=''):
  """Writes an imported model, with a tokenizer of bytes."""
  frozen_dirs.write(
    directory,
    config=config,
    params=params,
    provenance=frozen_dirs.provenance(step=0, origin={'family': family}),
  )


@pytest.mark.parametrize('kind', ['Q4_1', 'Q8_0', 'Q4_K', 'Q6_K'])
def test_kept_blocks_come_out_with_the_same_bytes(tmp_path, monkeypatch, kind):
  path = test_tokenizer._write(tmp_path / 'a.gguf', monkeypatch, kind=kind)
  reading.import_file(path, tmp_path / 'ours', weights='kept')
  frozen = frozen_format.read(tmp_path / 'ours')
  inner = frozen.params['params']
  query = inner['layer_0']['attention']['query']['kernel']
  assert isinstance(query, blocks_lib.Blocks)
  assert isinstance(inner['embed']['embedding'], blocks_lib.Blocks)
  # The rows of a head are in halves, as those of the floats are.
  source, pieces = reading.open_file(path)
  floats = importing.load_params(source, 'float32', pieces=pieces)['params']
  np.testing.assert_array_equal(
    query.whole(np.float32), floats['layer_0']['attention']['query']['kernel']
  )
  writing.export_file(tmp_path / 'ours', tmp_path / 'b.gguf')
  assert _bytes(tmp_path / 'b.gguf') == _bytes(path)


@pytest.mark.parametrize('kind', ['Q8_0', 'Q4_K'])
def test_blocks_of_experts_come_out_with_the_same_bytes(
  tmp_path, monkeypatch, kind
):
  path = test_tokenizer._write(
    tmp_path / 'a.gguf', monkeypatch, kind=kind, config=test_reading.MIXTURE
  )
  result = reading.import_file(path, tmp_path / 'ours', weights='kept')
  frozen = frozen_format.read(tmp_path / 'ours')
  theirs = {x.name: x for x in gguf.GGUFReader(path).tensors}
  for n in range(2):
    moe = frozen.params['params'][f'layer_{n}']['moe']
    assert isinstance(moe['router']['kernel'], np.ndarray | jax.Array)
    for name in ('gate', 'up', 'down'):
      kernel = moe[f'expert_{name}']['kernel']
      assert isinstance(kernel, blocks_lib.Blocks)
      x = theirs[f'blk.{n}.ffn_{name}_exps.weight']
      expected = gguf.quants.dequantize(x.data, x.tensor_type)
      np.testing.assert_array_equal(
        kernel.whole(np.float32), expected.transpose(0, 2, 1)
      )
  # 4 matrices of attention and 3 of experts in 2 layers, and two tables.
  assert f'16 x {kind}' in frozen_format.storage_text(result.manifest)
  writing.export_file(tmp_path / 'ours', tmp_path / 'b.gguf')
  assert _bytes(tmp_path / 'b.gguf') == _bytes(path)


def test_blocks_become_floats_unless_they_are_asked_for(tmp_path, monkeypatch):
  path = test_tokenizer._write(tmp_path / 'a.gguf', monkeypatch)
  reading.import_file(path, tmp_path / 'ours')
  manifest = frozen_format.read(tmp_path / 'ours').manifest
  assert manifest.quantization == {'kind': 'none'}
  with pytest.raises(ValueError, match="weights: got 'int8', expected one of"):
    reading.import_file(path, tmp_path / 'b', weights='int8')


def test_kept_blocks_are_dequantised_for_another_kind(tmp_path, monkeypatch):
  path = test_tokenizer._write(tmp_path / 'a.gguf', monkeypatch, kind='Q8_0')
  reading.import_file(path, tmp_path / 'ours', weights='kept')
  writing.export_file(tmp_path / 'ours', tmp_path / 'b.gguf', kind='F32')
  source, pieces = reading.open_file(path)
  again, _ = reading.open_file(tmp_path / 'b.gguf')
  assert {x.kind for x in again.tensors.values()} == {'F32'}
  ours, theirs = (
    frozen_format.leaves_by_path(
      importing.load_params(each, 'float32', pieces=pieces)
    )
    for each in (again, source)
  )
  for name, x in theirs.items():
    np.testing.assert_array_equal(ours[name], x)


def test_the_tokenizer_comes_back(tmp_path, monkeypatch):
  path = test_tokenizer._write(tmp_path / 'a.gguf', monkeypatch)
  reading.import_file(path, tmp_path / 'ours')
  exported = writing.export_file(tmp_path / 'ours', tmp_path / 'b.gguf')
  assert exported.notes == []
  before, after = (
    header_lib.read(each).fields for each in (path, tmp_path / 'b.gguf')
  )
  num = len(before['tokenizer.ggml.tokens'])
  for name, value in before.items():
    if name.endswith(('.tokens', '.token_type')):
      np.testing.assert_array_equal(after[name][:num], value, err_msg=name)
    elif name.startswith('tokenizer.') and not name.endswith('space_prefix'):
      assert after[name] == value, name
  # Rows of the embedding without a token have names as in llama.cpp's files.
  assert after['tokenizer.ggml.tokens'][num] == f'[PAD{num}]'
  reading.import_file(tmp_path / 'b.gguf', tmp_path / 'again')
  first, second = (
    (tmp_path / each / 'tokenizer' / 'tokenizer.json').read_bytes()
    for each in ('ours', 'again')
  )
  assert first == second
  # Greedy is said by the second file, and the default of one without sampling.
  first, second = (
    frozen_format.read(tmp_path / each).generation for each in ('ours', 'again')
  )
  assert first == second


@pytest.mark.parametrize('name', test_architectures.ARCHITECTURES)
def test_every_architecture_is_written_as_it_is_read(
  tmp_path, monkeypatch, name
):
  pytest.importorskip('transformers', reason='requirements-peer.txt')
  for other, entry in test_architectures.PLAIN.items():
    monkeypatch.setitem(open_weights.MODELS, other, entry)
  model = open_weights.build(name, vocab_size=270)  # as its tokenizer here
  architecture, extra = test_architectures.ARCHITECTURES[name]
  path = tmp_path / 'a.gguf'
  test_architectures.write(path, model, architecture, extra)
  source, pieces = reading.open_file(path)
  _freeze(
    tmp_path / 'ours',
    source.config,
    importing.load_params(source, 'float32', pieces=pieces),
    source.model_type,
  )
  exported = writing.export_file(tmp_path / 'ours', tmp_path / 'b.gguf')
  assert exported.family == source.model_type
  again, _ = reading.open_file(tmp_path / 'b.gguf')
  assert not config_json.difference(again.config, source.config)
  ours, theirs = _bytes(tmp_path / 'b.gguf'), _bytes(path)
  assert ours.keys() == theirs.keys()
  for tensor, (kind, shape, data) in theirs.items():
    assert ours[tensor][:2] == (kind, shape)
    x, y = (np.frombuffer(d, np.float32) for d in (data, ours[tensor][2]))
    # One was added to norms and taken away again.
    np.testing.assert_allclose(y, x, atol=1e-7, err_msg=tensor)


@pytest.mark.parametrize('step', [0, 7])  # imported; trained here
def test_a_change_on_the_way_out_is_told(tmp_path, step):
  config = dataclasses.replace(test_reading.CONFIG, mlp_width=40)
  params = stored_params.stored(frozen_dirs.params(config), 'int8')
  provenance = frozen_dirs.provenance(step=step)
  frozen_dirs.write(
    tmp_path / 'ours', config=config, params=params, provenance=provenance
  )
  exported = writing.export_file(
    tmp_path / 'ours', tmp_path / 'b.gguf', kind='Q8_0'
  )
  assert 'kernels in int8 became floats first' in exported.notes
  # Down: its rows have 40 numbers.
  assert any(
    note.startswith(f'{config.num_layers} matrices are in F16')
    for note in exported.notes
  )


def test_every_end_of_a_text_is_written_or_told(tmp_path, monkeypatch):
  path = test_tokenizer._write(tmp_path / 'a.gguf', monkeypatch)
  reading.import_file(path, tmp_path / 'ours')
  tokenizer_dir = frozen_format.read(tmp_path / 'ours').tokenizer_dir
  specification = hf_files.specification(hf_files.read_saved(tokenizer_dir))
  tokenizer = hf_tokenizer.load(tokenizer_dir)
  ends = [tokenizer.eos_id, 5, 6, 7, 8]
  found, notes = token_fields.fields(
    tokenizer, specification, num_ids=400, stop_ids=ends, chat_template=''
  )
  assert found['tokenizer.ggml.eot_token_id'] == 5
  assert found['tokenizer.ggml.eom_token_id'] == 6
  assert any('stop ids [7, 8] are not in the file' in note for note in notes)


def test_an_export_that_cannot_be_is_refused(tmp_path):
  config = tiny_models.llama_like(vocab_size=400, logit_softcap=3.0)
  params = frozen_dirs.params(config)
  _freeze(tmp_path / 'ours', config, params)
  with pytest.raises(ValueError, match='no architecture of GGUF computes'):
    writing.export_file(tmp_path / 'ours', tmp_path / 'b.gguf')
  assert sorted(x.name for x in tmp_path.iterdir()) == ['ours', 'tokenizer']
  (tmp_path / 'b.gguf').write_bytes(b'mine')
  with pytest.raises(ValueError, match='got a file that is there, expected no'):
    writing.export_file(tmp_path / 'ours', tmp_path / 'b.gguf')


def test_the_kind_of_new_blocks_is_chosen(tmp_path):
  params = frozen_dirs.params(test_reading.CONFIG)
  _freeze(tmp_path / 'ours', test_reading.CONFIG, params)
  exported = writing.export_file(
    tmp_path / 'ours', tmp_path / 'b.gguf', kind='Q8_0'
  )
  assert 'no tokenizer was written' in exported.notes[0]
  kinds = {
    name: kind for name, (kind, *_) in _bytes(tmp_path / 'b.gguf').items()
  }
  assert kinds['blk.0.attn_q.weight'] == 'Q8_0'
  assert kinds['blk.0.attn_norm.weight'] == 'F32'


GREEDY = {'temperature': 0.0}
SAMPLED = {'temperature': 0.6, 'top_k': 0, 'top_p': 0.95, 'min_p': 0.05}
KEYS = gguf.constants.Keys.General


@pytest.mark.parametrize(
  'generation',
  [
    GREEDY,
    SAMPLED,
    GREEDY | {'repetition_penalty': 1.3},
    SAMPLED | {'top_k': 7, 'repetition_penalty': 0.9},
  ],
)
def test_the_recommended_sampling_comes_along(
  tmp_path, monkeypatch, generation
):
  path = test_tokenizer._write(tmp_path / 'a.gguf', monkeypatch)
  reading.import_file(path, tmp_path / 'ours')
  frozen = frozen_format.read(tmp_path / 'ours')
  wanted = generation | {'stop_ids': frozen.generation['stop_ids']}
  frozen_dirs.write(
    tmp_path / 'set',
    config=frozen.config,
    params=frozen.params,
    tokenizer_dir=frozen.tokenizer_dir,
    provenance=frozen_dirs.provenance(step=0, origin={'family': 'llama'}),
    generation=wanted | {'max_tokens': 12, 'stop': []},
  )
  exported = writing.export_file(tmp_path / 'set', tmp_path / 'b.gguf')
  assert [note for note in exported.notes if 'no field' in note] == [
    'max_tokens 12 was not written: llama.cpp has no field for it'
  ]
  # As the package reads it.
  theirs = gguf.GGUFReader(tmp_path / 'b.gguf')
  for key, ours in (
    (KEYS.SAMPLING_TEMP, 'temperature'),
    (KEYS.SAMPLING_TOP_K, 'top_k'),
    (KEYS.SAMPLING_TOP_P, 'top_p'),
    (KEYS.SAMPLING_MIN_P, 'min_p'),
    (KEYS.SAMPLING_PENALTY_REPEAT, 'repetition_penalty'),
  ):
    field = theirs.get_field(key)
    value = None if field is None else field.contents()
    assert value == pytest.approx(generation.get(ours)), key
  last = theirs.get_field(KEYS.SAMPLING_PENALTY_LAST_N)
  assert (last is None) == ('repetition_penalty' not in generation)
  assert last is None or last.contents() == -1
  again = reading.import_file(tmp_path / 'b.gguf', tmp_path / 'again')
  assert again.notes == []
  assert frozen_format.read(tmp_path / 'again').generation == wanted
