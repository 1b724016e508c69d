"""Rollout batches that are drawn ahead, by the weights of earlier steps."""

import numpy as np
import pytest

from inference import rollouts
from tests.helpers.training import rollout_run
from training.objectives.policy import corrections
from training.rollouts.dialogues import episodes
from training.rollouts.draws import drawing, scoring, stored

KINDS = 'train', 'eval', 'rollout'
_CORRECTED = {'correction': corrections.Correction(level='token')}


def _made(directory, data_of=None, **changes):
  """Returns 8 steps, two on each rollout batch, one batch drawn ahead."""
  made = rollout_run.experiment(
    directory,
    {'staleness': 1, 'inner_epochs': 1, **changes.pop('rollout', {})},
    objective=_CORRECTED,
    **changes,
  )
  if data_of is not None:
    made.data.path = rollout_run.experiment(data_of).data.path
  return made


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  """The directory of an uninterrupted run."""
  directory = tmp_path_factory.mktemp('whole')
  rollout_run.run(_made(directory), directory / 'run')
  return directory


def _assert_same(workdir, other, kinds=KINDS):
  for kind in kinds:
    assert rollout_run.records(workdir, kind) == rollout_run.records(
      other, kind
    )


@pytest.mark.slow
def test_each_batch_is_of_the_weights_before_the_last_batch(whole):
  drawn = rollout_run.records(whole / 'run', 'rollout')
  assert [each['step'] for each in drawn] == [0, 2, 4, 6]
  # The first two batches are drawn by the first weights.
  assert [each['staleness'] for each in drawn] == [0, 2, 2, 2]
  # Sampler and trainer are the same policy for the first batch alone.
  assert drawn[0]['gap_max'] < 1e-3
  assert min(each['gap_max'] for each in drawn[1:]) > 1e-3
  for each in rollout_run.records(whole / 'run', 'train'):
    assert 0 < each['ess'] <= 1 + 1e-6


@pytest.mark.slow
def test_evaluations_between_do_not_change_what_is_drawn(whole, tmp_path):
  made = _made(tmp_path, whole, eval_every_steps=0)
  rollout_run.run(made, tmp_path / 'run')
  _assert_same(tmp_path / 'run', whole / 'run', ('train', 'rollout'))


@pytest.mark.slow
@pytest.mark.parametrize('stop_after', [2, 3])
def test_a_resumed_run_has_the_bits_of_a_whole_one(whole, tmp_path, stop_after):
  made = _made(tmp_path, whole)
  rollout_run.run(made, tmp_path / 'run', stop_after=stop_after)
  rollout_run.run(made, tmp_path / 'run')
  _assert_same(tmp_path / 'run', whole / 'run')
  samples = [p / 'run' / 'samples.jsonl' for p in (whole, tmp_path)]
  assert samples[0].read_text() == samples[1].read_text()


@pytest.mark.slow
def test_a_sampler_that_dies_ahead_ends_the_run_and_loses_nothing(
  whole, tmp_path
):
  def dying(model):
    sampler = rollouts.make(model)
    sample, calls = sampler.sample, []

    def once(asks):
      # Answers are sampled; held-out answers are the likeliest ones.
      calls.extend(ask for ask in asks[:1] if ask.temperature)
      if len(calls) == 4:
        raise RuntimeError('killed')
      return sample(asks)

    sampler.sample = once
    return sampler

  made = _made(tmp_path, whole)
  with pytest.raises(RuntimeError, match='killed'):
    rollout_run.run(made, tmp_path / 'run', make_sampler=dying)
  rollout_run.run(made, tmp_path / 'run')
  _assert_same(tmp_path / 'run', whole / 'run')


@pytest.mark.parametrize('proximal', ['recomputed', 'own'])
def test_an_objective_that_corrects_for_nothing_is_refused(tmp_path, proximal):
  made = rollout_run.experiment(
    tmp_path,
    {'staleness': 2, 'num_prompts': 4, 'inner_epochs': 1},
    objective={'proximal': proximal},
  )
  with pytest.raises(ValueError, match='rollouts.staleness: got 2 with'):
    made.validate()


def test_a_batch_that_is_stored_is_the_same():
  episode = episodes.Episode(
    prompt_ids=(5, 6),
    ids=(7, 8, 9),
    text='é\x00',
    logprobs=np.float32([-0.1, -1e-20, -3.3]),
    versions=np.int32([4, 4, 0]),
    is_truncated=True,
    record={'answer': np.int64(3), 'tags': ['a']},
    messages=({'role': 'user', 'content': 'x'},),
    trained=np.array([True, False, True]),
    turn_rewards={1: 0.1},
  )
  drawn = drawing.Drawn(
    index=3,
    version=4,
    episodes=(episode,),
    scored=scoring.Scored(
      total_N=np.array([1 / 3]),
      parts={'a': np.array([1 / 3])},
      failures={'a': 1},
    ),
    share_without_signal=0.25,
    num_rounds=2,
    failed={'a': 1.0},
  )
  found = stored.read(stored.text_of(drawn))
  assert stored.text_of(found) == stored.text_of(drawn)
  (again,) = found.episodes
  assert (again.ids, again.text) == (episode.ids, episode.text)
  for name in ('logprobs', 'versions', 'trained'):
    array, before = getattr(again, name), getattr(episode, name)
    assert array.dtype == before.dtype
    np.testing.assert_array_equal(array, before)
  assert again.turn_rewards == {1: 0.1}
  assert found.scored.failures == {'a': 1}


def test_a_record_that_no_checkpoint_can_hold_is_refused():
  with pytest.raises(TypeError, match='rollouts.staleness: got a set in the'):
    stored._plain({1})
