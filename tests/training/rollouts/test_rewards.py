"""Parts of a reward: each by hand, and a failure that ends no run."""

import numpy as np
import pytest

from evals import judges
from evals.verifiers import texts
from training import experiment as experiment_lib
from training.rollouts import rewards, rollout_config
from training.rollouts.dialogues import episodes


def _episode(text, prompt=(1,), **record):
  ids = tuple(text.encode())
  return episodes.Episode(
    prompt_ids=prompt,
    ids=ids,
    text=text,
    logprobs=np.zeros(len(ids), np.float32),
    versions=np.zeros(len(ids), np.int32),
    is_truncated=False,
    record={'question': f'q{prompt[0]}', **record},
  )


def test_a_verifier_reads_the_text_and_the_record():
  part = rewards.Verified(verifier=texts.Number(is_strict=True))
  found = part([
    _episode('#### 4', answer='4'), _episode('4', answer='4'),
  ])  # fmt: skip
  assert found == [1.0, 0.0]
  assert found.failures == 0
  assert rollout_config.RewardConfig(reward=part).label == 'number'
  with pytest.raises(ValueError, match="answer: got 'x', expected number"):
    part.check({'answer': 'x'})


def test_a_verifier_that_fails_gives_0_and_is_counted(caplog):
  part = rewards.Verified(verifier=texts.Pattern())
  found = part([
    _episode('a' * 40 + '!', pattern='^(a+)+$'), _episode('b', pattern='b'),
    _episode('b'),  # a record without a pattern
  ])  # fmt: skip
  assert found == [0.0, 1.0, 0.0]
  assert found.failures == 2
  assert '2 of 3 answers have the reward 0' in caplog.text


def test_marks_stand_once_and_in_order():
  part = rewards.Marked(marks=('<a>', '####'))
  said = ['<a> x #### 1', '#### <a>', '<a> x', '<a> #### 1 #### 2', '']
  assert part([_episode(text or ' ') for text in said]) == [1, 0, 0, 0, 0]
  with pytest.raises(ValueError, match=r"marks: got \('',\), expected texts"):
    rewards.Marked(marks=('',))


def test_the_length_counts_sampled_tokens_alone():
  part = rewards.Length(free=2)
  of_tools = episodes.Episode(
    prompt_ids=(1,), ids=(1, 2, 3, 4, 5), text='x', logprobs=np.zeros(5),
    versions=np.zeros(5, np.int32), is_truncated=False,
    trained=np.array([True, True, False, False, True]),
  )  # fmt: skip
  assert part([_episode('abcde'), _episode('a'), of_tools]) == [-3, 0, -1]


def test_a_reward_model_is_bound_before_the_run():
  part = rewards.RewardModel(path='runs/rm')
  with pytest.raises(ValueError, match="got 'runs/rm' without its weights"):
    part([_episode('a')])
  seen = []

  def open_scorer(path):
    seen.append(path)
    return lambda answered: [len(answer) for _, answer in answered]

  configs = (
    rollout_config.RewardConfig(reward=part, weight=2.0),
    rollout_config.RewardConfig(reward=rewards.Length()),
  )
  bound = rewards.bind(configs, open_scorer)
  assert bound[0].reward([_episode('abc')]) == [3.0]
  assert (bound[0].weight, bound[1], seen) == (2.0, configs[1], ['runs/rm'])


def _longer(comparisons):
  choices = {1: judges.Choice.FIRST, 0: judges.Choice.TIE}
  return [
    judges.Verdict(
      choices.get(
        int(np.sign(len(c.first) - len(c.second))), judges.Choice.SECOND
      )
    )
    for c in comparisons
  ]


def test_a_judge_compares_with_the_next_answer_to_the_same_prompt():
  group = [_episode(x) for x in ('aaa', 'a', 'aa')]
  other = [_episode(x, (2,)) for x in ('a', 'a')]
  alone = [_episode('a', (3,))]
  part = rewards.Judged(judge=_longer)
  assert part([*group, *other, *alone]) == [1, 0, 0.5, 0.5, 0.5, 0]
  part = rewards.Judged(judge=_longer, against='answer')
  assert part([_episode('aa', answer='a'), _episode('a', answer='a')]) == [
    1.0, 0.5
  ]  # fmt: skip


def test_a_judge_that_prefers_a_place_gives_all_answers_the_same():
  def first(comparisons):
    return [judges.Verdict(judges.Choice.FIRST) for _ in comparisons]

  part = rewards.Judged(judge=first)
  assert part([_episode('a'), _episode('b'), _episode('c')]) == [0.5] * 3


def test_a_judge_without_a_verdict_or_an_answer_is_counted():
  def silent(comparisons):
    return [judges.Verdict(judges.Choice.MALFORMED) for _ in comparisons]

  found = rewards.Judged(judge=silent)([_episode('a'), _episode('b')])
  assert (found, found.failures) == ([0.0, 0.0], 2)

  far = rewards.EndpointJudge(url='http://127.0.0.1:9/v1', model='m')
  found = rewards.Judged(judge=far)([_episode('a'), _episode('b')])
  assert (found, found.failures) == ([0.0, 0.0], 2)


def test_a_reward_is_recorded_with_its_fields():
  part = rewards.Verified(verifier=texts.Number(is_strict=True))
  recorded = experiment_lib._jsonable(rollout_config.RewardConfig(reward=part))
  assert recorded['reward']['type'] == 'training.rollouts.rewards.Verified'
  assert recorded['reward']['verifier'] == {
    'type': 'evals.verifiers.texts.Number', 'is_strict': True
  }  # fmt: skip
