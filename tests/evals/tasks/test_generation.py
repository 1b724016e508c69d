"""Completions: room for them, stop strings, grades and samples."""

import pytest

from evals import ports
from evals.tasks import generation
from tests.helpers import eval_models

SETTINGS = ports.SampleSettings(max_tokens=8)
SAMPLED = ports.SampleSettings(max_tokens=8, temperature=0.5)


def _prompt(text, answer, **fields):
  return generation.Prompt(
    **{
      'id': text,
      'text': text,
      'answer': answer,
      'grade': generation.exact_match([answer]),
    }
    | fields
  )


def test_completions_are_graded():
  sample = eval_models.writer([['4'], [' 5 \n']])
  group = generation.measure(
    [_prompt('2+2=', '5'), _prompt('2+3=', '5')],
    eval_models.model(sample_fn=sample),
    SETTINGS,
  )
  assert group.score('exact_match').values == (0.0, 1.0)
  assert group.examples[1]['completions'] == [' 5 \n']


def test_an_answer_may_be_any_of_several_or_a_number():
  grade = generation.exact_match(['yes', 'Yes'])
  assert grade(' Yes\n') == {'exact_match': 1.0}
  assert grade('YES') == {'exact_match': 0.0}
  grade = generation.exact_match(['1000'], 'number')
  assert grade('it is 1,000.00.') == {'exact_match': 1.0}
  assert grade('none') == {'exact_match': 0.0}
  with pytest.raises(ValueError, match='with match number, expected numbers'):
    generation.exact_match(['ten'], 'number')


def test_samples_give_pass_at_k():
  sample = eval_models.writer([['a', 'b', 'a', 'b'], ['b'] * 4])
  group = generation.measure(
    [_prompt('x', 'a'), _prompt('y', 'a')],
    eval_models.model(sample_fn=sample),
    SAMPLED,
    num_samples=4,
  )
  got = {score.name: score.values for score in group.scores}
  assert got['exact_match'] == (0.5, 0.0)
  assert got['pass@1'] == pytest.approx((0.5, 0.0))
  # Two of four samples are right. Two drawn of them are both wrong in 1 of 6.
  assert got['pass@2'] == pytest.approx((5 / 6, 0.0))
  assert got['pass@4'] == (1.0, 0.0)


def test_greedy_samples_would_all_be_the_same():
  with pytest.raises(ValueError, match='num_samples: got 2 with temperature 0'):
    generation.measure(
      [_prompt('x', 'a')],
      eval_models.model(sample_fn=eval_models.writer([])),
      SETTINGS,
      num_samples=2,
    )


def test_stop_strings_are_the_prompt_s_and_answers_keep_their_order():
  seen = []
  sample = eval_models.writer([['a'], ['c'], ['b']], seen=seen)
  prompts = [
    _prompt('1', 'a', stop=('\n',)),
    _prompt('2', 'b', stop=('.',)),
    _prompt('3', 'c', stop=('\n',)),
  ]
  group = generation.measure(
    prompts, eval_models.model(sample_fn=sample), SETTINGS
  )
  assert [settings.stop for _, settings, _ in seen] == [('\n',), ('.',)]
  assert [prompts for prompts, _, _ in seen] == [[[49], [51]], [[50]]]
  assert group.score('exact_match').value == 1.0


def test_a_long_prompt_is_cut_and_told_of():
  seen = []
  sample = eval_models.writer([['a']], seen=seen)
  group = generation.measure(
    [_prompt('x' * 40, 'a')], eval_models.model(sample_fn=sample), SETTINGS
  )
  assert len(seen[0][0][0]) == 24
  assert '1 of 1 prompts were cut' in group.notes[0]


def test_a_chat_goes_through_the_template():
  def encode_chat(messages):
    (message,) = messages
    return list(f'<{message["role"]}>{message["content"]}<assistant>'.encode())

  seen = []
  model = eval_models.model(
    sample_fn=eval_models.writer([['a']], seen=seen),
    max_length=64,
    encode_chat=encode_chat,
  )
  generation.measure([_prompt('x', 'a')], model, SETTINGS, is_chat=True)
  assert bytes(seen[0][0][0]) == b'<user>x<assistant>'
  with pytest.raises(ValueError, match='x: chat: got a model without'):
    generation.measure(
      [_prompt('x', 'a')],
      eval_models.model(sample_fn=eval_models.writer([])),
      SETTINGS,
      is_chat=True,
    )


def test_too_few_completions_are_noticed():
  sample = eval_models.writer([['a']])
  with pytest.raises(ValueError, match='got 1 completions of a prompt'):
    generation.measure(
      [_prompt('x', 'a')],
      eval_models.model(sample_fn=sample),
      SAMPLED,
      num_samples=3,
    )
