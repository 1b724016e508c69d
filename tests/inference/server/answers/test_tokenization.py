"""The tokenizer over HTTP, as lm-eval's remote mode uses it."""

import types
from typing import Any

import pytest

from inference.server.answers import tokenization
from inference.server.api import shapes, tokenizer_schema
from tests.helpers import tiny_models
from tests.helpers.open_weights import hf_files
from text import hf_tokenizer


def test_text_and_ids_and_back(http):
  answer = http.post('/tokenize', json={'prompt': 'h\u00e9'}).json()
  assert answer == {
    'tokens': [256, 104, 195, 169],
    'count': 4,
    'max_model_len': 64,
  }
  plain = {'content': 'h\u00e9', 'add_special_tokens': False}
  assert http.post('/tokenize', json=plain).json()['tokens'] == [104, 195, 169]
  ids = {'tokens': [256, 104, 195, 169]}
  assert http.post('/detokenize', json=ids).json() == {'prompt': 'h\u00e9'}


def test_special_tokens_are_known_by_name(http):
  info = http.get('/tokenizer_info').json()
  assert info['eos_token'] == '<|eos_token|>'
  assert info['vocab_size'] == 259
  assert info['chat_template'] is None
  for name, token_id in (('bos', 256), ('eos', 257), ('pad', 258)):
    text = info[f'{name}_token']
    body = {'prompt': text, 'add_special_tokens': False}
    assert http.post('/tokenize', json=body).json()['tokens'] == [token_id]
  # Inside a longer text the name is plain text: no user forges an EOS.
  for prompt in (f' {text}', text):
    body = {'prompt': prompt, 'add_special_tokens': prompt == text}
    assert len(http.post('/tokenize', json=body).json()['tokens']) > 10


@pytest.mark.parametrize(
  ('family', 'bos', 'eos', 'pad'),
  [
    ('llama3', '<|begin_of_text|>', '<|eot_id|>', None),
    ('qwen', None, '<|im_end|>', '<|endoftext|>'),
    ('llama2', '<s>', '</s>', None),
    ('gpt2', '<|endoftext|>', '<|endoftext|>', None),
    ('wordpiece', '[CLS]', '[SEP]', '[PAD]'),
  ],
)
def test_the_strings_are_those_of_the_model(family, bos, eos, pad, tmp_path):
  hf_files.FAMILIES[family](tmp_path / 'theirs')
  tokenizer = hf_tokenizer.convert(tmp_path / 'theirs', tmp_path / 'ours')
  generator: Any = types.SimpleNamespace(
    tokenizer=tokenizer,
    engine=types.SimpleNamespace(context=64),
    frozen=types.SimpleNamespace(
      config=tiny_models.llama_like(), chat_template='{{ bos_token }}'
    ),
  )
  info = tokenization.info(generator)
  shapes.TokenizerInfo.model_validate(info)  # as the OpenAPI document has it
  strings = info['bos_token'], info['eos_token'], info['pad_token']
  assert strings == (bos, eos, pad)
  for text in filter(None, strings):
    body = tokenizer_schema.TokenizeRequest(
      prompt=text, add_special_tokens=False
    )
    tokens = tokenization.tokenize(generator, body)['tokens']
    assert tokens == [tokenizer.special_tokens[text]]


@pytest.mark.parametrize(
  ('path', 'body', 'message'),
  [
    ('/tokenize', {}, 'prompt: got neither, expected prompt or content'),
    ('/tokenize', {'prompt': 'a', 'content': 'a'}, 'got both, expected'),
    ('/tokenize', {'prompt': 'a', 'model': 'gpt-4'}, "got 'gpt-4', expected"),
    ('/tokenize', {'prompt': 'a', 'b': 1}, 'b: got a parameter that'),
    ('/detokenize', {'tokens': [259]}, 'tokens: got token id 259, expected 0'),
    ('/detokenize', {'tokens': [-1]}, 'tokens: got token id -1, expected'),
    ('/detokenize', {'tokens': ['a']}, 'tokens: Input should be a valid int'),
    ('/detokenize', {'tokens': [1], 'model': 'b'}, "got 'b', expected 'tiny'"),
  ],
)
def test_what_makes_no_sense_is_refused(http, path, body, message):
  answer = http.post(path, json=body)
  assert answer.status_code in (400, 404)
  assert message in answer.json()['error']['message']
