"""Log-probabilities in JSON: names of tokens, values, offsets."""

import numpy as np
import pytest

from inference.sampling import logprobs
from inference.server.answers import logprobs_json
from tests.helpers import tiny_models
from tests.helpers.open_weights import hf_files
from text import bpe, detokenize, hf_tokenizer


def _score(chosen, *pairs):
  ids, values = zip(*pairs, strict=True) if pairs else ((), ())
  return logprobs.TokenLogprobs(chosen, ids, values)


def _scores(**kwargs):
  return logprobs_json.LogprobsWriter(tiny_models.byte_tokenizer(), **kwargs)


def test_tokens_are_written_with_values_names_and_places():
  written = _scores(offset=5).write(
    [104, 105],
    [_score(-0.5, (104, -0.5), (97, -1.5)), _score(-3.0, (97, -0.25))],
    end=7,
  )
  assert written == {
    'tokens': ['h', 'i'],
    'token_logprobs': [-0.5, -3.0],
    # The most probable tokens come first; the sampled one is always there.
    'top_logprobs': [{'h': -0.5, 'a': -1.5}, {'a': -0.25, 'i': -3.0}],
    'text_offset': [5, 6],
  }
  assert list(written['top_logprobs'][1]) == ['a', 'i']


def test_the_first_token_of_a_prompt_follows_nothing():
  written = _scores().write([256, 97], [None, _score(-1.0)], end=1)
  assert written['token_logprobs'] == [None, -1.0]
  assert written['top_logprobs'] == [None, {'a': -1.0}]
  # BOS has no text: both tokens begin at offset 0.
  assert written['text_offset'] == [0, 0]


def test_tokens_without_text_of_their_own_are_named_by_their_ids():
  euro = list('€'.encode())
  written = _scores().write(
    [*euro, 257], [_score(-1.0, (128, -0.5))] * 4, end=1
  )
  names = [f'token_id:{token_id}' for token_id in [*euro, 257]]
  assert written['tokens'] == names
  assert all(len(top) == 2 for top in written['top_logprobs'])
  # A character is complete with its last byte. EOS comes after it.
  assert written['text_offset'] == [0, 0, 0, 1]


def test_ids_if_that_is_asked_for():
  written = _scores(as_ids=True).write([104], [_score(-1.0, (97, -0.5))], end=1)
  assert written['tokens'] == ['token_id:104']
  assert written['top_logprobs'] == [{'token_id:97': -0.5, 'token_id:104': -1}]


@pytest.mark.parametrize('is_continued', [False, True])
@pytest.mark.parametrize('kind', [*hf_files.FAMILIES, 'byte', 'bpe'])
def test_a_token_with_text_has_it_at_its_offset(kind, is_continued, tmp_path):
  tokenizer = _tokenizer(kind, tmp_path)
  rng = np.random.default_rng(len(kind))
  special = [tokenizer.bos_id, tokenizer.eos_id]
  num_named = 0
  for trial in range(60):
    # Bytes at random are rarely UTF-8, and texts nearly always.
    ids = rng.integers(0, tokenizer.vocab_size, 30).tolist()
    if trial % 2:
      words = rng.choice(hf_files.AWKWARD, 3)
      ids = [special[trial % 4 // 2], *tokenizer.encode(' '.join(words))]
      cut = int(rng.integers(len(ids)))
      ids = [*ids[:cut], *rng.permutation(ids[cut:]).tolist()]
    decoder = detokenize.StreamDecoder(tokenizer, is_continued=is_continued)
    text = ''.join(map(decoder.push, ids)) + decoder.finish()
    if not is_continued:
      assert text == tokenizer.decode(ids)
    written = logprobs_json.LogprobsWriter(
      tokenizer, offset=2, is_continued=is_continued
    ).write(ids, [None] * len(ids), end=2 + len(text))
    offsets = written['text_offset']
    assert offsets == sorted(offsets)
    for name, offset in zip(written['tokens'], offsets, strict=True):
      if not name.startswith('token_id:'):
        num_named += 1
        assert f'##{text}'.startswith(name, offset), (ids, name, offset)
  assert num_named > 300


def _tokenizer(kind, directory):
  if kind == 'byte':
    return tiny_models.byte_tokenizer()
  if kind == 'bpe':
    return bpe.train(hf_files.CORPUS * 3, 300)
  return hf_tokenizer.convert(
    hf_files.FAMILIES[kind](directory / 'theirs'), directory / 'ours'
  )


def test_behind_bytes_that_are_not_utf8_a_token_is_at_its_place():
  ids = [0xE2, 0x61, 0xE2, 0x82, 0x62, 0xE0, 0x80, 0xF0, 0x9F, 0xE2, 0x82, 0xAC]
  text = '\ufffda\ufffdb\ufffd\ufffd\ufffd€'
  assert tiny_models.byte_tokenizer().decode(ids) == text
  written = _scores().write(ids, [None] * len(ids), end=len(text))
  assert written['text_offset'] == [0, 1, 2, 2, 3, 4, 5, 6, 6, 7, 7, 7]


@pytest.mark.parametrize('kind', [*hf_files.FAMILIES, 'byte'])
def test_a_prompt_that_its_tokenizer_changes_keeps_the_places(kind, tmp_path):
  tokenizer = _tokenizer(kind, tmp_path)
  text = 'Hello  World \ufb01x caf\u00e9'
  ids = [tokenizer.bos_id, *tokenizer.encode(text)]
  places = logprobs_json.prompt_places(tokenizer, text, ids)
  assert (places is None) == (tokenizer.decode(ids) == text)
  written = logprobs_json.LogprobsWriter(tokenizer).write(
    ids, [None] * len(ids), end=len(text), places=places
  )
  offsets = written['text_offset']
  assert offsets == sorted(offsets)
  # The first token of the last word, in the text and not in the changed one.
  last_word = tokenizer.encode(text[: text.index(' caf')])
  assert text.index(' caf') <= offsets[1 + len(last_word)] <= len(text) - 4


class _Doubled:
  """A tokenizer in which ids that differ by 10 have the same text."""

  def token_bytes(self, token_id):
    return b'%d' % (token_id % 10)

  first_bytes = token_bytes


@pytest.mark.parametrize(('chosen', 'name'), [(3, '3'), (13, 'token_id:13')])
def test_two_tokens_of_one_text_keep_an_entry_each(chosen, name):
  scores = _score({3: -0.5, 13: -1.5}[chosen], (3, -0.5), (13, -1.5))
  written = logprobs_json.LogprobsWriter(_Doubled()).write(
    [chosen], [scores], end=1
  )
  assert written['tokens'] == [name]
  assert written['top_logprobs'] == [{'3': -0.5, 'token_id:13': -1.5}]
  assert written['token_logprobs'] == [written['top_logprobs'][0][name]]


def test_what_is_not_in_the_text_is_placed_at_its_end():
  written = _scores().write([97, 98, 99], [_score(-1.0)] * 3, end=1)
  assert written['text_offset'] == [0, 1, 1]


def test_minus_infinity_is_spelled_and_spare_places_are_left_out():
  scores = _score(-1e30, (97, -0.5), (98, float('-inf')), (-1, 0.0))
  written = _scores().write([120], [scores], end=1)
  assert written['top_logprobs'] == [{'a': -0.5, 'b': -9999.0, 'x': -9999.0}]
  assert written['token_logprobs'] == [-9999.0]


def test_what_is_not_a_number_is_not_hidden():
  (value,) = _scores().write([97], [_score(float('nan'))], end=1)[
    'token_logprobs'
  ]
  assert value != value


def test_parts_are_joined_and_nothing_is_a_part():
  scores = _scores()
  first = scores.write([97], [_score(-1.0)], end=1)
  second = scores.write([98], [_score(-2.0)], end=2)
  nothing = scores.write([], [], end=2)
  joined = logprobs_json.joined(first, nothing, second)
  assert joined['tokens'] == ['a', 'b']
  assert joined['text_offset'] == [0, 1]
