"""Budget forcing and the cap: reasoning has its length, an answer follows."""

import dataclasses

import pytest

from inference.constraints import thinking
from inference.requests import requests as requests_lib
from inference.sampling import settings as settings_lib
from inference.search import reading
from inference.search.strategies import forcing
from tests.helpers import tiny_models
from tests.helpers.serving import reference_engine, searches, simulated_device
from text.replies import parser

_TOKENIZER = tiny_models.byte_tokenizer()
_STYLE = parser.Style(reasoning=('<think>', '</think>'))
_READ = reading.reader(_TOKENIZER, _STYLE, is_reasoning=True)
_CLOSING = list(b'</think>')


def _forced(texts, **fields):
  strategy = forcing.BudgetForcing(tokenizer=_TOKENIZER, **fields)
  engine = searches.saying(*texts)
  (found,) = searches.run(strategy, engine, read=_READ)
  return found


def test_wait_stands_where_the_model_closed_its_reasoning():
  found = _forced(
    ['2+2 is 5.</think>', ' No, 4.</think>', 'It is 4.'],
    most_reasoning=60,
    num_waits=1,
  )
  assert found.chosen.text == '2+2 is 5.Wait No, 4.</think>It is 4.'
  assert found.chosen.reading.reasoning == '2+2 is 5.Wait No, 4.'
  assert found.text == 'It is 4.'
  receipt = found.receipt
  assert receipt.forced_tokens == len('Wait</think>')
  assert receipt.reasoning_tokens == len('2+2 is 5. No, 4.')
  assert receipt.answer_tokens == len('It is 4.') + 1  # and EOS
  # Both closing markers that the model wrote.
  assert receipt.discarded_tokens == 2 * len('</think>')


def test_reasoning_that_is_too_long_is_closed():
  found = _forced(['so and so on', 'It is 4.'], most_reasoning=5)
  assert found.chosen.text == 'so an</think>It is 4.'
  assert found.receipt.reasoning_tokens == 5


def test_waits_end_with_the_most_reasoning():
  found = _forced(
    ['a</think>'] * 3 + ['It is 4.'], most_reasoning=20, num_waits=9
  )
  # 9 tokens twice, with the markers; then 2, which are part of a marker.
  assert found.chosen.text == 'aWaitaWaita<</think>It is 4.'
  assert found.text == 'It is 4.'


def test_a_model_that_ends_inside_of_its_reasoning_has_ended():
  found = _forced(['four'], most_reasoning=20, num_waits=3)
  assert found.text == ''
  assert found.chosen.reading.reasoning == 'four'
  assert found.receipt.num_samples == 1


# ------------------------------------------------------------------------------
# The cap, which the engine keeps.


@pytest.fixture(scope='module')
def engine():
  return reference_engine.engine(**reference_engine.TIGHT)


def _request(most: int, *, is_open=True, **settings):
  return requests_lib.Request(
    prompt_ids=(1, 2, 3, 4),
    settings=settings_lib.Settings(
      **{'max_tokens': 24, 'seed': 1, 'ignore_eos': True, **settings}
    ),
    thinking=thinking.Cap(
      most_tokens=most,
      opening='<think>',
      closing='</think>',
      is_open=is_open,
    ),
  )


def _answers(engine, request):
  found = {}
  for _, update in engine.answer([request]):
    if update.completion:
      found[update.index] = update.completion
  list(engine.run())
  return [found[index] for index in sorted(found)]


@pytest.mark.parametrize('temperature', [0.0, 1.0])
@pytest.mark.parametrize('most', [0, 1, 6])
def test_reasoning_ends_at_its_cap(engine, temperature, most):
  request = _request(most, temperature=temperature, n=2)
  free = _answers(engine, dataclasses.replace(request, thinking=None))
  for capped, before in zip(_answers(engine, request), free, strict=True):
    assert capped.token_ids[:most] == before.token_ids[:most]
    assert capped.token_ids[most : most + 8] == _CLOSING
    assert len(capped.token_ids) == 24  # the answer goes on
    read = _READ(capped.text, capped.token_ids, capped.num_text_ids)
    assert read.num_reasoning <= most + 8


def test_the_cap_holds_where_the_sequence_loses_its_pages(engine):
  request = _request(6)
  (alone,) = _answers(engine, request)
  engine.submit(request)
  found = []
  for step in range(200):
    if step in (4, 8, 13):
      for sequence in list(engine.manager.running()):
        simulated_device.preempt(engine.manager, sequence)
    found += engine.step()
    if not engine.has_work:
      break
  (completion,) = [x.completion for x in found if x.completion]
  assert completion.token_ids == alone.token_ids
  assert completion.usage.prefill_tokens > 4  # computed again


def _pushed(cap: thinking.Cap, text: str) -> tuple[int, int]:
  """Returns (reasoning tokens, tokens until the marker is forced)."""
  matcher = thinking.Capped(cap, None, _TOKENIZER).matcher()
  for number, token in enumerate(text.encode()):
    if matcher._forced:
      return matcher.num_tokens, number
    matcher.push(token)
  return matcher.num_tokens, len(text)


@pytest.mark.parametrize(
  ('text', 'expected'),
  [
    ('plain text without end', (0, 22)),
    (' <think>ab</think>cdefghijkl', (10, 28)),  # its marker counts
    ('<think>abcdefghijklmnop', (10, 17)),
    ('no <think>abcdefghijkl', (0, 22)),  # text, as the parser has it
    ('<think>a</think>\n<think>bcdefg', (10, 25)),  # both blocks together
  ],
)
def test_reasoning_that_the_model_opens_itself_is_counted(text, expected):
  cap = thinking.Cap(most_tokens=10, opening='<think>', closing='</think>')
  assert _pushed(cap, text) == expected


def test_a_marker_that_the_model_has_begun_is_completed():
  cap = thinking.Cap(
    most_tokens=5, opening='<think>', closing='</think>', is_open=True
  )
  matcher = thinking.Capped(cap, None, _TOKENIZER).matcher()
  for token in b'ab</t':
    matcher.push(token)
  assert bytes(matcher._forced) == b'hink>'


def test_a_cap_that_makes_no_sense_is_refused():
  with pytest.raises(ValueError, match='reasoning.budget: got -1'):
    thinking.Cap(most_tokens=-1, opening='<', closing='>')
  with pytest.raises(ValueError, match='expected two texts'):
    thinking.Cap(most_tokens=1, opening='<', closing='')
