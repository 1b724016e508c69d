"""Tokenizer directories: older forms, contradictions and damage."""

import json

import pytest
import tokenizers

from tests.helpers.open_weights import hf_files as hf_files_lib
from text import hf_files, hf_tokenizer


def _convert(directory):
  return hf_tokenizer.convert(directory, directory / 'saved')


def _edit(directory, name, change):
  path = directory / name
  content = json.loads(path.read_text('utf-8'))
  change(content)
  path.write_text(json.dumps(content), 'utf-8')


def _theirs(directory):
  transformers = pytest.importorskip(
    'transformers', reason='the reference implementation is not installed'
  )
  return transformers.AutoTokenizer.from_pretrained(directory)


def test_names_in_a_file_of_their_own(tmp_path):
  directory = hf_files_lib.llama2(tmp_path)
  (directory / 'tokenizer_config.json').unlink()
  names = {
    'bos_token': '<s>',
    'eos_token': {'content': '</s>', 'lstrip': False, 'normalized': False},
    'additional_special_tokens': ['<extra>'],
  }
  (directory / 'special_tokens_map.json').write_text(json.dumps(names))
  tok = _convert(directory)
  assert dict(tok.names) == {'bos_token': '<s>', 'eos_token': '</s>'}
  assert tok.special_tokens['<extra>'] == tok.vocab_size - 1


def test_tokens_that_only_the_config_has(tmp_path):
  directory = hf_files_lib.llama2(tmp_path)
  num_ids = _convert(directory).vocab_size
  extra = {'content': '<tool>', 'special': False, 'normalized': False}

  def change(config):
    config['pad_token'] = '<pad>'
    config['image_token'] = '<image>'
    config['additional_special_tokens'] = ['</s>', '<x>']
    config['added_tokens_decoder'] = {
      '1': {'content': '<s>', 'special': True, 'lstrip': True},
      str(num_ids): extra | {'__type': 'AddedToken'},
    }

  _edit(directory, 'tokenizer_config.json', change)
  tok, theirs = _convert(directory), _theirs(directory)
  assert dict(tok.names) == theirs.special_tokens_map
  assert tok.names['image_token'] == '<image>'
  for token in ('<pad>', '<image>', '<x>', '<tool>'):
    assert token in theirs.get_vocab()
    text = f'a {token} b <s> c'
    spans = hf_files_lib.spans_of(tok, text)
    assert tok.encode_marked(text, spans).ids == theirs.encode(
      text, add_special_tokens=False
    )
  assert '<tool>' not in tok.special_tokens
  assert tok.pad_id == theirs.pad_token_id


def test_how_tokens_match_is_said_by_the_config(tmp_path):
  directory = hf_files_lib.llama2(tmp_path)
  flags = {'content': '</s>', 'special': True, 'rstrip': True}
  _edit(
    directory,
    'tokenizer_config.json',
    lambda config: config.update(added_tokens_decoder={'2': flags}),
  )
  tok, theirs = _convert(directory), _theirs(directory)
  text = 'the</s>  cat'
  ids = tok.encode_marked(text, hf_files_lib.spans_of(tok, text)).ids
  assert ids == theirs.encode(text, add_special_tokens=False)
  assert tok.decode(ids) == 'the cat'


def test_added_tokens_in_a_file_of_their_own(tmp_path):
  directory = hf_files_lib.gpt2(tmp_path)
  num_ids = _convert(directory).vocab_size
  (directory / 'added_tokens.json').write_text(
    json.dumps(
      {'<b>': num_ids + 1, '<a>': num_ids, '<|endoftext|>': num_ids - 1}
    )
  )
  tok, theirs = _convert(directory), _theirs(directory)
  assert tok.encode('x<a><b>') == theirs.encode(
    'x<a><b>', add_special_tokens=False
  )
  assert tok.encode('x<a><b>')[-2:] == [num_ids, num_ids + 1]


def test_a_named_token_is_special_even_if_it_was_only_added(tmp_path):
  directory = hf_files_lib.qwen(tmp_path)
  _edit(
    directory,
    'tokenizer_config.json',
    lambda config: config.update(eos_token='</think>'),
  )
  tok = _convert(directory)
  assert tok.eos_id not in tok.encode('a</think>')
  assert tok.token_bytes(tok.eos_id) == b''


@pytest.mark.parametrize('in_config', [False, True])
def test_one_chat_template(tmp_path, in_config):
  directory = hf_files_lib.gpt2(tmp_path, template='from the config')
  if not in_config:  # it has precedence
    (directory / 'chat_template.jinja').write_text('of its \u00e9wn', 'utf-8')
  expected = 'from the config' if in_config else 'of its \u00e9wn'
  assert _convert(directory).chat_templates() == {'default': expected}
  loaded = hf_tokenizer.load(directory / 'saved')
  assert loaded.chat_templates() == {'default': expected}
  assert _theirs(directory / 'saved').chat_template == expected


@pytest.mark.parametrize('has_default', [False, True])
def test_several_chat_templates(tmp_path, has_default):
  directory = hf_files_lib.gpt2(tmp_path, template='ignored')
  if has_default:
    (directory / 'chat_template.jinja').write_text('plain')
  more = directory / 'additional_chat_templates'
  more.mkdir()
  (more / 'tool_use.jinja').write_text('with tools')
  (more / 'rag.jinja').write_text('with documents')
  expected = {'tool_use': 'with tools', 'rag': 'with documents'}
  expected |= {'default': 'plain'} if has_default else {}
  assert _convert(directory).chat_templates() == expected
  assert _theirs(directory).chat_template == expected
  # What is saved is files alone, for transformers too.
  assert all(path.is_file() for path in (directory / 'saved').iterdir())
  assert _theirs(directory / 'saved').chat_template == expected


def test_a_list_of_chat_templates_in_the_config(tmp_path):
  named = [
    {'name': 'default', 'template': 'plain'},
    {'name': 'tool_use', 'template': 'with tools'},
  ]
  directory = hf_files_lib.gpt2(tmp_path, template=named)
  assert _convert(directory).chat_templates() == {
    'default': 'plain',
    'tool_use': 'with tools',
  }


def test_no_chat_template(tmp_path):
  assert _convert(hf_files_lib.gpt2(tmp_path)).chat_templates() == {}


@pytest.mark.parametrize('wrong', [3, [{'name': 'default'}], {'default': 1}])
def test_a_chat_template_that_is_none(tmp_path, wrong):
  tok = _convert(hf_files_lib.gpt2(tmp_path, template=wrong))
  with pytest.raises(ValueError, match='expected a string or a list of names'):
    tok.chat_templates()


def test_an_empty_directory(tmp_path):
  with pytest.raises(FileNotFoundError, match=r'no tokenizer\.json in .*copy'):
    _convert(tmp_path)


@pytest.mark.parametrize(
  'name', ['spiece.model', 'vocab.json', 'tekken.json', 'qwen.tiktoken']
)
def test_a_tokenizer_that_was_not_converted(tmp_path, name):
  (tmp_path / name).write_text('x')
  with pytest.raises(
    FileNotFoundError, match=rf'only {name}; convert it once.*save_pretrained'
  ):
    _convert(tmp_path)


@pytest.mark.parametrize(
  ('name', 'text', 'error'),
  [
    ('tokenizer.json', '{"model": ', r'tokenizer\.json is not JSON'),
    ('tokenizer.json', '[]', r'tokenizer\.json holds list, expected an object'),
    ('tokenizer.json', '{}', r'tokenizer\.json is not a tokenizer'),
    ('tokenizer_config.json', '{"a', r'tokenizer_config\.json is not JSON'),
    ('generation_config.json', '3', r'generation_config\.json holds int'),
    (
      'generation_config.json',
      '{"eos_token_id": [1, "2"]}',
      'got eos_token_id .*expected an id or a list',
    ),
    (
      'tokenizer_config.json',
      '{"eos_token": {"text": "</s>"}}',
      'got the special token .*expected a string or an object',
    ),
    (
      'tokenizer_config.json',
      '{"added_tokens_decoder": {"1": "<s>"}}',
      'added_tokens_decoder is damaged',
    ),
    (
      'tokenizer_config.json',
      '{"added_tokens_decoder": {"7": {"content": "<s>"}}}',
      "got '<s>' with id 7, expected 1",
    ),
    ('tokenizer_config.json', '{}', 'a tokenizer without an end of text'),
  ],
)
def test_damaged_files(tmp_path, name, text, error):
  directory = hf_files_lib.llama2(tmp_path / 'model')
  (directory / name).write_text(text)
  with pytest.raises(ValueError, match=error) as caught:
    _convert(directory)
  assert str(directory) in str(caught.value)
  assert not (directory / 'saved').exists()


def test_a_file_that_encodes_at_random(tmp_path):
  directory = hf_files_lib.gpt2(tmp_path)
  _edit(
    directory,
    'tokenizer.json',
    lambda content: content['model'].update(dropout=0.1),
  )
  with pytest.raises(ValueError, match=r'got BPE dropout 0\.1, expected null'):
    _convert(directory)


def test_text_cleaned_after_it_was_shown(tmp_path):
  directory = hf_files_lib.wordpiece(tmp_path)
  _edit(
    directory,
    'tokenizer_config.json',
    lambda config: config.update(clean_up_tokenization_spaces=True),
  )
  with pytest.raises(ValueError, match='clean_up_tokenization_spaces true'):
    _convert(directory)


def test_other_tokens_around_a_text(tmp_path):
  directory = hf_files_lib.llama2(tmp_path)
  model = tokenizers.Tokenizer.from_file(str(directory / 'tokenizer.json'))
  model.post_processor = hf_files_lib.bos_first('<unk>', 0)
  model.save(str(directory / 'tokenizer.json'))
  with pytest.raises(
    ValueError, match=r'puts the ids \[0\] before .*expected BOS \[1\]'
  ):
    _convert(directory)


def test_read_saved_leaves_other_files_alone(tmp_path):
  directory = hf_files_lib.gpt2(tmp_path)
  (directory / 'model.safetensors').write_bytes(b'weights')
  assert set(hf_files.read_saved(directory)) == {
    'tokenizer.json', 'tokenizer_config.json'
  }  # fmt: skip
