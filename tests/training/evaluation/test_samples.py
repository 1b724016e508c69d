"""Samples: their prompts, and that they come from the model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from parallel import parallel_config
from tests.helpers.training import tiny_run
from training import assemble
from training.evaluation import evals_config, samples
from training.objectives import port


def _batch(segments, weights):
  shape = np.shape(segments)
  return {
    'tokens': np.arange(np.prod(shape)).reshape(shape),
    'segment_ids': np.array(segments),
    'weights': np.array(weights, np.float32),
  }


def test_the_prompt_of_a_text_is_half_of_its_document():
  batch = _batch([[1] * 6 + [2] * 4, [1, 0, 0, 0] + [0] * 6], np.ones((2, 10)))
  found = samples.choose_prompts([batch], 2, most=8, is_text=True)
  assert found == [[0, 1, 2]]  # the second document is too short
  found = samples.choose_prompts([batch], 2, most=2, is_text=True)
  assert found == [[0, 1]]


def test_the_prompt_of_a_conversation_ends_where_the_answer_begins():
  batch = _batch([[1] * 6], [[0, 0, 1, 1, 0, 1]])
  found = samples.choose_prompts([batch], 2, most=8, is_text=False)
  assert found == [[0, 1, 2]]
  # Too long a question is none.
  assert not samples.choose_prompts([batch], 2, most=2, is_text=False)


def _sampler(root, corpus, **fields):
  experiment = tiny_run.experiment(
    corpus, evals=evals_config.EvalsConfig(samples=2), **fields
  )
  parts = assemble.assemble(experiment, root / 'work')
  parts.batches.close()
  made = samples.Sampler(parts.learner, parts.tokenizer, parts.eval_batches)
  return made, parts


@pytest.mark.slow
def test_the_most_likely_token_is_drawn_as_often_as_it_should_be(tmp_path):
  """Pearson's statistic over 2,100 draws; false alarms: 0.1 %."""
  sampler, parts = _sampler(tmp_path, tiny_run.write_corpus(tmp_path))
  params = parts.learner.init(jax.random.key(0)).params
  ids = sampler.prompts[0]
  batch = sampler._batch([[], []], 0, 0)
  model = port.Model(parts.learner.any_rows_model)
  tokens_1T = jnp.array([ids])
  hidden = model.hidden(
    params, tokens_1T, jnp.arange(len(ids))[None], jnp.ones_like(tokens_1T)
  )
  logits_V = model.logits(params, hidden.states_BTD)[0, -1] / 0.8
  expected_V = np.asarray(jax.nn.softmax(logits_V), np.float64)
  counts_V = np.zeros_like(expected_V)
  for n in range(300):
    rows, length = batch['seeds'].shape
    seeds_B = np.arange(rows, dtype=np.int32) + rows * n
    batch['seeds'] = np.repeat(seeds_B[:, None], length, axis=1)
    next_B = np.asarray(sampler._step(params, batch))
    # Rows without a prompt repeat the first: all but row 1 are of one prompt.
    counts_V[next_B[[0, *range(2, rows)]]] += 1
  # Ids without a token have no probability.
  assert not counts_V[expected_V == 0].any()
  counts_V = counts_V[expected_V > 0]
  expected_V = expected_V[expected_V > 0]
  total = counts_V.sum()
  statistic = (
    (counts_V - total * expected_V) ** 2 / (total * expected_V)
  ).sum()
  freedom = len(expected_V) - 1
  # Its mean and variance (the cells are many): 3.1 standard deviations.
  assert statistic < freedom + 3.1 * np.sqrt(2 * freedom)


@pytest.mark.slow
@pytest.mark.parametrize(
  'parallel',
  [
    parallel_config.ParallelConfig(kind='pmap'),
    parallel_config.ParallelConfig(data=4, context=2),
  ],
  ids=['pmap', 'context'],
)
def test_devices_change_no_sample(tmp_path, parallel):
  corpus = tiny_run.write_corpus(tmp_path)
  rows = parallel_config.ParallelConfig()
  drawn = []
  for config in (rows, parallel):
    sampler, parts = _sampler(tmp_path, corpus, parallel=config)
    state = parts.learner.init(jax.random.key(0))
    drawn.append(sampler.draw(state.params, 6))
    assert drawn[-1] == sampler.draw(state.params, 6)
    assert drawn[-1] != sampler.draw(state.params, 7)
  assert drawn[0] == drawn[1]
  assert len(drawn[0]) == 2
  assert all(each.text for each in drawn[0])


def test_none_are_drawn_when_none_are_wanted(tmp_path):
  corpus = tiny_run.write_corpus(tmp_path)
  experiment = tiny_run.experiment(corpus)
  parts = assemble.assemble(experiment, tmp_path / 'work')
  parts.batches.close()
  made = samples.Sampler(parts.learner, parts.tokenizer, parts.eval_batches)
  assert made.draw(None, 1) == []
