"""The values of a sweep: grids, and one line for each mistake."""

import pytest

from training import sweep as sweep_lib

RATE = {'optimizer.peak_lr': sweep_lib.LogUniform(1e-4, 1e-2, points=3)}


def _sweep(**fields):
  return sweep_lib.Sweep(**{'name': 'a', 'parameters': RATE, **fields})


def test_a_grid_has_all_combinations():
  sweep = _sweep(
    parameters={
      **RATE,
      'model.num_layers': sweep_lib.Integer(1, 5, 2),
      'optimizer.rule': sweep_lib.Choice(('adamw', 'lion')),
      'optimizer.weight_decay': sweep_lib.Uniform(0.0, 1.0, points=2),
    }
  )
  sweep.validate()
  assert sweep.count() == len(sweep.grid()) == 3 * 3 * 2 * 2
  assert sweep.grid()[0] == {
    'optimizer.peak_lr': 1e-4,
    'model.num_layers': 1,
    'optimizer.rule': 'adamw',
    'optimizer.weight_decay': 0.0,
  }
  rates = sorted({point['optimizer.peak_lr'] for point in sweep.grid()})
  assert rates == pytest.approx([1e-4, 1e-3, 1e-2])
  assert (rates[0], rates[-1]) == (1e-4, 1e-2)
  assert {point['model.num_layers'] for point in sweep.grid()} == {1, 3, 5}


def _parameter(space):
  return {'parameters': {'optimizer.peak_lr': space}}


@pytest.mark.parametrize(
  ('fields', 'words'),
  [
    ({'strategy': 'bayes'}, "strategy: got 'bayes', expected one of grid"),
    ({'strategy': 'gird'}, 'did you mean grid'),
    ({'pruner': 'ahsa'}, 'did you mean asha'),
    ({'direction': 'down'}, 'direction: got'),
    ({'num_seeds': 0}, 'num_seeds: got 0, expected at least 1'),
    ({'strategy': 'tpe'}, 'num_trials: got 0, expected at least 1'),
    ({'num_trials': 5}, 'num_trials: got 5 with strategy grid, expected 0 or'),
    ({'parameters': {}}, 'got name = .a. and 0 parameters'),
    (_parameter(3), 'got 3, expected Choice, Uniform'),
    (
      _parameter(sweep_lib.Choice(())),
      'got an empty Choice, expected',
    ),
    (_parameter(sweep_lib.Choice((1, 1))), 'expected each value once'),
    (_parameter(sweep_lib.Choice(((1, 2),))), 'expected numbers, booleans'),
    (
      _parameter(sweep_lib.Uniform(0, 1)),
      'got a grid without points',
    ),
    (_parameter(sweep_lib.Uniform(2, 1)), 'low below high'),
    (_parameter(sweep_lib.Uniform(0, float('inf'))), 'two finite numbers'),
    (_parameter(sweep_lib.LogUniform(0, 1)), 'got low = 0, expected more than'),
    (_parameter(sweep_lib.Integer(1, 4, 2)), 'a multiple of step = 2'),
    (_parameter(sweep_lib.Integer(1.0, 4)), 'got 1.0, expected integers'),
    (
      {'parameters': {'seed': sweep_lib.Integer(0, 3)}},
      'num_seeds: got 3 with seed among the parameters',
    ),
  ],
)
def test_a_mistake_is_one_line(fields, words):
  with pytest.raises(ValueError, match=words) as error:
    _sweep(**fields).validate()
  assert '\n' not in str(error.value)
