"""Tables and comparisons of results, and their errors."""

import dataclasses
import math
import subprocess
import sys

import numpy as np
import pytest

from evals.results import report, scores, statistics
from tests.helpers import tiny_models


def _result(name, values, **fields):
  group = scores.Group(
    **{
      'name': 'choice',
      'scores': (scores.of_values('acc', values, higher_is_better=True),),
      'num_examples': len(values),
      'example_ids': tuple(map(str, range(len(values)))),
      **fields,
    }
  )
  return scores.Result(
    task='choice:a.jsonl', groups=(group,), model={'name': name}
  )


def _shares(seed=0, num=400):
  rng = np.random.default_rng(seed)
  a = (rng.uniform(size=num) < 0.5).astype(float)
  # B answers right where A was wrong in some examples; the reverse is rare.
  b = (rng.uniform(size=num) < np.where(a == 1, 0.97, 0.2)).astype(float)
  return a.tolist(), b.tolist()


def test_every_score_comes_with_its_error_and_what_it_takes():
  result = _result('tiny', [0.0, 1.0] * 200)
  text = report.text(result)
  error = 0.5 * math.sqrt(400 / 399) / 20
  row = next(line for line in text.splitlines() if '| acc' in line)
  cells = [cell.strip() for cell in row.split('|')[1:-1]]
  assert cells[:5] == ['choice', 'acc', '0.5', f'{error:.4g}', '400']
  of_two = math.sqrt(2) * error
  assert cells[5] == f'{statistics.smallest_seen(of_two):.4g}'
  needed = statistics.num_to_resolve(0.01, of_two, 400)
  assert cells[6] == f'{needed:,.0f} for 0.01'
  assert 'name tiny' in text
  assert ' for 0.05' in report.text(result, 0.05)


def test_one_example_leaves_the_error_unknown():
  text = report.text(_result('tiny', [1.0]))
  assert 'unknown' in text
  assert 'an unknown number for 0.01' in text


def test_notes_are_told():
  text = report.text(_result('tiny', [1.0, 0.0], notes=('3 were cut',)))
  assert 'note: choice: 3 were cut' in text


def test_a_comparison_of_the_same_examples_is_paired():
  a, b = _shares()
  text = report.compare(_result('old', a), _result('new', b))
  found = statistics.mcnemar(a, b)
  assert found.test in text
  assert f'B - A = {found.value:+.4g}' in text
  assert 'paired bootstrap' in text
  assert 'B is better' in text
  paired = statistics.num_to_resolve(found.value, found.standard_error, 400)
  assert f'{paired:,.0f} that both answer' in text
  # Pairs need fewer examples: the common part of both answers cancels.
  apart = statistics.num_to_resolve(
    found.value,
    math.hypot(statistics.standard_error(a), statistics.standard_error(b)),
    400,
  )
  assert f'or {apart:,.0f} different examples each (here 400)' in text
  assert paired < apart / 3


def test_the_direction_of_better_is_the_score_s():
  better = scores.of_values('nll', [1.0, 1.1, 1.2, 1.0], higher_is_better=False)
  worse = scores.of_values('nll', [2.0, 2.2, 2.1, 2.1], higher_is_better=False)
  group = scores.Group(
    name='g', scores=(better,), num_examples=4, example_ids=tuple('abcd')
  )
  first = scores.Result(task='choice:a', groups=(group,))
  second = scores.Result(
    task='choice:a', groups=(dataclasses.replace(group, scores=(worse,)),)
  )
  assert 'B is worse' in report.compare(first, second)
  assert 'B is better' in report.compare(second, first)
  same = report.compare(first, first)
  assert 'not resolved' in same
  assert 'the difference seen' not in same
  assert 'the difference stated, 0.01075: an unknown number that both' in same


@pytest.mark.parametrize('ids', [('a', 'b'), ('c', 'd')])
def test_two_examples_that_differ_alike_give_no_verdict(ids):
  for values in ([1.0, 1.0], [0.6, 0.7]):
    a = _result('', [value - 0.5 for value in values], example_ids=('a', 'b'))
    b = _result('', values, example_ids=ids)
    for text in (report.compare(a, b), report.compare(b, a)):
      assert 'not resolved' in text
      assert 'B is' not in text
      assert 'nan' not in text
      assert 'p = 0.0000' not in text


def test_other_examples_are_compared_unpaired_and_said_to_be():
  a, b = _shares()
  other = _result('new', b, example_ids=tuple(f'x{i}' for i in range(len(b))))
  text = report.compare(_result('old', a), other)
  assert 'unpaired z' in text
  assert 'the examples differ, so the tests are not paired' in text
  assert 'that both answer' not in text


def test_clusters_are_used():
  a, b = _shares()
  clusters = tuple(f'c{i // 4}' for i in range(len(a)))
  results = [_result('', v, clusters=clusters) for v in (a, b)]
  text = report.compare(*results)
  assert 'paired t over clusters, 99 degrees of freedom' in text


def test_perplexities_are_compared_by_their_logarithm():
  def result(values, num_tokens):
    return scores.Result(
      task='perplexity:a.txt',
      groups=(
        scores.Group(
          name='perplexity',
          scores=(
            scores.of_values(
              'perplexity',
              values,
              higher_is_better=False,
              per='token',
              is_exponential=True,
            ),
          ),
          num_examples=len(values),
          example_ids=tuple(map(str, range(len(values)))),
          details={'num_tokens': num_tokens},
        ),
      ),
    )

  a, b = [2.0, 2.5, 2.2, 2.4], [1.9, 2.4, 2.2, 2.2]
  text = report.compare(result(a, 100), result(b, 100))
  assert f'log B - log A = {np.mean(b) - np.mean(a):+.4g}' in text
  # With other tokens, nats per token measure another thing.
  text = report.compare(result(a, 100), result(b, 90))
  assert 'not comparable: 100 tokens against 90' in text
  assert 'log B' not in text


def test_what_was_measured_otherwise_is_said():
  a = dataclasses.replace(_result('', [0.0, 1.0]), options={'stride': 1})
  b = dataclasses.replace(a, options={'stride': 2}, files={'a.jsonl': 'other'})
  text = report.compare(a, b)
  assert 'stride is 1 in A and 2 in B' in text
  assert 'the files differ' in text


def test_results_of_different_tasks_are_refused():
  a = _result('', [0.0, 1.0])
  with pytest.raises(ValueError, match='expected two results of one task'):
    report.compare(a, dataclasses.replace(a, task='perplexity:a.txt'))


def test_the_command_compares_files(tmp_path):
  a, b = _shares()
  _result('old', a).save(tmp_path / 'a.json')
  _result('new', b).save(tmp_path / 'b.json')

  def run(*args):
    return subprocess.run(
      [sys.executable, '-m', 'evals.compare', *args],
      capture_output=True,
      text=True,
      check=False,
      env=tiny_models.subprocess_env(),
    )

  done = run(
    str(tmp_path / 'a.json'), str(tmp_path / 'b.json'), '--difference=0.02'
  )
  assert done.returncode == 0, done.stderr
  assert 'B is better' in done.stdout
  assert 'the difference stated, 0.02' in done.stdout
  done = run(str(tmp_path / 'a.json'), str(tmp_path / 'none.json'))
  assert done.returncode == 2
  assert done.stderr.startswith('error: ')
