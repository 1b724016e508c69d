"""Whole runs on real text: resuming, refusing, stopping, freezing."""

import os
import pathlib
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

from frozen import format as frozen_format, seals
from storage import code_commit, disk, file_names
from tests.helpers import tiny_models
from tests.helpers.training import saved_state, tiny_run
from training import (
  assemble,
  experiment as experiment_lib,
  learner as learner_lib,
  run as run_lib,
)
from training.checkpoints import saver
from training.reporting import metrics, reporter as reporter_lib

ROOT = pathlib.Path(__file__).parents[3]


_experiment, _run = tiny_run.experiment, tiny_run.run


def _deterministic_records(workdir):
  return [r for r in metrics.read(workdir) if r['kind'] in ('train', 'eval')]


@pytest.fixture(scope='module')
def uninterrupted(corpus, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('uninterrupted')
  result, printed = _run(_experiment(corpus), workdir)
  return workdir, result, printed


@pytest.mark.slow
def test_a_run_reports_evaluates_and_freezes(uninterrupted):
  workdir, result, printed = uninterrupted
  assert result == run_lib.Result(step=12, exit_code=0)
  steps = [r['step'] for r in metrics.read(workdir) if r['kind'] == 'train']
  assert steps == list(range(1, 13))
  evals = [r for r in metrics.read(workdir) if r['kind'] == 'eval']
  assert [r['step'] for r in evals] == [6, 12]
  assert evals[1]['loss'] < evals[0]['loss']
  assert 'text_files' in printed
  assert 'bits/byte at step 12' in printed
  assert list((workdir / 'tensorboard').iterdir())
  frozen = frozen_format.read(workdir / 'frozen')
  assert frozen.manifest.step == 12
  assert frozen.manifest.knowledge_cutoff == '2024-05'
  # Every row is filled, but for the last of an epoch: there is one at most.
  padded = 12 * 8 * 16 - frozen.manifest.tokens_seen
  assert 0 <= padded < 16
  assert frozen.manifest.weights_digest in printed
  assert frozen.manifest.has_bos


@pytest.mark.slow
def test_padding_counts_in_positions_and_in_nothing_else(corpus, tmp_path):
  """Of rows that one document each leaves half empty."""
  experiment = _experiment(
    corpus,
    model=tiny_models.llama_like(vocab_size=264, num_layers=1, max_length=256),
    data={'packing': 'none', 'row_length': 256},
    num_steps=4,
    log_every_steps=2,
  )
  _, printed = _run(experiment, tmp_path)
  records = metrics.read(tmp_path)
  tokens = {r['step']: r['tokens'] for r in records if r['kind'] == 'train'}
  num_positions = 8 * 256
  assert all(count < num_positions for count in tokens.values())
  speeds = [r for r in records if r['kind'] == 'speed']
  assert [r['step'] for r in speeds] == [2, 4]
  for speed, steps in zip(speeds, ((2,), (3, 4)), strict=True):
    share = sum(tokens[step] for step in steps) / (num_positions * len(steps))
    for trained, padded in (
      ('tokens_per_s', 'positions_per_s'),
      ('mfu', 'positions_mfu'),
    ):
      assert speed[trained] / speed[padded] == pytest.approx(share)
    in_report = speed['tokens_per_s'] * speed['seconds_per_step'] * len(steps)
    assert in_report == pytest.approx(sum(tokens[step] for step in steps))
  _, progress = saved_state.arrays_and_progress(tmp_path, 4)
  assert progress['tokens_seen'] == sum(tokens.values())
  assert f' in {4 * num_positions:,} positions, ' in printed
  assert 'with padding' in printed


@pytest.mark.slow
def test_a_complete_run_is_left_alone(corpus, uninterrupted, monkeypatch):
  workdir, _, _ = uninterrupted
  recorded = (workdir / 'run.json').read_bytes()
  # Newer code that finds nothing to do did not train these weights.
  monkeypatch.setattr(code_commit, 'find', lambda: 'newer')
  before = (workdir / file_names.METRICS).read_bytes()
  result, printed = _run(_experiment(corpus), workdir)
  assert result.step == 12
  assert 'is complete: step 12' in printed
  assert (workdir / file_names.METRICS).read_bytes() == before
  assert (workdir / 'run.json').read_bytes() == recorded


def _assert_same_run(workdir, other):
  arrays, progress = saved_state.arrays_and_progress(workdir, 12)
  other_arrays, other_progress = saved_state.arrays_and_progress(other, 12)
  assert arrays.keys() == other_arrays.keys()
  for name, array in arrays.items():
    np.testing.assert_array_equal(other_arrays[name], array, err_msg=name)
  for timing in ('train_seconds',):
    progress.pop(timing)
    other_progress.pop(timing)
  assert other_progress == progress
  assert _deterministic_records(other) == _deterministic_records(workdir)


@pytest.mark.slow
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
  corpus, uninterrupted, tmp_path
):
  """Killed after step 10: goes on from the checkpoint of step 8."""

  class Killed(Exception):
    pass

  def die_at_step_10(reporter, step, step_metrics):
    real_add(reporter, step, step_metrics)
    if step == 10:
      reporter.flush()  # records of steps 9 and 10 are on disk
      raise Killed

  real_add = reporter_lib.Reporter.add
  reporter_lib.Reporter.add = die_at_step_10
  try:
    with pytest.raises(Killed):
      _run(_experiment(corpus), tmp_path)
  finally:
    reporter_lib.Reporter.add = real_add
  # What a kill in the middle of a line leaves behind.
  with (tmp_path / file_names.METRICS).open('a') as file:
    file.write('{"kind": "train", "st')
  result, printed = _run(_experiment(corpus), tmp_path)
  assert result.step == 12
  assert 'resumed    after step 8' in printed
  _assert_same_run(uninterrupted[0], tmp_path)


@pytest.mark.slow
def test_kill_9_and_resume_in_fresh_processes(corpus, tmp_path):
  """The same through the command line, killed for real."""
  command = [
    sys.executable, 'train.py',
    '--config=experiments/pretrain_files.py:text',
    f'--config.data.path={corpus}', f'--config.data.data_dir={tmp_path}',
    '--config.num_steps=200', '--config.checkpoint.every_steps=40',
    '--config.eval_every_steps=0', '--config.log_every_steps=5',
    '--config.data.row_length=32', '--config.model.max_length=32',
    '--config.model.num_layers=1', '--config.data.batch_size=4',
    '--config.optimizer.warmup_steps=5',
    '--config.data.tokenizer.kind=byte',
  ]  # fmt: skip
  env = tiny_models.subprocess_env()

  def start(workdir):
    return subprocess.Popen(
      [*command, f'--workdir={workdir}'],
      cwd=ROOT,
      env=env,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )

  whole = start(tmp_path / 'whole')
  output, _ = whole.communicate(timeout=300)
  assert whole.returncode == 0, output

  killed = start(tmp_path / 'killed')
  assert killed.stdout is not None
  with killed.stdout as lines:
    for line in lines:
      if line.startswith('step 120/'):
        os.kill(killed.pid, signal.SIGKILL)
        break
    assert killed.wait(timeout=60) == -signal.SIGKILL
  resumed = start(tmp_path / 'killed')
  output, _ = resumed.communicate(timeout=300)
  assert resumed.returncode == 0, output
  assert 'resumed' in output
  for item in ('whole', 'killed'):
    assert (tmp_path / item / 'frozen' / 'manifest.json').exists()
  a, progress_a = saved_state.arrays_and_progress(tmp_path / 'whole', 200)
  b, progress_b = saved_state.arrays_and_progress(tmp_path / 'killed', 200)
  for name, array in a.items():
    np.testing.assert_array_equal(b[name], array, err_msg=name)
  # The position of the data: the next batch.
  assert progress_a['data_state'] == progress_b['data_state']
  assert progress_a['key_data'] == progress_b['key_data']
  assert _deterministic_records(tmp_path / 'whole') == (
    _deterministic_records(tmp_path / 'killed')
  )


@pytest.mark.slow
def test_sigterm_saves_and_leaves(corpus, tmp_path, uninterrupted):
  experiment = _experiment(corpus)
  real_add = reporter_lib.Reporter.add

  def terminate_at_step_5(reporter, step, step_metrics):
    real_add(reporter, step, step_metrics)
    if step == 5:
      os.kill(os.getpid(), signal.SIGTERM)

  reporter_lib.Reporter.add = terminate_at_step_5
  try:
    result, printed = _run(experiment, tmp_path)
  finally:
    reporter_lib.Reporter.add = real_add
  assert result == run_lib.Result(step=5, exit_code=128 + signal.SIGTERM)
  assert 'stopped by SIGTERM after step 5; saved' in printed
  assert not (tmp_path / 'frozen').exists()
  assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
  result, _ = _run(experiment, tmp_path)
  assert result == run_lib.Result(step=12, exit_code=0)
  _assert_same_run(uninterrupted[0], tmp_path)


@pytest.mark.slow
def test_a_non_finite_loss_stops_and_names_the_last_good_checkpoint(
  corpus, tmp_path
):
  experiment = _experiment(corpus)
  real_add = reporter_lib.Reporter.add

  def poison_step_6(reporter, step, step_metrics):
    if step == 6:
      step_metrics = {**step_metrics, 'loss': float('nan')}
    real_add(reporter, step, step_metrics)

  reporter_lib.Reporter.add = poison_step_6
  try:
    with pytest.raises(
      reporter_lib.NonFiniteError,
      match='step 6: got loss = nan, .*last good checkpoint: step 4',
    ):
      _run(experiment, tmp_path)
  finally:
    reporter_lib.Reporter.add = real_add
  steps = {int(p.name) for p in (tmp_path / 'checkpoints').glob('[0-9]*')}
  assert steps == {4}


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'name': 'other'}, "got experiment = 'other', expected 'tiny'"),
    (
      {'model': tiny_models.llama_like(vocab_size=264, num_layers=2)},
      'got model.num_layers = 2, expected 1',
    ),
    ({'seed': 1}, 'got seed = 1, expected 0'),
  ],
)
def test_a_workdir_of_another_experiment_is_refused(
  corpus, uninterrupted, change, message
):
  workdir, _, _ = uninterrupted
  before = {p: p.stat().st_mtime_ns for p in workdir.rglob('*')}
  with pytest.raises(ValueError, match=message):
    _run(_experiment(corpus, **change), workdir)
  assert {p: p.stat().st_mtime_ns for p in workdir.rglob('*')} == before


@pytest.mark.slow
def test_a_run_that_failed_to_start_can_be_corrected(corpus, tmp_path):
  small = tiny_models.llama_like(vocab_size=200, num_layers=1)
  with pytest.raises(ValueError, match=r'model.vocab_size: got 200'):
    _run(_experiment(corpus, model=small), tmp_path / 'run')
  result, _ = _run(_experiment(corpus, num_steps=2), tmp_path / 'run')
  assert result.step == 2


@pytest.mark.slow
def test_a_run_that_was_killed_before_run_json_can_be_started(corpus, tmp_path):
  workdir = tmp_path / 'run'
  (workdir / 'checkpoints').mkdir(parents=True)
  (workdir / '.shared-0a1b2c3d').touch()
  (workdir / '.run.json.partial-0a1b2c3d').write_text('{"experi')
  result, _ = _run(_experiment(corpus, num_steps=2), workdir)
  assert result.step == 2


def test_a_directory_with_other_files_is_not_taken_for_a_workdir(
  corpus, tmp_path
):
  (tmp_path / 'thesis.tex').write_text('precious')
  with pytest.raises(ValueError, match='a directory with other files in it'):
    _run(_experiment(corpus), tmp_path)
  assert [p.name for p in tmp_path.iterdir()] == ['thesis.tex']


@pytest.mark.parametrize(
  ('overrides', 'message'),
  [
    ({'num_steps': 0}, 'config.num_steps: got 0, expected at least 1'),
    ({'num_microbatches': 3}, 'num_microbatches: got 3, expected a divisor'),
    (
      {'checkpoint': experiment_lib.CheckpointConfig(grace_s=0)},
      'checkpoint.grace_s: got 0, expected more than 0 seconds',
    ),
    ({'compute_dtype': 'float16'}, "compute_dtype: got 'float16'"),
    ({'num_microbatches': 8}, 'micro-batches of 1, expected a multiple of'),
    (
      {'model': tiny_models.llama_like(vocab_size=200)},
      "model.vocab_size: got 200, expected at least the tokenizer's 259",
    ),
    (
      {'model': tiny_models.llama_like(vocab_size=264, max_length=8)},
      'data.row_length: got 16, expected at most model.max_length = 8',
    ),
  ],
)
def test_impossible_experiments_are_refused(
  corpus, tmp_path, overrides, message
):
  with pytest.raises(ValueError, match=message):
    _run(_experiment(corpus, **overrides), tmp_path / 'run')
  assert not (tmp_path / 'run' / 'checkpoints' / '1').exists()


def _terminate_in_batch(monkeypatch, number):
  """Sends SIGTERM while the so many-th batch is evaluated, once."""
  real, calls = learner_lib.Learner.compile_eval_step, []

  def compile_eval_step(learner):
    step = real(learner)

    def evaluate(*args):
      calls.append(1)
      if len(calls) == number:
        os.kill(os.getpid(), signal.SIGTERM)
      return step(*args)

    return evaluate

  monkeypatch.setattr(
    learner_lib.Learner, 'compile_eval_step', compile_eval_step
  )


@pytest.mark.slow
@pytest.mark.parametrize('step', [6, 12])
def test_an_evaluation_that_a_signal_cuts_short_is_made_up_for(
  corpus, tmp_path, uninterrupted, monkeypatch, step
):
  """At a step that no checkpoint is due at, and at the last one."""
  experiment = _experiment(corpus)
  num_batches = _num_eval_batches(experiment, uninterrupted[0])
  assert num_batches > 2
  _terminate_in_batch(monkeypatch, num_batches * (step // 6 - 1) + 2)
  result, printed = _run(experiment, tmp_path)
  assert result == run_lib.Result(step=step, exit_code=128 + signal.SIGTERM)
  assert f'stopped by SIGTERM after step {step}; saved within' in printed
  assert 'of 30 s in checkpoint.grace_s' in printed
  assert not [r for r in metrics.read(tmp_path) if r['kind'] == 'eval'][
    step // 6 - 1 :
  ]
  assert not (tmp_path / 'frozen').exists()
  result, _ = _run(experiment, tmp_path)
  assert result == run_lib.Result(step=12, exit_code=0)
  _assert_same_run(uninterrupted[0], tmp_path)
  digests = [
    frozen_format.read(workdir / 'frozen').manifest.weights_digest
    for workdir in (tmp_path, uninterrupted[0])
  ]
  assert digests[0] == digests[1]


@pytest.mark.slow
def test_the_first_weights_are_evaluated_if_asked_for(
  corpus, tmp_path, uninterrupted, monkeypatch
):
  """Once, also where a signal cut the first attempt short."""
  experiment = _experiment(corpus, eval_at_start=True)
  with monkeypatch.context() as patch:
    _terminate_in_batch(patch, 2)
    result, printed = _run(experiment, tmp_path)
  assert result == run_lib.Result(step=0, exit_code=128 + signal.SIGTERM)
  assert not [r for r in metrics.read(tmp_path) if r['kind'] == 'eval']
  result, printed = _run(experiment, tmp_path)
  assert result == run_lib.Result(step=12, exit_code=0)
  assert printed.index('step 0: validation loss') < printed.index('step 6:')
  first, *others = [r for r in metrics.read(tmp_path) if r['kind'] == 'eval']
  assert first['step'] == 0
  assert first['loss'] > others[-1]['loss']
  records = [r for r in _deterministic_records(tmp_path) if r['step']]
  assert records == _deterministic_records(uninterrupted[0])


def _num_eval_batches(experiment, workdir):
  parts = assemble.assemble(experiment, workdir, lambda text: None)
  parts.batches.close()
  return sum(1 for _ in parts.eval_batches)


def test_a_longer_run_is_not_complete_until_it_is_frozen_anew(
  corpus, uninterrupted, tmp_path
):
  """Killed between the last checkpoint and the freeze."""
  workdir = tmp_path / 'run'
  shutil.copytree(uninterrupted[0], workdir)
  result, _ = _run(
    _experiment(
      corpus, num_steps=14, freeze=experiment_lib.FreezeConfig(enabled=False)
    ),
    workdir,
  )
  assert result.step == 14
  (workdir / '.frozen.partial-0a1b2c3d').mkdir()
  _, printed = _run(_experiment(corpus, num_steps=14), workdir)
  assert 'is complete' not in printed
  assert frozen_format.read(workdir / 'frozen').manifest.step == 14
  assert not list(workdir.glob('.frozen.*'))


@pytest.mark.slow
def test_saves_that_fail_do_not_end_the_run_unless_the_last_does(
  corpus, uninterrupted, tmp_path, monkeypatch
):
  monkeypatch.setattr(saver, '_PAUSES_S', (0.0, 0.0))
  tried = []

  def no_space(directory, seal):
    tried.append(seal.step)
    if until is None or seal.step < until:
      raise OSError(28, 'No space left on device')
    write(directory, seal)

  write, until = seals.write, None
  monkeypatch.setattr(seals, 'write', no_space)
  with pytest.raises(
    disk.SaveError,
    match='step 12, the last one: got no checkpoint of it, .*from its start',
  ):
    _run(_experiment(corpus), tmp_path)
  assert tried == [4, 8, 12, 12, 12]
  assert not list((tmp_path / 'checkpoints').iterdir())
  tried, until = [], 8
  _, printed = _run(_experiment(corpus), tmp_path)
  assert tried == [4, 8, 12]
  assert (
    'step 4: the checkpoint was not saved: got OSError: [Errno 28] No space'
    ' left on device; it is tried again when the next one is due'
  ) in printed
  saves = [r for r in metrics.read(tmp_path) if r['kind'] == 'save']
  assert [(r['step'], r['saved']) for r in saves] == [(4, 0), (8, 1), (12, 1)]
  _assert_same_run(uninterrupted[0], tmp_path)


@pytest.mark.slow
def test_a_grace_that_is_too_short_is_told_of(corpus, tmp_path):
  config = experiment_lib.CheckpointConfig(every_steps=4, grace_s=1e-3)
  _, printed = _run(_experiment(corpus, checkpoint=config), tmp_path)
  assert printed.count('more than the 0.001 s of checkpoint.grace_s') == 1


def test_damaged_run_json_is_named_and_nothing_changed(
  corpus, uninterrupted, tmp_path
):
  workdir = tmp_path / 'run'
  shutil.copytree(uninterrupted[0], workdir)
  (workdir / 'run.json').write_text('{"experiment": "ti')
  before = {p: p.stat().st_mtime_ns for p in workdir.rglob('*')}
  with pytest.raises(
    ValueError, match='run.json: got a file that cannot be re'
  ):
    _run(_experiment(corpus), workdir)
  assert {p: p.stat().st_mtime_ns for p in workdir.rglob('*')} == before
