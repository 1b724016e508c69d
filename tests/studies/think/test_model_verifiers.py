"""Verifiers that are models: pairs, scores by step, and both lives of one."""

import dataclasses
import json

import numpy as np
import pytest

from experiments import presets, test_time_scaling as experiments
from inference import generate, model_port
from inference.engine import engine_config
from inference.requests import requests
from inference.sampling import settings as settings_lib
from inference.search import judging, samples
from studies import verifier_calibration
from studies.think import model_verifiers, pool as pool_lib, real_model, texts
from tests.helpers import frozen_dirs, sample_pools

_ENGINE = engine_config.EngineConfig(
  max_sequences=4, decode_shapes=(4,), max_chunks=1, max_mixed_chunks=1
)
_RIGHT = '9+3+0=12\n4+7+1=12\n#### 122'
_WRONG = '9+3+0=12\n4+7+0=11\n#### 112', '9+3+0=11\n4+7+1=12\n#### 121'
_TEXTS = [[_RIGHT, _WRONG[0], _WRONG[1], _RIGHT], ['#### 1', '', 'x', 'y']]


def _answers(rows=_TEXTS):
  is_right_QN = np.array([[text == _RIGHT for text in row] for row in rows])
  return texts.Answers(
    pool=sample_pools.of(~is_right_QN * 1, is_right_QN),
    questions=[f'What is {i}?' for i in range(len(rows))],
    texts=[list(row) for row in rows],
  )


def test_a_pair_has_a_right_and_a_wrong_answer_to_one_question():
  found = model_verifiers.pairs_of(_answers())
  assert [each['prompt'] for each in found] == ['What is 0?'] * 2
  assert {each['chosen'] for each in found} == {_RIGHT}
  assert {each['rejected'] for each in found} == set(_WRONG)
  with pytest.raises(ValueError, match='pairs: got 1 questions whose answers'):
    model_verifiers.pairs_of(_answers(_TEXTS[1:]))
  many = [[_RIGHT, *(f'#### {i}' for i in range(40))]]
  found = model_verifiers.pairs_of(_answers(many))
  assert len(found) == model_verifiers.MOST_PAIRS


def test_the_score_of_each_step_is_that_of_the_answer_so_far():
  assert model_verifiers.parts_of(_RIGHT) == [
    '9+3+0=12', '9+3+0=12\n4+7+1=12', _RIGHT,
  ]  # fmt: skip
  assert model_verifiers.parts_of('\n\na\n') == ['\n\na', '\n\na\n']
  assert model_verifiers.parts_of('') == ['']
  asked = []

  def score(answered):
    """Less, the later a wrong carry; the whole answer is scored highest."""
    asked.extend(answered)
    return [
      9.0 if '#' in text else -1.0 - text.count('+0=') for _, text in answered
    ]

  last_QN, least_QN = model_verifiers.by_step(score, _answers())
  np.testing.assert_array_equal(last_QN, [[9, 9, 9, 9], [9, -1, -1, -1]])
  np.testing.assert_array_equal(least_QN, [[-2, -3, -2, -2], [9, -1, -1, -1]])
  assert len(asked) == len(set(asked)) == 8 + 4


def test_answers_are_kept_and_a_damaged_file_is_refused(tmp_path):
  answers = _answers([['a\x00', 'ö\n'], ['', 'b']])
  answers.save(tmp_path / 'a.npz')
  back = texts.draw(tmp_path / 'a.npz', None, [])
  assert (back.texts, back.questions) == (answers.texts, answers.questions)
  for name, value in vars(answers.pool).items():
    np.testing.assert_array_equal(getattr(back.pool, name), value)
  whole = (tmp_path / 'a.npz').read_bytes()
  for damaged in (b'damaged', whole[:-40]):
    (tmp_path / 'a.npz').write_bytes(damaged)
    with pytest.raises(ValueError, match='got no answers with their texts'):
      texts.Answers.load(tmp_path / 'a.npz')
  answers.pool.save(tmp_path / 'a.npz')  # without texts
  with pytest.raises(ValueError, match='got no answers with their texts'):
    texts.Answers.load(tmp_path / 'a.npz')


@pytest.mark.slow
def test_a_reward_model_learns_its_pairs_and_scores_as_it_is_served(tmp_path):
  base, answers = experiments.get_config('small'), _answers()
  few = dataclasses.replace(base.data, batch_size=8)  # a row per device
  base = dataclasses.replace(base, data=few)
  frozen_dirs.write(
    tmp_path / 'model',
    config=base.model,
    chat_template=presets.QUESTION_TEMPLATE,
  )
  judge = model_verifiers.train(
    answers, base, tmp_path / 'model', tmp_path / 'reward', steps=30
  )
  pairs = (tmp_path / 'reward_pairs.jsonl').read_text().splitlines()
  assert [*map(json.loads, pairs)] == model_verifiers.pairs_of(answers)
  generator = generate.load(judge, _ENGINE, is_for_rewards=True)
  found = model_verifiers.rewards(generator, answers)
  outcome_QN, process_QN = (
    found[name] for name in (model_verifiers.OUTCOME, model_verifiers.PROCESS)
  )
  assert verifier_calibration.auc(outcome_QN, answers.pool.is_right_QN)[0] == 1
  assert np.all(process_QN <= outcome_QN)
  # A whole answer has the reward that a server gives it.
  ids = model_port.encode_answer(generator, answers.questions[0], _RIGHT)
  (served,) = model_port.rewarder(generator)([ids])
  assert outcome_QN[0, 0] == pytest.approx(1 / (1 + np.exp(-served)), rel=1e-4)


@pytest.mark.slow
def test_a_model_that_is_there_judges_its_own_answers(tmp_path, monkeypatch):
  config = frozen_dirs.config(num_layers=1, max_length=512)
  frozen_dirs.write(tmp_path / 'model', config=config)
  lines = [json.dumps({'question': f'{i}?', 'answer': '1'}) for i in range(4)]
  (tmp_path / 'q.jsonl').write_text('\n'.join(lines))
  settings = real_model.Settings(
    model=str(tmp_path / 'model'),
    questions=str(tmp_path / 'q.jsonl'),
    num_samples=2,
    max_tokens=4,
  )
  pool, scores = verifier_calibration.of_model(settings, tmp_path)
  assert pool_lib.STEPS not in scores
  verdicts_QN = scores[model_verifiers.SELF]
  assert verdicts_QN.shape == (4, 2)
  assert np.all((verdicts_QN >= 0) & (verdicts_QN <= 1))
  # Each score is that of its own answer.
  (path,) = tmp_path.glob('texts_*.npz')
  answers = texts.Answers.load(path)
  np.testing.assert_array_equal(answers.pool.tokens_QN, pool.tokens_QN)
  monkeypatch.setattr(judging, 'self_verified', _asks_for_lengths)
  generator = generate.load(settings.model, _ENGINE)
  np.testing.assert_array_equal(
    model_verifiers.self_verified(generator, answers),
    [
      [len(f'{question}{text}'.encode()) for text in row]
      for question, row in zip(answers.questions, answers.texts, strict=True)
    ],
  )


def _asks_for_lengths(generator, *, costs):
  """Returns the scorer whose score is the length of question and answer."""
  return samples.Requested(
    request=lambda question, sample: requests.Request(
      prompt_ids=tuple(f'{question.prompt}{sample.answer}'.encode()),
      settings=settings_lib.Settings(temperature=0.0, max_tokens=1),
      target=0,
    ),
    read=lambda completion: completion.usage.prompt_tokens,
    costs=costs,
    num_more=0,
  )
