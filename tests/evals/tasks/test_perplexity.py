"""Windows, perplexity and bits per byte, against sums over single tokens."""

import math

import numpy as np
import pytest

from evals.tasks import perplexity
from tests.helpers import eval_models
from text import tokenizer

TEXT = 'In the beginning there was nothing, naïvely put. ' * 3


@pytest.mark.parametrize('num_tokens', [1, 3, 4, 5, 9, 40])
@pytest.mark.parametrize(
  ('max_length', 'stride'), [(4, 4), (4, 2), (4, 1), (5, 3)]
)
def test_windows_predict_each_token_once(num_tokens, max_length, stride):
  found = list(perplexity.windows(num_tokens, max_length, stride))
  predicted = [i for w in found for i in range(w.start, w.end)]
  assert predicted == list(range(num_tokens))
  for w in found:
    # The window reads the tokens from first_read to the one before the last.
    assert w.end - 1 - w.first_read <= max_length
    # A window has as much context as fits, at least what the stride leaves.
    assert (
      w.first_read == -1 or w.start - w.first_read >= max_length - stride + 1
    )


def test_the_windows_of_the_documentation():
  assert [tuple(w) for w in perplexity.windows(10, 4, 2)] == [
    (-1, 0, 4),
    (1, 4, 6),
    (3, 6, 8),
    (5, 8, 10),
  ]


def test_a_stride_beyond_the_window_is_refused():
  with pytest.raises(ValueError, match='stride: got 5, expected 1 to'):
    list(perplexity.windows(9, 4, 5))


@pytest.mark.parametrize('stride', [1, 5, 32])
def test_scores_are_sums_over_tokens(stride):
  model = eval_models.model()
  table = model.logprob_fn.__self__
  group = perplexity.measure([TEXT], model, stride=stride)
  ids = [model.prefix, *TEXT.encode()]
  # A prediction of the table depends on three tokens. A stride of 1 or 5 always
  # leaves three; with the whole window, a token after a border sees only one.
  nats = 0.0
  for w in perplexity.windows(len(ids) - 1, 32, stride):
    for i in range(w.start, w.end):
      nats -= table.logprobs_V(ids[w.first_read + 1 : i + 1])[ids[i + 1]]
  assert group.score('nats_per_token').value == pytest.approx(
    nats / len(TEXT.encode())
  )
  assert group.score('perplexity').value == pytest.approx(
    math.exp(nats / len(TEXT.encode()))
  )
  assert group.score('bits_per_byte').value == pytest.approx(
    nats / len(TEXT.encode()) / math.log(2)
  )
  assert group.details['num_bytes'] == len(TEXT.encode()) == len(ids) - 1


def test_context_helps_only_where_it_is_read():
  # Predictions depend on three tokens: all strides that leave three agree.
  model = eval_models.model()
  values = [
    perplexity.measure([TEXT], model, stride=stride).score('perplexity').value
    for stride in (1, 7, 29, 32)
  ]
  assert values[0] == pytest.approx(values[1], rel=1e-12)
  assert values[0] == pytest.approx(values[2], rel=1e-12)
  assert values[0] != pytest.approx(values[3], rel=1e-6)


class _Pairs:
  """A tokenizer of two letters per token, which adds a space in front."""

  bos_id = eos_id = 70_000

  def encode(self, text):
    text = ' ' + text
    return [
      ord(text[i]) * 256 + (ord(text[i + 1]) if i + 1 < len(text) else 0)
      for i in range(0, len(text), 2)
    ]

  def decode(self, ids):
    return ''.join(chr(i // 256) + chr(i % 256) for i in ids).strip('\0 ')

  def num_bytes_V(self):
    return np.full(70_001, 2)


def test_bytes_are_those_of_the_text_whatever_the_tokens():
  text = 'abcdefghij' * 1000  # 10000 bytes: 3 pieces
  uniform = eval_models.model(tokenizer=_Pairs(), logprob_fn=_uniform)
  group = perplexity.measure([text], uniform)
  # 5001 tokens of log(1000) nats each.
  bits = 5001 * math.log2(1000) / 10_000
  assert group.score('bits_per_byte').value == pytest.approx(bits)
  assert group.details['num_bytes'] == 10_000
  assert group.details['num_tokens'] == 5001
  # Pieces are cut from the text: another tokenizer has the same pieces.
  by_bytes = perplexity.measure([text], eval_models.model(logprob_fn=_uniform))
  assert by_bytes.example_ids == group.example_ids
  assert len(group.example_ids) == 3
  # All tokens are equal, so the pieces differ by at most the token at a border.
  values = np.array(group.score('bits_per_byte').values)
  assert np.all(np.abs(values / bits - 1) < 2 / 1024)


def _uniform(requests):
  from evals import ports

  return [
    ports.Logprobs(0.0, False, np.full(len(c), -math.log(1000)))
    for _, c in requests
  ]


def test_a_piece_is_an_example():
  text = TEXT * 80
  group = perplexity.measure([text], eval_models.model(), stride=32)
  num_pieces = -(-len(text.encode()) // perplexity.PIECE_BYTES)
  assert group.num_examples == num_pieces == 3
  assert group.clusters is None
  score = group.score('bits_per_byte')
  assert 0 < score.standard_error < score.value
  in_nats = group.score('nats_per_token').standard_error
  assert score.standard_error == pytest.approx(in_nats / math.log(2), rel=0.01)
  # The error of an exponential, to first order.
  assert group.score('perplexity').standard_error == pytest.approx(
    in_nats * group.score('perplexity').value
  )


def test_documents_are_scored_apart_and_cluster():
  model = eval_models.model()
  group = perplexity.measure(['abc', '', 'abcdef'], model)
  assert group.clusters == ('0', '1')
  alone = [
    perplexity.measure([text], model).details['nats']
    for text in ('abc', 'abcdef')
  ]
  assert group.details['nats'] == pytest.approx(sum(alone))
  assert math.isnan(perplexity.measure(['abc'], model).scores[0].standard_error)


def test_a_limit_takes_whole_characters_of_the_first_pieces():
  text = 'é' * 5000  # 2 bytes each
  limited = perplexity.measure(
    [text, 'more'], eval_models.model(logprob_fn=_uniform), max_pieces=2
  )
  assert limited.details['num_bytes'] == 2 * perplexity.PIECE_BYTES
  odd = perplexity.measure(
    ['a' + text], eval_models.model(logprob_fn=_uniform), max_pieces=1
  )
  assert odd.details['num_bytes'] == perplexity.PIECE_BYTES - 1


def test_a_tokenizer_that_loses_text_is_told_of():
  class Lower(tokenizer.ByteTokenizer):
    def encode(self, text):
      return super().encode(text.lower())

  group = perplexity.measure(['ABC'], eval_models.model(tokenizer=Lower()))
  assert 'does not give back 1 of the texts' in group.notes[0]
  assert not perplexity.measure(['ABC'], eval_models.model()).notes


def test_no_text_is_no_perplexity():
  with pytest.raises(ValueError, match='got no text'):
    perplexity.measure(['', ''], eval_models.model())
