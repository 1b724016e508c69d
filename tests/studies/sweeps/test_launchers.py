"""Arrays and indexed jobs share a sweep: each process takes its part."""

from concurrent import futures
import threading

import pytest

from studies.sweeps import claims as claims_lib, launchers, worker
from tests.helpers.training import tiny_experiment, untrained_sweeps

ARRAY = {'SLURM_ARRAY_TASK_COUNT': '4', 'SLURM_ARRAY_TASK_ID': '2'}
JOB = {'NUM_PROCESSES': '3', 'JOB_COMPLETION_INDEX': '0'}


@pytest.mark.parametrize(
  ('environ', 'num'),
  [
    ({}, 1),
    (ARRAY, 4),
    (JOB, 3),
    # A run of several processes without an index shares no sweep.
    ({'NUM_PROCESSES': '3'}, 1),
  ],
)
def test_the_environment_says_how_many_there_are(environ, num):
  assert launchers.num_processes(environ) == num


@pytest.mark.parametrize(
  ('environ', 'words'),
  [
    ({'JOB_COMPLETION_INDEX': '1'}, 'NUM_PROCESSES: got none with JOB_COMP'),
    (JOB | {'NUM_PROCESSES': 'x'}, "NUM_PROCESSES: got 'x', expected the n"),
    ({'SLURM_ARRAY_TASK_COUNT': '0'}, "SLURM_ARRAY_TASK_COUNT: got '0', expe"),
  ],
)
def test_a_wrong_environment_is_one_line(environ, words):
  with pytest.raises(ValueError, match=words):
    launchers.num_processes(environ)


def test_all_processes_of_an_array_begin_at_once(tmp_path):
  pytest.importorskip('optuna')
  search = worker.Search(
    sweep=untrained_sweeps.sweep(),
    experiment=tiny_experiment.make(),
    workdir=tmp_path,
  )
  start = threading.Barrier(4)

  def open_store(_):
    start.wait()
    return worker.open_store(search)

  with futures.ThreadPoolExecutor(4) as pool:
    assert len(list(pool.map(open_store, range(4)))) == 4


def test_processes_of_an_array_take_a_share_each(tmp_path, monkeypatch):
  pytest.importorskip('optuna')
  sweep = untrained_sweeps.sweep()
  search = worker.Search(
    sweep=sweep, experiment=tiny_experiment.make(), workdir=tmp_path
  )
  assert worker.most_at_once(search) == sweep.count()
  for name, value in ARRAY.items():
    monkeypatch.setenv(name, value)
  store = untrained_sweeps.store(tmp_path, sweep)
  taken = []
  for _ in range(4):
    claims = claims_lib.Claims(store, tmp_path)
    claims.begin('unfinished')
    taken.append(claims.take(worker.most_at_once(search)))
  assert [[c.point for c in each] for each in taken] == [
    [0, 1],
    [2, 3],
    [4, 5],
    [6, 7],
  ]
  for claim in sum(taken, []):
    claim.release()
