"""Log-probabilities of a chat: names and bytes of every kind of token."""

import pytest

from inference.sampling import logprobs
from inference.server.answers import chat_logprobs
from tests.helpers import tiny_models


def _entry(tokenizer, token_id, *, as_ids=False, ids=(), values=()):
  writer = chat_logprobs.ChatLogprobs(tokenizer, as_ids=as_ids)
  found = logprobs.TokenLogprobs(-0.1 - 0.2, ids, values)
  written = writer.write([(token_id, found)])
  assert written['refusal'] is None
  (entry,) = written['content']
  return entry


def test_a_token_that_is_no_whole_character_is_spelled_in_bytes():
  tokenizer = tiny_models.byte_tokenizer()
  assert _entry(tokenizer, 0xE2)['token'] == 'bytes:\\xe2'
  assert _entry(tokenizer, 0xE2)['bytes'] == [0xE2]
  assert _entry(tokenizer, 97)['token'] == 'a'


@pytest.mark.slow
def test_a_special_token_has_its_name_and_no_bytes(talker):
  tokenizer = talker.tokenizer
  token_id = tokenizer.special_tokens['<|im_end|>']
  entry = _entry(tokenizer, token_id)
  assert (entry['token'], entry['bytes']) == ('<|im_end|>', [])
  assert _entry(tokenizer, token_id, as_ids=True)['token'] == (
    f'token_id:{token_id}'
  )
  # The byte tokenizer has no strings for its special ids.
  tokenizer = tiny_models.byte_tokenizer()
  assert _entry(tokenizer, tokenizer.eos_id)['token'] == (
    f'token_id:{tokenizer.eos_id}'
  )


@pytest.mark.parametrize('ids', [(), (97, 98, -1)])
def test_alternatives_are_those_asked_for_to_the_bit(ids):
  value = -0.1 - 0.2
  values = (value, float('-inf'), 0.0)[: len(ids)]
  entry = _entry(tiny_models.byte_tokenizer(), 97, ids=ids, values=values)
  assert entry['logprob'] == value
  assert [
    (each['token'], each['logprob'], each['bytes'])
    for each in entry['top_logprobs']
  ] == [('a', value, [97]), ('b', -9999.0, [98])][: len(ids)]
