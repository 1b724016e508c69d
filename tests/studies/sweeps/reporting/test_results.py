"""The optimum, its interval, and the files of results."""

import csv
import json
import math
import re
from xml.etree import ElementTree

import numpy as np
import pytest

from studies.sweeps import claims as claims_lib, store as store_lib
from studies.sweeps.reporting import report, results as results_lib
from tests.helpers.training import tiny_experiment, untrained_sweeps
from training import sweep as sweep_lib

RATE = {'optimizer.peak_lr': sweep_lib.LogUniform(2**-9, 2**-3, points=7)}
ONE = sweep_lib.Sweep(name='a', parameters=RATE)


def _row(point, rate, losses, state='complete', note=''):
  value = float(np.mean(losses)) if losses else None
  return store_lib.Row(
    point=point,
    number=point,
    state=state,
    params={'optimizer.peak_lr': rate},
    value=value,
    seeds={str(i): float(loss) for i, loss in enumerate(losses)},
    intermediate={},
    note=note,
    trial_id=point + 1,
  )


def _results(rows, best=None):
  return results_lib.Results(
    sweep=ONE,
    rows=tuple(rows),
    best=best,
    optimum=None,
    why_no_optimum='',
    importance={},
  )


def _parabola(best=-5.7, noise=0.0, sign=1):
  """Returns rows of a grid whose seeds have the optimum nearby."""
  rng = np.random.default_rng(0)
  shifts = rng.normal(0, noise, 3)
  return [
    _row(i, 2.0**log, [sign * ((log - best - s) ** 2 + 1 + s) for s in shifts])
    for i, log in enumerate(range(-9, -2))
  ]


def test_a_parabola_gives_its_vertex_back():
  found, why_not = results_lib.optimum(ONE, _parabola())
  assert not why_not
  assert math.log2(found.best) == pytest.approx(-5.7)
  assert found.value == pytest.approx(1.0)
  assert found.low == pytest.approx(found.best)


def test_a_maximum_is_found_alike():
  sweep = sweep_lib.Sweep(name='a', parameters=RATE, direction='maximize')
  found, _ = results_lib.optimum(sweep, _parabola(sign=-1))
  assert math.log2(found.best) == pytest.approx(-5.7)
  assert found.value == pytest.approx(-1.0)


def test_the_interval_is_that_of_the_seeds():
  found, _ = results_lib.optimum(ONE, _parabola(noise=0.2))
  vertices = -5.7 + np.random.default_rng(0).normal(0, 0.2, 3)
  low, high = math.log2(found.low), math.log2(found.high)
  # Of a parabola, the vertex of mean losses is the mean of the vertices, and
  # means of resampled seeds lie between the least and the largest seed.
  assert math.log2(found.best) == pytest.approx(vertices.mean())
  assert vertices.min() - 1e-9 <= low < vertices.mean() < high
  assert high <= vertices.max() + 1e-9


@pytest.mark.parametrize(
  ('rows', 'words'),
  [
    (_parabola(best=-12), 'at an edge of the range'),
    (_parabola()[:2], 'fewer than three'),
  ],
)
def test_no_optimum_is_made_up(rows, words):
  found, why_not = results_lib.optimum(ONE, rows)
  assert found is None
  assert words in why_not


def test_diverged_points_count_in_no_parabola():
  rows = _parabola()
  rows[-1] = _row(6, 2.0**-3, [math.inf], note='diverged before step 3')
  found, _ = results_lib.optimum(ONE, rows)
  assert math.log2(found.best) == pytest.approx(-5.7)


def test_a_mean_has_students_interval():
  # t(0.975, 2 degrees of freedom) = 4.302653; s = 0.1.
  half = results_lib.half_width([1.0, 1.1, 1.2])
  assert half == pytest.approx(4.302653 * 0.1 / math.sqrt(3), rel=1e-6)
  assert results_lib.half_width([1.0]) is None


@pytest.mark.slow
def test_files_have_every_trial(tmp_path):
  pytest.importorskip('optuna')
  sweep = untrained_sweeps.sweep(num_trials=6)
  store = untrained_sweeps.store(tmp_path, sweep)
  claims = claims_lib.Claims(store, tmp_path)
  claims.begin('unfinished')
  taken = claims.take(6)
  for claim in taken[:4]:
    loss = abs(math.log(claim.params['optimizer.peak_lr'] / 1e-3))
    store.finish(
      claim.trial, state='complete', value=loss, seeds={0: loss, 1: loss}
    )
  store.finish(
    taken[4].trial, state='complete', value=math.inf, note='diverged before 4'
  )
  store.finish(taken[5].trial, state='errored', note='data.x: got 1, expected')
  found = results_lib.gather(store)
  assert found.best.value == min(row.value for row in found.rows[:4])
  assert found.importance.keys() == sweep.parameters.keys()
  assert sum(found.importance.values()) == pytest.approx(1)
  lines = results_lib.summary(found)
  assert 'errored    1 trials; --resume=errored runs them again' in lines
  results_lib.save(found, tiny_experiment.make(), tmp_path, ['--config=a'])
  assert (tmp_path / 'best.flags').read_text() == '--config=a\n'
  with (tmp_path / 'results.csv').open() as file:
    lines = list(csv.DictReader(file))
  assert [line['state'] for line in lines] == [*['complete'] * 5, 'errored']
  assert float(lines[0]['loss_seed1']) == found.rows[0].value
  described = json.loads((tmp_path / 'results.json').read_text())
  assert described['best'] == found.best.point
  assert described['trials'][4]['value'] == 'diverged'
  assert described['config']['num_steps'] == 10
  order = [row.point for row in results_lib.ranked(found)]
  assert order[0] == found.best.point
  assert order[-2:] == [4, 5]
  _check_page(found, tmp_path)


def _check_page(found, directory):
  """Checks the page of the same sweep, and its figures."""
  report.save(found, tiny_experiment.make(), directory, 'a <storage>', ['--x'])
  text = (directory / 'report.html').read_text()
  for words in (
    'Sweep a', 'loss by optimizer.peak_lr', 'Parallel coordinates',
    'PED-ANOVA', 'train.py --x --workdir', 'a &lt;storage&gt;', 'diverged',
  ):  # fmt: skip
    assert words in text, words
  own = text.replace('http://www.w3.org/2000/svg', '')
  assert not re.search(r'https?:|<script|<link|src=|@import|url\(', own)
  names = {path.name for path in (directory / 'figures').iterdir()}
  fields = [name.replace('.', '_') for name in found.sweep.parameters]
  assert names == {
    'parallel.svg', 'importance.svg', *(f'by_{name}.svg' for name in fields)
  }  # fmt: skip
  for name in names:
    root = ElementTree.parse(directory / 'figures' / name).getroot()
    assert root.attrib['viewBox']
  circles = (directory / 'figures' / f'by_{fields[0]}.svg').read_text()
  assert circles.count('<circle') == 4  # the trials with a finite value


def test_the_best_point_is_given_as_flags():
  rows = [_row(0, 0.1, [2.0]), _row(1, 0.3, [1.0])]
  found = _results(rows, best=rows[1])
  rate = '--config.optimizer.peak_lr'
  given = ['--config=a.py', '--config.num_steps=3', f'{rate}=9']
  assert results_lib.rerun_flags(found, given) == [
    '--config=a.py', '--config.num_steps=3', f'{rate}=0.3'
  ]  # fmt: skip
  assert not results_lib.rerun_flags(_results([]), given)


@pytest.mark.parametrize(
  ('rows', 'words'),
  [
    (
      [_row(0, 0.1, [math.inf], note='diverged before step 3: seed 0 of 1')],
      '1 diverged trials and none with a finite loss, expected one; lower',
    ),
    (
      [_row(0, 0.1, [], state='errored', note='data.path: got -')],
      'got 1 errored trials and none that is complete, expected one; the first'
      ' says: data.path: got -',
    ),
  ],
)
def test_a_sweep_without_any_result_says_why(rows, words):
  found = _results(rows)
  assert words in results_lib.summary(found)[0]
