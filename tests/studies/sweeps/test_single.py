"""Trials one by one: a stop at each evaluation changes no number."""

import pytest

from tests.helpers.training import tiny_run, tiny_sweep
from training import sweep as sweep_lib
from training.reporting import metrics

pytest.importorskip('optuna')
ONE = {
  'name': 'a',
  'parameters': {'optimizer.peak_lr': sweep_lib.Choice((1e-2,))},
  'num_seeds': 2,
}


@pytest.mark.slow
def test_stops_for_a_pruner_change_no_bit(tmp_path):
  experiment = tiny_run.experiment(
    tiny_run.write_corpus(tmp_path), num_steps=6, eval_every_steps=3
  )
  found = {}
  for pruner in ('none', 'median'):
    sweep = sweep_lib.Sweep(**ONE, pruner=pruner)
    place = tmp_path / pruner
    store, _ = tiny_sweep.run(experiment, sweep, place, together=False)
    (row,) = store.rows()
    assert row.state == 'complete'
    assert row.intermediate.keys() == {1, 2}
    found[pruner] = row.value, row.seeds, row.intermediate
    for seed in (0, 1):
      records = metrics.read(place / f'trials/0000/seed{seed}')
      found[pruner, seed] = [
        r for r in records if r['kind'] in ('train', 'eval')
      ]
  assert found['none'] == found['median']
  for seed in (0, 1):
    assert found['none', seed] == found['median', seed]
    assert [r['step'] for r in found['none', seed]] == [1, 2, 3, 3, 4, 5, 6, 6]
