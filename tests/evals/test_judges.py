"""Judges by hand: both orders, ties, malformed words, bias and its error."""

import json
import math

import numpy as np
import pytest

from data.problems import generator, records
from evals import evaluate, judges, options as options_lib
from evals.results import scores, verdicts
from evals.tasks import judge as judge_task
from tests.helpers import eval_models
from text.replies import answers

FIRST, SECOND, TIE, MALFORMED = judges.Choice


def _pairs(*answers):
  return [judges.Comparison('p', *each) for each in answers]


def _judge_of(choices):
  """Returns a judge that chooses in the order of `choices`, and its log."""
  seen, waiting = [], iter(choices)

  def judge(comparisons):
    seen.extend(comparisons)
    return [judges.Verdict(next(waiting)) for _ in comparisons]

  return judge, seen


def _scores(orders, *, is_labelled=True, clusters=None):
  found = [
    judges.Orders(*(judges.Verdict(choice) for choice in each))
    for each in orders
  ]
  group = verdicts.group(
    'judge',
    found,
    [str(i) for i in range(len(found))],
    is_labelled=is_labelled,
    clusters=clusters,
  )
  return {score.name: score for score in group.scores}, group


def test_every_pair_is_shown_in_both_orders():
  judge, seen = _judge_of([FIRST, SECOND, SECOND, TIE])
  found = judges.both_orders(judge, _pairs(('a', 'b'), ('c', 'd')))
  assert [tuple(c)[1:] for c in seen] == [
    ('a', 'b'), ('c', 'd'), ('b', 'a'), ('d', 'c'),
  ]  # fmt: skip
  assert [tuple(v.choice for v in each) for each in found] == [
    (FIRST, SECOND),
    (SECOND, TIE),
  ]


def test_a_judge_that_loses_a_comparison_is_refused():
  with pytest.raises(
    ValueError, match='judge: got 1 verdicts on 4 comparisons'
  ):
    judges.both_orders(
      lambda comparisons: [judges.Verdict(TIE)], _pairs(('a', 'b'), ('c', 'd'))
    )


def test_a_judge_that_prefers_a_place_has_half_a_win_and_a_full_bias():
  found, _ = _scores([(FIRST, FIRST)] * 4)
  assert found['accuracy'].value == 0.5
  assert found['position_bias'].value == 1.0
  assert found['consistency'].value == 0.0
  found, _ = _scores([(SECOND, SECOND)] * 4)
  assert found['accuracy'].value == 0.5
  assert found['position_bias'].value == -1.0


def test_the_scores_of_mixed_verdicts():
  orders = [
    (FIRST, SECOND),  # the first answer wins, consistently
    (SECOND, FIRST),  # it loses
    (FIRST, FIRST),  # the place wins
    (FIRST, TIE),
    (TIE, TIE),
    (FIRST, MALFORMED),
  ]
  found, group = _scores(orders, is_labelled=False)
  wins, biases = [1, 0, 0.5, 0.75, 0.5], [0, 0, 1, 0.5, 0]
  assert found['win_rate'].values == pytest.approx(wins)
  assert found['win_rate'].standard_error == pytest.approx(
    np.std(wins, ddof=1) / math.sqrt(5)
  )
  assert found['position_bias'].values == pytest.approx(biases)
  assert found['position_bias'].value == pytest.approx(0.3)
  assert found['consistency'].value == pytest.approx(3 / 5)
  assert found['tie_rate'].value == pytest.approx(3 / 10)
  assert found['malformed_rate'].value == pytest.approx(1 / 12)
  assert group.num_examples == 6
  assert group.notes == (
    '1 of 6 pairs have a verdict that cannot be read; they count in'
    ' malformed_rate alone',
  )
  assert group.examples[5]['backward']['choice'] == 'malformed'


def test_no_verdict_at_all_is_an_error_with_the_words():
  found = [judges.Orders(*[judges.Verdict(MALFORMED, 'I like both')] * 2)]
  with pytest.raises(ValueError, match="first words were 'I like both'; expec"):
    verdicts.group('judge', found, ['0'], is_labelled=True)


def test_scores_compare_in_either_order_and_each_answer_is_scored_once():
  asked = []

  def length(answered):
    asked.extend(answered)
    return [len(answer) for _, answer in answered]

  pairs = _pairs(('aaa', 'b'), ('b', 'cc'), ('dd', 'cc'))
  found = judges.both_orders(judges.by_score(length), pairs)
  assert [tuple(v.choice for v in each) for each in found] == [
    (FIRST, SECOND),
    (SECOND, FIRST),
    (TIE, TIE),
  ]
  assert sorted(answer for _, answer in asked) == ['aaa', 'b', 'cc', 'dd']
  close = judges.by_score(length, tie_margin=1)
  assert [v.choice for v in close(pairs)] == [FIRST, TIE, TIE]


def test_a_verifier_is_a_judge():
  """It prefers the right solution of every problem, in either order."""
  settings = generator.Settings(count=40, kind='pairs')
  problems = generator.make(settings, 'train')
  right = {made.question: made.answer for made in problems}
  pairs = [
    judges.Comparison(
      record['prompt'],
      record['chosen'][0]['content'],
      record['rejected'][0]['content'],
    )
    for record in records.make(settings, 'train')
  ]

  def verify(answered):
    return [
      answers.is_right(right[prompt[0]['content']], answer)
      for prompt, answer in answered
    ]

  found = judges.both_orders(judges.by_score(verify), pairs)
  assert {each.forward.choice for each in found} == {FIRST}
  assert {each.backward.choice for each in found} == {SECOND}


def test_a_score_that_is_not_finite_is_no_verdict():
  judge = judges.by_score(lambda answered: [math.nan, 1.0])
  (verdict,) = judge(_pairs(('a', 'b')))
  assert verdict.choice is MALFORMED


@pytest.mark.parametrize(
  ('words', 'choice'),
  [
    ('A is right.\n[[A]]', FIRST),
    ('[[B]]', SECOND),
    ('Equal. [[C]]', TIE),
    # An answer that quotes a verdict does not decide.
    ('Answer A says "[[A]]" itself, but is wrong.\n[[B]]', SECOND),
    ('A is better', MALFORMED),
    ('[[D]]', MALFORMED),
    ('[A]', MALFORMED),
    ('', MALFORMED),
  ],
)
def test_the_last_mark_of_the_words_is_the_verdict(words, choice):
  assert judges.read_choice(words) is choice


def test_a_language_model_sees_both_answers_in_both_orders():
  conversations = []

  def ask(asked):
    conversations.extend(asked)
    return ['[[A]]'] * len(asked)

  prompt = [
    {'role': 'system', 'content': 'Be brief.'},
    {'role': 'user', 'content': 'Two and two?'},
  ]
  pair = judges.Comparison(prompt, 'Four', 'Five')
  (orders,) = judges.both_orders(judges.by_asking(ask), [pair])
  assert orders.forward.choice is orders.backward.choice is FIRST
  assert [len(each) for each in conversations] == [1, 1]
  (forward,), (backward,) = conversations
  assert 'system: Be brief.' in forward['content']
  assert '### Answer A\nFour\n\n### Answer B\nFive' in forward['content']
  assert '### Answer A\nFive\n\n### Answer B\nFour' in backward['content']


# ------------------------------------------------------------------------------
# The task


def _file(tmp_path, *lines):
  path = tmp_path / 'pairs.jsonl'
  path.write_text(''.join(json.dumps(line) + '\n' for line in lines))
  return path


def test_a_reward_model_judges_a_file_of_pairs(tmp_path):
  path = _file(
    tmp_path,
    {'prompt': 'p', 'chosen': 'long answer', 'rejected': 'short'},
    {
      'prompt': [{'role': 'user', 'content': 'q'}],
      'chosen': [{'role': 'assistant', 'content': 'no'}],
      'rejected': 'a longer one',
    },
  )
  model = eval_models.model(
    logprob_fn=None,
    reward_fn=lambda answers: [len(ids) for ids in answers],
    encode_answer=lambda prompt, answer: list(answer.encode()),
  )
  result = evaluate.run(f'judge:{path}', model)
  assert result.score('accuracy').values == (1.0, 0.0)
  assert result.score('position_bias').value == 0.0
  saved = tmp_path / 'result.json'
  result.save(saved)
  assert scores.load(saved).score('accuracy').value == 0.5


def test_a_language_model_judges_a_file_of_pairs(tmp_path):
  path = _file(tmp_path, {'prompt': 'p', 'a': 'one', 'b': 'two'})
  seen = []
  model = eval_models.model(
    max_length=4096,
    sample_fn=eval_models.writer([['[[A]]'], ['hm [[A]]']], seen=seen),
    encode_chat=lambda messages: list(messages[0]['content'].encode()),
  )
  result = evaluate.run(
    f'judge:{path}', model, options_lib.Options(max_tokens=9, seed=3)
  )
  assert result.score('win_rate').value == 0.5
  assert result.score('position_bias').value == 1.0
  assert (seen[0][1].max_tokens, seen[0][1].seed) == (9, 3)


def test_a_comparison_that_does_not_fit_the_judge_is_refused(tmp_path):
  path = _file(tmp_path, {'prompt': 'p', 'a': 'one', 'b': 'two'})
  model = eval_models.model(
    max_length=64,
    sample_fn=eval_models.writer([]),
    encode_chat=lambda messages: list(messages[0]['content'].encode()),
  )
  with pytest.raises(
    ValueError, match='got a comparison of .* at most 54 besi'
  ):
    evaluate.run(f'judge:{path}', model, options_lib.Options(max_tokens=10))


def test_a_model_without_rewards_and_template_is_no_judge(tmp_path):
  path = _file(tmp_path, {'prompt': 'p', 'a': 'one', 'b': 'two'})
  with pytest.raises(ValueError, match='judge: got a model that neither gives'):
    evaluate.run(f'judge:{path}', eval_models.model())


@pytest.mark.parametrize(
  ('line', 'message'),
  [
    ({'prompt': 'p', 'chosen': 'a'}, 'line 1: got the fields prompt, cho'),
    ({'prompt': 'p'}, 'expected prompt, chosen and rejected, or'),
    ({'prompt': '', 'a': 'x', 'b': 'y'}, "prompt: got '', expected text, or"),
    ({'prompt': 'p', 'a': 1, 'b': 'y'}, 'a: got 1, expected text, or a list'),
    ({'prompt': 'p', 'a': 'x', 'chosen': 'y'}, 'got the fields prompt, a, cho'),
    ({'prompt': 'p', 'x': 'y'}, 'got the fields prompt, x, expected prompt'),
  ],
)
def test_a_wrong_line_is_named(tmp_path, line, message):
  with pytest.raises(ValueError, match=message):
    judge_task.read_pairs(str(_file(tmp_path, line)))


def test_labelled_and_unlabelled_pairs_are_not_mixed(tmp_path):
  path = _file(
    tmp_path,
    {'prompt': 'p', 'a': 'x', 'b': 'y'},
    {'prompt': 'p', 'chosen': 'x', 'rejected': 'y'},
  )
  with pytest.raises(ValueError, match='expected one kind; split the file'):
    judge_task.read_pairs(str(path))
