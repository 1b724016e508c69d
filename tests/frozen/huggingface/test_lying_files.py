"""Files that a careless or hostile person wrote: one clear error, no traces."""

import json
import os
import shutil

import pytest

from frozen.huggingface import __main__ as command, exporting, importing
from inference.sampling import settings
from tests.helpers import frozen_dirs, tiny_models
from tests.helpers.open_weights import hf_files

DEEP = b'[' * 200_000
INDEX = 'model.safetensors.index.json'


@pytest.fixture(scope='module')
def good(tmp_path_factory):
  """A directory that is imported without an error."""
  root = tmp_path_factory.mktemp('good')
  frozen_dirs.write(
    root / 'frozen',
    config=tiny_models.llama_like(vocab_size=400),
    provenance=frozen_dirs.provenance(step=0),  # keeps rows without a token
  )
  exporting.export_directory(root / 'frozen', root / 'theirs')
  hf_files.llama3(root / 'theirs')
  importing.import_directory(root / 'theirs', root / 'again')
  return root / 'theirs'


def _config(**fields):
  def spoil(directory):
    path = directory / 'config.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))

  return spoil


def _file(name, content):
  def spoil(directory):
    (directory / name).write_bytes(content)

  return spoil


def _prefix(name, text):
  """Puts a text after the first brace of a file."""

  def spoil(directory):
    content = (directory / name).read_text()
    (directory / name).write_text(content.replace('{', '{' + text, 1))

  return spoil


def _header(**fields):
  """Changes an entry in the header of the weights."""

  def spoil(directory):
    path = directory / 'model.safetensors'
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], 'little')
    header = json.loads(content[8:end])
    header['lm_head.weight'] |= fields
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, 'little') + text + content[end:])

  return spoil


def _index(weight_map):
  return _file(INDEX, json.dumps({'weight_map': weight_map}).encode())


def _only_config(**fields):
  def spoil(directory):
    _config(**fields)(directory)
    (directory / 'generation_config.json').unlink()

  return spoil


@pytest.mark.parametrize(
  ('spoil', 'message'),
  [
    (_config(hidden_size=-24), 'got hidden_size = -24, expected an integer'),
    (_config(hidden_size=24.0), 'got hidden_size = 24.0, expected an integer'),
    (_config(hidden_size='24'), "got hidden_size = '24', expected an integer"),
    (_config(num_key_value_heads=True), 'got num_key_value_heads = True'),
    (_config(num_hidden_layers=10**9), 'num_hidden_layers = 1000000000, exp'),
    (_config(num_hidden_layers=9_999), 'got num_layers = 9999 .* at most 2'),
    (_config(vocab_size=2**31 - 1), 'got vocab_size = 2147483647 .* most 400'),
    (_config(intermediate_size=2**30), 'got mlp_width = 1073741824 .*most 400'),
    (_config(head_dim=2**30), r'got num_heads \* head_width = .* at most 400'),
    (_config(rope_theta=float('inf')), 'got rope_theta = inf, expected a pos'),
    (_config(rms_norm_eps=float('nan')), 'got rms_norm_eps = nan, expected'),
    (_prefix('config.json', '"rms_norm_eps": 1e999,'), "'rms_norm_eps' twice"),
    (_prefix('config.json', '"head_dim": 48,'), "the name 'head_dim' twice"),
    (_prefix('config.json', '"a":' + '9' * 5000 + ','), 'not JSON .*Exceeds'),
    (_config(id2label='x' * 50 * 2**20), 'bytes, expected at most 16777216'),
    (_config(**{f'f{i}': i for i in range(10**5)}), 'and 99992 more, expected'),
    (_config(hidden_act='x' * 10**6), "got hidden_act = 'xxx.*xxx', expected"),
    (_config(model_type='x' * 10**6), "got model_type = 'xxx.*xxx'"),
    (_config(architectures=['x' * 10**6] * 9), "got architectures = .'xxx"),
    (_config(architectures='LlamaForCausalLM'), 'architectures = .* expected'),
    (_config(architectures=5), 'got architectures = 5, expected'),
    (
      _config(model_type='evil', auto_map={'AutoConfig': 'evil.Config'}),
      "got model_type = 'evil'",
    ),
    (_config(quantization_config={'quant_method': 'x'}), 'quantization_config'),
    (_config(quantization_config={}), 'got quantization_config = {}, expected'),
    (_config(torch_dtype='float16', dtype='float32'), 'got torch_dtype = .flo'),
    (_config(rope_parameters=[1]), r'got rope_parameters = \[1\], expected an'),
    (_config(eos_token_id=[3, 400]), 'PASSES'),
    (_only_config(eos_token_id=[3, 400]), r'got eos_token_id \[400\], expect'),
    (_only_config(eos_token_id=list(range(17))), r'got 17 ids in eos_token_id'),
    (_only_config(eos_token_id='x'), "got eos_token_id 'x', expected an id"),
    (_file('config.json', DEEP), 'config.json: got a file that is not JSON'),
    (_file('config.json', b'\xff{}'), 'config.json: got a file that is not'),
    (
      _file('config.json', b'null'),
      'config.json: got None, expected a JSON ob',
    ),
    (_file('generation_config.json', DEEP), 'generation_config.json is not JS'),
    (_file('tokenizer.json', DEEP), 'tokenizer.json is not JSON'),
    (_file('tokenizer_config.json', DEEP), 'tokenizer_config.json is not JSON'),
    (
      _file(
        'generation_config.json', b'{"max_new_tokens": ' + b'9' * 400 + b'}'
      ),
      'got max_new_tokens an integer of 1329 bits, expected',
    ),
    (
      _file(
        'generation_config.json', b'{"eos_token_id": 1, "eos_token_id": 2}'
      ),
      "generation_config.json: .* 'eos_token_id' twice",
    ),
    (_file(INDEX, DEEP), 'got a file without a weight_map'),
    (_index({}), 'got a file without a weight_map'),
    (_index({'a': 'model-1-of-2.safetensors'}), 'model-1-of-2.* got no such'),
    (_index({'a': '../model.safetensors'}), 'expected the name of a safetenso'),
    (_index({'a': '..'}), 'expected the name of a safetensors file'),
    (_index({'a': 'config.json'}), 'expected the name of a safetensors file'),
    (_index({'a': 'a\0.safetensors'}), 'expected the name of a safetensors fi'),
    (_header(dtype=['F32']), 'got a header that cannot be read'),
    (_header(data_offsets=['0', '4']), 'got a header that cannot be read'),
    (_header(data_offsets=[0.0, 4.0]), 'got a header that cannot be read'),
    (_header(shape=[True, 400, 24]), 'of shape .* expected integers'),
    (_header(shape=[2**40, 2**40]), 'expected its size'),
    (
      _header(shape=[1] * 10**5 + [400, 24]),
      r'got lm_head.weight \[1, 1, .*no',
    ),
    (_header(more=1), 'got a header that cannot be read'),
  ],
)
def test_one_clear_error_and_no_traces(good, tmp_path, spoil, message):
  directory = shutil.copytree(good, tmp_path / 'theirs')
  spoil(directory)
  out = tmp_path / 'out' / 'frozen'
  out.parent.mkdir()
  if message == 'PASSES':  # generation_config.json has no such id
    importing.import_directory(directory, out)
    return
  with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
    importing.import_directory(directory, out)
  assert len(str(caught.value)) < 1000
  assert not list(out.parent.iterdir())


def test_as_many_ends_as_a_request_may_have():
  assert importing.MOST_ENDS == settings.MAX_STOP_IDS


def test_the_command_escapes_names_and_cuts_them():
  line = command._one_line('got a\nb\x1b[31m\u202e' + 'x' * 10**5)
  assert line.startswith(r'got a\nb\x1b[31m\u202exxx')
  assert len(line) < 5000


def test_files_that_are_no_files(good, tmp_path):
  for name in ('config.json', 'model.safetensors', 'tokenizer.json'):
    for make in (
      os.mkdir,
      os.mkfifo,
      lambda path: os.symlink(path, path),
      lambda path: None,
    ):
      directory = shutil.copytree(good, tmp_path / 'theirs')
      (directory / name).unlink()
      make(directory / name)
      with pytest.raises((ValueError, FileNotFoundError)):
        importing.import_directory(directory, tmp_path / 'out')
      shutil.rmtree(directory)
      assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('has_generation', [True, False])
def test_a_list_of_eos_ids_survives_there_and_back(
  good, tmp_path, has_generation
):
  directory = shutil.copytree(good, tmp_path / 'theirs')
  if has_generation:
    _file('generation_config.json', b'{"eos_token_id": [7, 8]}')(directory)
  else:
    _only_config(eos_token_id=[7, 8])(directory)
  importing.import_directory(directory, tmp_path / 'ours')
  exporting.export_directory(tmp_path / 'ours', tmp_path / 'again')
  for name in ('config.json', 'generation_config.json'):
    values = json.loads((tmp_path / 'again' / name).read_text())
    assert values['eos_token_id'] == [7, 8], name
  importing.import_directory(tmp_path / 'again', tmp_path / 'twice')
  exporting.export_directory(tmp_path / 'twice', tmp_path / 'thrice')
  for name in ('config.json', 'generation_config.json'):
    assert (tmp_path / 'again' / name).read_bytes() == (
      tmp_path / 'thrice' / name
    ).read_bytes()
