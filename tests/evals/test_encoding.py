"""The border of a context: BOS, white space, truncation, special tokens."""

import pytest

from evals import encoding
from tests.helpers import eval_models, tiny_models

BOS = tiny_models.byte_tokenizer().bos_id


def _ids(text):
  return list(text.encode())


def test_white_space_moves_to_the_continuation():
  pair = encoding.encode_pair(eval_models.model(), 'a \n', ' b')
  assert pair == (_ids('a'), _ids(' \n b'), 0)


def test_bos_begins_a_context_where_the_model_has_it():
  model = eval_models.model(adds_bos=True)
  assert encoding.encode_pair(model, 'a', 'b') == ([BOS, *_ids('a')], [98], 0)
  # BOS comes once, even without a context.
  assert encoding.encode_pair(model, '', 'b') == ([BOS], [98], 0)


def test_an_empty_context_is_the_prefix():
  assert encoding.encode_pair(eval_models.model(), '', 'b').context == [BOS]
  model = eval_models.model(prefix_id=7)
  assert encoding.encode_pair(model, '', 'b').context == [7]
  # White space alone leaves nothing before the continuation.
  assert encoding.encode_pair(model, '  ', 'b') == ([7], _ids('  b'), 0)


class _Merging:
  """A tokenizer in which 'ab' is one token, 0, and bytes are others."""

  bos_id = eos_id = 300

  def encode(self, text):
    return [0 if c == 'X' else ord(c) for c in text.replace('ab', 'X')]


def test_a_token_across_the_border_is_scored_as_part_of_nothing():
  # As in lm_eval: the whole text is cut at the length of the encoded context.
  model = eval_models.model(tokenizer=_Merging())
  assert encoding.encode_pair(model, 'ca', 'bd') == ([99, 97], [100], 0)


def test_a_long_context_is_cut_from_the_left():
  model = eval_models.model(max_length=4)
  pair = encoding.encode_pair(model, 'abcdef', 'gh')
  # 5 tokens fit, since the last one is predicted and never read.
  assert pair == (_ids('def'), _ids('gh'), 3)


def test_continuations_that_cannot_be_scored_are_refused():
  model = eval_models.model(max_length=4)
  with pytest.raises(ValueError, match='adds no token'):
    encoding.encode_pair(model, 'abc', '')
  with pytest.raises(ValueError, match='continuation of 5 tokens, expected 1'):
    encoding.encode_pair(model, 'a', 'bcdef')


def test_special_names_are_text_unless_the_prompt_is_trusted():
  def encode_prompt(text):
    parts = text.split('<|bos|>')
    return [
      i for n, part in enumerate(parts) for i in [BOS] * (n > 0) + _ids(part)
    ]

  model = eval_models.model(adds_bos=True, encode_prompt=encode_prompt)
  assert BOS not in encoding.encode(model, '<|bos|>a')[1:]
  assert encoding.encode_trusted(model, 'a') == [BOS, 97]
  assert encoding.encode_trusted(model, '<|bos|>a') == [BOS, 97]


class _Marking:
  special_tokens = {'<s>': 1, '<s>x': 2}

  def encode_marked(self, text, spans):
    ids, end = [], 0
    for start, stop in spans:
      ids += [*text[end:start].encode(), self.special_tokens[text[start:stop]]]
      end = stop
    return [*ids, *text[end:].encode()], None


def test_names_of_special_tokens_are_found_the_longest_first():
  encode_prompt = encoding.naming_special_tokens(_Marking())
  assert encode_prompt('a<s>b<s>xc') == [97, 1, 98, 2, 99]
  assert encode_prompt('plain <s') == list(b'plain <s')
  assert encode_prompt('') == []


def test_a_prompt_leaves_room_for_its_completion():
  model = eval_models.model(max_length=8)
  assert encoding.fit_prompt(model, [1, 2, 3, 4, 5], 5).context == [3, 4, 5]
  with pytest.raises(ValueError, match='max_tokens: got 8, expected less than'):
    encoding.fit_prompt(model, [1], 8)


def test_a_model_without_a_function_says_so():
  with pytest.raises(ValueError, match='sample_fn: got none'):
    eval_models.model().required_sample_fn()
  with pytest.raises(ValueError, match='logprob_fn: got none'):
    eval_models.model(logprob_fn=None).required_logprob_fn()
