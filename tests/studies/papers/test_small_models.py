"""Small models: training, adapters, and results that are kept."""

import jax
import numpy as np
import pytest

from data.synthetic import pairs
from frozen import format as frozen_format
from models import adapter_config, model_config
from studies.papers import port, small_models

IDS = 12


def recipe(**changes):
  fields = {
    'model': model_config.ModelConfig(
      vocab_size=IDS, num_layers=1, model_width=16, num_heads=2,
      num_kv_heads=2, head_width=8, mlp='none', mlp_width=0,
      max_length=pairs.ROW_LENGTH, tie_embeddings=False, scan_layers=False,
    ),
    'optimizer': small_models.adam(1e-2),
    'num_steps': 200,
    'look_every': 200,
  }  # fmt: skip
  return small_models.Recipe(**(fields | changes))


@pytest.mark.slow
def test_training_learns_and_an_adapter_leaves_the_weights():
  known = pairs.draw(np.random.default_rng(0), num_pairs=4, num_ids=IDS)
  ids_BT, is_answer_BT = known.rows(pairs.FORWARD)

  def draw(rng):
    del rng
    return ids_BT, is_answer_BT

  trainer = small_models.Trainer(recipe())
  (first, start), (last, end) = (
    (step, trainer.seen(variables, ids_BT))
    for step, variables in trainer.run(3, draw)
  )
  assert (first, last) == (0, 200)
  is_asked_BT = is_answer_BT[:, 1:]
  assert start[0][is_asked_BT].mean() > 1.5  # log 12 is 2.5
  assert end[0][is_asked_BT].mean() < 0.1
  assert end[1][is_asked_BT].all()

  base = trainer.last(3, draw)
  np.testing.assert_array_equal(trainer.seen(base, ids_BT)[0], end[0])
  others = pairs.draw(np.random.default_rng(1), num_pairs=4, num_ids=IDS)
  other_BT, _ = others.rows(pairs.FORWARD)
  adapted = small_models.Trainer(
    recipe(adapter=adapter_config.AdapterConfig(rank=4, alpha=8.0))
  )
  digest = frozen_format.weights_digest({'params': base['params']})
  tuned = adapted.last(4, lambda rng: (other_BT, is_answer_BT), base)
  assert frozen_format.weights_digest({'params': tuned['params']}) == digest
  losses = [
    adapted.seen(each, other_BT)[0][is_asked_BT].mean()
    for each in (base, tuned)
  ]
  assert losses[1] < losses[0] / 3
  with pytest.raises(ValueError, match='expected the weights beside them'):
    next(adapted.run(0, draw))


def test_a_recipe_is_refused_that_is_never_looked_at():
  with pytest.raises(ValueError, match='look_every: got 150, expected a div'):
    small_models.Trainer(recipe(look_every=150))


def test_results_are_kept_by_recipe_and_seed(tmp_path):
  setting = port.Setting(seeds=[0, 1], workdir=tmp_path, inputs={})
  calls = []

  def kept(seed, **changes):
    def measure():
      calls.append(seed)
      return {'loss': float(len(calls))}

    return small_models.kept(setting, recipe(**changes), 'run', seed, measure)

  assert [kept(0), kept(1), kept(0)] == [
    {'loss': 1.0}, {'loss': 2.0}, {'loss': 1.0},
  ]  # fmt: skip
  assert kept(0, num_steps=400) == {'loss': 3.0}
  assert calls == [0, 1, 0]


def test_a_row_is_one_document_whose_first_id_is_no_target():
  ids_BT = np.array([[5, 6, 7]])
  found = small_models.batch(ids_BT, np.array([[True, False, True]]))
  assert jax.tree.map(lambda x: x.tolist(), found) == {
    'tokens': [[5, 6]],
    'targets': [[6, 7]],
    'positions': [[0, 1]],
    'segment_ids': [[1, 1]],
    'weights': [[0.0, 1.0]],
  }
