"""Several real processes train one model: the same numbers, whatever happens.

Each process of `train.py` has 4 fake devices, two of them make 8. Uninterrupted
runs of 1 x 8 are what everything is compared with.
"""

import contextlib
import json
import os
import pathlib
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from frozen import manifest, seals
from tests.helpers import commands, tiny_models
from training.lifecycle import exit_codes
from training.reporting import goodput, metrics

ROOT = pathlib.Path(__file__).parents[3]
# The quickstart's model and data, made small: every start of a process costs
# seconds, and every step should not.
SMALL = {
  'num_steps': 12,
  'log_every_steps': 1,
  'eval_batches': 2,
  'checkpoint.every_steps': 4,
  'optimizer.rule': 'adamw',
  'optimizer.peak_lr': 4e-3,
  'optimizer.warmup_steps': 6,
  'data.row_length': 32,
  'data.tokenizer.train_bytes': 200_000,
  'model.num_layers': 2,
  'model.max_length': 32,
  'model.mlp_width': 64,
}
# Of one run; it takes 10 to 20 s on two idle cores. When it is over, all
# processes are killed: no test waits for a line that never comes.
TIMEOUT_S = 480
# In one process the fake devices are added up in order, between processes by
# gloo, in rings. Twelve steps of Adam were seen to make of that 2e-6 of a loss
# or of a gradient norm; other layouts add up in yet other orders.
OTHER_ORDER = 2e-5


def _command(workdir, **overrides):
  return [
    sys.executable,
    'train.py',
    '--config=experiments/quickstart.py',
    f'--workdir={workdir}',
    # A busy machine can stop a process for longer than the death of another
    # takes to be noticed.
    '--heartbeat_timeout_s=30',
    *(f'--config.{k}={v}' for k, v in (SMALL | overrides).items()),
  ]


def _free_port():
  with socket.socket() as listener:
    listener.bind(('127.0.0.1', 0))
    return listener.getsockname()[1]


@contextlib.contextmanager
def _started(
  workdir, *, num_processes, num_devices=8, more_flags=None, **overrides
):
  """Starts all processes of a run; none outlives the block.

  `workdir` is one for all, or a list with one for each; `more_flags` is a list
  of flags for each.
  """
  port = _free_port()
  env = tiny_models.subprocess_env(num_devices=num_devices // num_processes)
  workdirs = workdir if isinstance(workdir, list) else [workdir] * num_processes
  running = []
  too_late = threading.Timer(TIMEOUT_S, _kill, [running])
  try:
    too_late.start()
    for i in range(num_processes):
      running.append(
        subprocess.Popen(
          [
            *_command(workdirs[i], **overrides),
            f'--coordinator=127.0.0.1:{port}',
            f'--num_processes={num_processes}',
            f'--process_id={i}',
            *(more_flags[i] if more_flags else ()),
          ],
          cwd=ROOT,
          env=env,
          stdout=subprocess.PIPE,
          stderr=subprocess.STDOUT,
          text=True,
        )
      )
    yield running
  finally:
    too_late.cancel()
    _kill(running)
    for process in running:
      process.communicate(timeout=60)


def _kill(running):
  for process in running:
    process.kill()


def _finished(running):
  """Waits; returns exit codes and what each process printed."""
  outputs = [process.communicate()[0] for process in running]
  return [process.returncode for process in running], outputs


def _run(workdir, **options):
  """Runs to the end, which has to be a good one; returns what was printed."""
  with _started(workdir, **options) as running:
    codes, outputs = _finished(running)
  assert codes == [0] * len(codes), '\n'.join(outputs)
  return outputs


def _wait_for_line(process, start):
  """Reads what a process prints until a line starts so."""
  seen = []
  for line in process.stdout:
    seen.append(line)
    if line.startswith(start):
      return
  raise AssertionError(f'ended before {start!r}: {"".join(seen)}')


def _run_and_kill(workdir, **options):
  """Kills all processes after step 6, when step 4 is safely on disk."""
  with _started(workdir, **options) as running:
    _wait_for_line(running[0], 'step 6/')
    saved = workdir / 'checkpoints' / '4'
    deadline = time.monotonic() + TIMEOUT_S
    while not saved.exists() and time.monotonic() < deadline:
      time.sleep(0.05)
    assert saved.exists()
    for process in running:
      process.kill()
    assert [p.wait(timeout=60) for p in running] == (
      [-signal.SIGKILL] * len(running)
    )
  assert not (workdir / 'frozen').exists()


def _records(workdir):
  return [r for r in metrics.read(workdir) if r['kind'] in ('train', 'eval')]


def _data_state(workdir, step=12):
  path = workdir / 'checkpoints' / str(step) / 'progress.json'
  return json.loads(path.read_text())['data_state']


def _assert_close(records, expected):
  assert [(r['kind'], r['step']) for r in records] == (
    [(r['kind'], r['step']) for r in expected]
  )
  for got, wanted in zip(records, expected, strict=True):
    for name in ('loss', 'grad_norm'):
      if name in wanted:
        np.testing.assert_allclose(
          got[name], wanted[name], rtol=OTHER_ORDER, err_msg=str(wanted)
        )


@pytest.fixture(scope='module')
def one_process(tmp_path_factory):
  """1 x 8, uninterrupted; told that it is process 0 of 1, it adds by gloo."""
  workdir = tmp_path_factory.mktemp('one')
  _run(workdir, num_processes=1)
  return workdir


@pytest.mark.slow
@pytest.mark.parametrize(('before', 'after'), [(2, 1), (1, 2)])
def test_killed_and_resumed_by_another_number_of_processes(
  before, after, one_process, tmp_path
):
  """Judged: 2 x 4, kill -9, 1 x 8, and the other way round; to the bit."""
  _run_and_kill(tmp_path, num_processes=before)
  outputs = _run(tmp_path, num_processes=after)
  assert re.search(r'^resumed    after step [4-8]$', outputs[0], re.MULTILINE)
  assert _records(tmp_path) == _records(one_process)
  assert _data_state(tmp_path) == _data_state(one_process)
  # The weights, digested: all of the state that matters went across.
  digests = [
    manifest.read(workdir / 'frozen').weights_digest
    for workdir in (tmp_path, one_process)
  ]
  assert digests[0] == digests[1]


@pytest.mark.slow
def test_one_process_that_nobody_told_gives_the_same_losses(
  one_process, tmp_path
):
  """Plain `python train.py`: devices are added up in another order."""
  result = subprocess.run(
    _command(tmp_path),
    cwd=ROOT,
    env=tiny_models.subprocess_env(num_devices=8),
    capture_output=True,
    text=True,
    timeout=TIMEOUT_S,
  )
  assert result.returncode == 0, result.stdout + result.stderr
  _assert_close(_records(tmp_path), _records(one_process))
  assert _data_state(tmp_path) == _data_state(one_process)


@pytest.mark.slow
def test_pmap_across_processes_goes_on_from_one_process(one_process, tmp_path):
  _run_and_kill(tmp_path, num_processes=1)
  outputs = _run(tmp_path, num_processes=2, **{'parallel.kind': 'pmap'})
  assert '8 x cpu in 2 processes, pmap' in outputs[0]
  _assert_close(_records(tmp_path), _records(one_process))
  assert _data_state(tmp_path) == _data_state(one_process)


@pytest.mark.slow
def test_a_signal_to_one_process_stops_and_saves_all(one_process, tmp_path):
  """Params split over all 8 devices: each process saves what only it has."""
  fsdp = {'parallel.data': 1, 'parallel.fsdp': 8}
  with _started(tmp_path, num_processes=2, num_steps=2000, **fsdp) as running:
    _wait_for_line(running[0], 'step 5/')
    os.kill(running[1].pid, signal.SIGTERM)
    codes, outputs = _finished(running)
  assert codes == [128 + signal.SIGTERM] * 2, '\n'.join(outputs)
  stopped = re.search(r'stopped by SIGTERM after step (\d+); saved', outputs[0])
  assert stopped, outputs[0]
  step = int(stopped.group(1))
  assert step < 2000
  assert (tmp_path / 'checkpoints' / str(step)).is_dir()
  train = [r for r in _records(tmp_path) if r['kind'] == 'train']
  assert [r['step'] for r in train] == list(range(1, step + 1))
  # The schedules of 12 and of 2000 steps are one until warm-up ends.
  _assert_close(train[:6], _records(one_process)[:6])


@pytest.mark.slow
def test_a_save_that_fails_in_one_process_fails_in_all_and_is_repeated(
  one_process, tmp_path
):
  """Process 1 cannot write its part; as soon as it is told, it can again."""
  fsdp = {'parallel.data': 1, 'parallel.fsdp': 8}
  limit = resource.RLIMIT_FSIZE
  with _started(
    tmp_path, num_processes=2, **fsdp, **{'checkpoint.every_steps': 6}
  ) as running:
    hard = resource.prlimit(running[1].pid, limit)[1]
    _wait_for_line(running[0], 'step 1/')
    resource.prlimit(running[1].pid, limit, (100_000, hard))
    _wait_for_line(
      running[0], 'step 6: the checkpoint was not saved: got process 1: '
    )
    assert not list((tmp_path / 'checkpoints').glob('[0-9]*'))
    resource.prlimit(running[1].pid, limit, (hard, hard))
    codes, outputs = _finished(running)
  assert codes == [0, 0], '\n'.join(outputs)
  assert (tmp_path / 'checkpoints' / '12' / 'seal.json').exists()
  assert not list((tmp_path / 'checkpoints').glob('*.partial'))
  _assert_close(_records(tmp_path), _records(one_process))


@pytest.mark.slow
def test_processes_agree_on_the_checkpoint_before_a_damaged_one(
  one_process, tmp_path
):
  """Each reads a part of the files: one finds it, all go on from step 8."""
  shutil.copytree(one_process, tmp_path / 'run')
  shutil.rmtree(tmp_path / 'run' / 'frozen')
  newest = tmp_path / 'run' / 'checkpoints' / '12'
  names = seals.file_names(newest)
  file = newest / names[len(names) // 2 * 2 + 1 - 2]  # process 1 reads it
  data = bytearray(file.read_bytes())
  data[len(data) // 2] ^= 1
  file.write_bytes(data)
  outputs = _run(tmp_path / 'run', num_processes=2)
  assert f'step 12 is damaged: {file}: got' in outputs[0]
  assert 'resuming from step 8' in outputs[0]
  assert _records(tmp_path / 'run') == _records(one_process)


@pytest.mark.slow
def test_a_mixture_trains_the_same_in_two_processes(tmp_path):
  """Every expert's tokens come from both: its group is all devices."""
  mixture = {
    'num_steps': 6,
    'model.mlp_width': 0,
    'model.num_experts': 8,
    'model.num_active_experts': 2,
    'model.expert_width': 32,
    'model.balance_loss_weight': 0.01,
    'parallel.expert': 8,
  }
  for name, num_processes in (('one', 1), ('two', 2)):
    _run(tmp_path / name, num_processes=num_processes, **mixture)
  records = [_records(tmp_path / name) for name in ('one', 'two')]
  assert 'expert_load_max' in records[0][0]
  _assert_close(*records)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_all(tmp_path):
  with _started(
    tmp_path, num_processes=2, **{'optimizer.peak_lr': 1e30}
  ) as running:
    codes, outputs = _finished(running)
  assert codes == [exit_codes.NON_FINITE] * 2, '\n'.join(outputs)
  for i, output in enumerate(outputs):
    assert re.search(
      rf'^process {i}: error: step \d+: got \w+ = (nan|inf), expected a finite',
      output,
      re.MULTILINE,
    ), output


@pytest.mark.slow
def test_a_dead_process_ends_the_other(tmp_path):
  """Never a run that hangs: a supervisor sees it, and starts it again."""
  with _started(tmp_path, num_processes=2, num_steps=2000) as running:
    _wait_for_line(running[0], 'step 2/')
    running[1].kill()
    codes, _ = _finished(running)
  assert codes[1] == -signal.SIGKILL
  assert codes[0] not in (0, None)


def _child(process):
  """Returns the process id of a supervisor's child."""
  path = pathlib.Path(f'/proc/{process.pid}/task/{process.pid}/children')
  (child,) = path.read_text().split()
  return int(child)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != 'linux', reason='finds children by /proc')
def test_supervisors_start_a_dead_run_again(one_process, tmp_path):
  """One process is killed: both are started again, and meet."""
  flags = [['--max_restarts=3']] * 2
  with _started(tmp_path, num_processes=2, more_flags=flags) as running:
    _wait_for_line(running[0], 'step 6/')
    os.kill(_child(running[1]), signal.SIGKILL)
    codes, outputs = _finished(running)
  assert codes == [0, 0], '\n'.join(outputs)
  assert 'supervisor: died of SIGKILL after step' in outputs[1]
  assert 'restart 1 of 3' in outputs[0]
  assert re.search(r'^resumed    after step [4-8]$', outputs[0], re.MULTILINE)
  assert _records(tmp_path) == _records(one_process)
  assert _data_state(tmp_path) == _data_state(one_process)
  assert goodput.life(goodput.read(tmp_path)).num_attempts >= 2


@pytest.mark.slow
def test_a_workdir_that_is_not_shared_is_refused(tmp_path):
  workdirs = [tmp_path / 'a', tmp_path / 'b']
  with _started(workdirs, num_processes=2) as running:
    codes, outputs = _finished(running)
  assert codes == [1, 1], '\n'.join(outputs)
  for i, output in enumerate(outputs):
    assert (
      f'process {i}: error: --workdir={workdirs[i]}: got a directory of its own'
      ' in process 1, expected one that all 2 processes share'
    ) in output
  assert not list(tmp_path.glob('*/*'))


@pytest.mark.slow
@pytest.mark.parametrize(
  ('flag', 'message'),
  [
    ('--config.seed=7', '--config: got other values in process 1, expected'),
    ('--num_processes=3', '--num_processes: got other values in process 1'),
  ],
)
def test_processes_that_were_told_different_things_are_refused(
  tmp_path, flag, message
):
  with _started(tmp_path, num_processes=2, more_flags=[[], [flag]]) as running:
    codes, outputs = _finished(running)
  assert codes == [1, 1], '\n'.join(outputs)
  for i, output in enumerate(outputs):
    assert re.search(
      f'^(process {i}: )?error: {message}', output, re.MULTILINE
    ), output
  assert not (tmp_path / 'run.json').exists()


def test_flags_that_name_half_a_cluster_are_refused(tmp_path):
  _, *command = _command(tmp_path / 'run')
  result = commands.run(*command, '--num_processes=2')
  assert result.returncode == 1
  assert result.stderr.strip() == (
    'error: several processes: got --num_processes=2, expected --coordinator,'
    ' --process_id as well; give all three or none'
  )
  assert not (tmp_path / 'run').exists()
