"""Starting a run again: signals, budgets, repeated crashes; and for real."""

import contextlib
import pathlib
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from training.lifecycle import exit_codes, supervisor

ROOT = pathlib.Path(__file__).parents[3]
# Every attempt takes a number, and does what the test says of that number.
CHILD = """
import json, os, pathlib, signal, sys, time
workdir = pathlib.Path(sys.argv[1])
count = workdir / 'count'
attempt = int(count.read_text()) + 1 if count.exists() else 1
count.write_text(str(attempt))
def take_steps(first, last):
  with (workdir / 'metrics.jsonl').open('a') as file:
    for step in range(first, last + 1):
      file.write(json.dumps({'kind': 'train', 'step': step}) + '\\n')
def save(step):
  (workdir / 'checkpoints' / str(step)).mkdir(parents=True)
def die(number):
  os.kill(os.getpid(), number)
"""


@pytest.fixture
def supervise(tmp_path):
  """Returns run(source of the child) -> (code, what was said, attempts)."""

  def run(source, max_restarts=10):
    said = []
    watching = supervisor.Supervisor(
      [sys.executable, '-SEc', CHILD + textwrap.dedent(source), str(tmp_path)],
      tmp_path,
      max_restarts=max_restarts,
      first_pause_s=0.001,
      say=said.append,
    )
    code = watching.run()
    return code, '\n'.join(said), int((tmp_path / 'count').read_text())

  return run


def test_it_does_without_jax():
  """It would hold the devices of its child."""
  source = "import sys, train; print('jax' in sys.modules)"
  printed = subprocess.run(
    [sys.executable, '-c', source], cwd=ROOT, capture_output=True, text=True
  )
  assert printed.stdout == 'False\n', printed.stderr


@pytest.mark.parametrize('code', exit_codes.FINAL)
def test_what_is_final_is_passed_on(supervise, code):
  assert supervise(f'sys.exit({code})')[::2] == (code, 1)


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_child_that_somebody_else_stopped_stays_so(supervise, number):
  assert supervise(f'die({int(number)})')[::2] == (128 + number, 1)


@pytest.mark.parametrize(
  'death',
  ['die(signal.SIGKILL)', 'die(signal.SIGSEGV)', 'os.abort()', 'sys.exit(70)'],
)
def test_a_crash_is_started_again(supervise, death):
  code, said, attempts = supervise(f"""
    if attempt == 1:
      take_steps(1, 3)
      {death}
  """)
  assert (code, attempts) == (0, 2)
  assert 'after step 3; restart 1 of 10' in said


@pytest.mark.parametrize(
  'damage', ["b'\\0' * 99", "b'[1]'", "b'{}'", "b'\\xff'", "b'p\": 9}'"]
)
def test_damaged_metrics_are_skipped_and_said(supervise, damage):
  code, said, attempts = supervise(f"""
    if attempt == 1:
      take_steps(1, 3)
      with (workdir / 'metrics.jsonl').open('ab') as file:
        file.write({damage} + b'\\n' + {damage})
      die(signal.SIGKILL)
  """)
  assert (code, attempts) == (0, 2)
  assert 'after step 3; restart 1 of 10' in said
  assert 'metrics.jsonl, line 4: got' in said


def test_the_same_step_twice_ends_it_with_a_diagnosis(supervise, capfd):
  code, said, attempts = supervise("""
    if attempt == 1:
      save(4)
    take_steps(1, 7)
    print('harmless', file=sys.stderr)
    print('ValueError: the culprit', file=sys.stderr)
    sys.exit(70)
  """)
  assert (code, attempts) == (exit_codes.SAME_STEP, 2)
  diagnosis = said[said.index('supervisor: error') :].splitlines()
  assert diagnosis[:6] == [
    'supervisor: error: got 2 attempts in a row that died after step 7,'
    ' expected a step more; not restarted',
    '  attempt 1: exit code 70, ValueError: the culprit',
    '  attempt 2: exit code 70, ValueError: the culprit',
    '  last good checkpoint: step 4',
    '  the end of stderr:',
    '    | harmless',
  ]
  assert diagnosis[-1].startswith('  fix: the exception above')
  # The child's own words went through besides.
  assert capfd.readouterr().err.count('ValueError: the culprit') == 2


def test_the_same_step_of_a_later_checkpoint_is_progress(supervise):
  """The metrics need not have moved: reports may be rare."""
  code, _, attempts = supervise("""
    take_steps(7, 7)
    if attempt < 4:
      save(attempt)
      sys.exit(70)
  """)
  assert (code, attempts) == (0, 4)


@pytest.mark.parametrize(
  'death',
  [
    'take_steps(1, 7); die(signal.SIGKILL)',
    'take_steps(1, 7); print("UNAVAILABLE: coordination service",'
    ' file=sys.stderr); os.abort()',
    'sys.exit(70)',  # before any step
  ],
)
def test_what_may_come_from_outside_is_tried_once_more(supervise, death):
  code, said, attempts = supervise(death)
  assert (code, attempts) == (exit_codes.SAME_STEP, 3)
  assert 'got 3 attempts in a row that died' in said


def test_old_metrics_are_no_step_of_a_later_attempt(supervise):
  code, said, attempts = supervise("""
    if attempt == 1:
      save(4)
      take_steps(1, 7)
    sys.exit(70)
  """)
  assert (code, attempts) == (exit_codes.SAME_STEP, 4)
  assert 'died before a step was taken from step 4' in said


def test_the_budget_runs_out(supervise):
  code, said, attempts = supervise(
    'take_steps(attempt, attempt); sys.exit(70)', max_restarts=2
  )
  assert (code, attempts) == (exit_codes.TRY_AGAIN, 3)
  assert 'the 2 restarts of --max_restarts are used up' in said


def test_a_new_checkpoint_restores_the_budget(supervise):
  code, said, attempts = supervise(
    """
    take_steps(attempt, attempt)
    if attempt in (2, 4):
      save(attempt)
    sys.exit(70 if attempt < 6 else 0)
    """,
    max_restarts=2,
  )
  assert (code, attempts) == (0, 6)
  assert said.count('restart 1 of 2') == 3


def test_what_the_child_started_ends_with_it(supervise, tmp_path):
  supervise("""
    import subprocess
    worker = subprocess.Popen(['sleep', '60'])
    (workdir / 'worker').write_text(str(worker.pid))
  """)
  worker = int((tmp_path / 'worker').read_text())
  _assert_ends(worker)


def _assert_ends(pid):
  """Waits for a process that is nobody's child here to be gone, or a zombie."""
  deadline = time.monotonic() + 30
  while time.monotonic() < deadline:
    try:
      stat = pathlib.Path(f'/proc/{pid}/stat').read_text()
    except FileNotFoundError:
      return
    if stat.rpartition(')')[2].split()[0] == 'Z':
      return
    time.sleep(0.02)
  raise AssertionError(f'process {pid} goes on')


# ------------------------------------------------------------------------------
# A supervisor in a process of its own, which signals are sent to.

PARENT = """
import pathlib, sys
from training.lifecycle import supervisor
sys.exit(supervisor.Supervisor(
  [sys.executable, '-Ec', sys.argv[1], sys.argv[2]],
  pathlib.Path(sys.argv[2]), max_restarts=5, first_pause_s=PAUSE,
).run())
"""


@contextlib.contextmanager
def _supervising(workdir, source, *, pause=0.01):
  """Starts one; the block begins when its child has said that it is ready."""
  child = CHILD + textwrap.dedent(source)
  process = subprocess.Popen(
    [sys.executable, '-c', PARENT.replace('PAUSE', str(pause)), child, workdir],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  try:
    assert process.stdout.readline() == 'ready\n'
    yield process
  finally:
    process.kill()
    process.communicate(timeout=30)


SAVES_WHEN_ASKED = """
def save_and_leave(number, frame):
  os.write(1, b'saved\\n')
  sys.exit(128 + number)
signal.signal(signal.SIGTERM, save_and_leave)
signal.signal(signal.SIGINT, save_and_leave)
print('ready', flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_signals_are_passed_on_and_waited_for(tmp_path, number):
  with _supervising(tmp_path, SAVES_WHEN_ASKED) as process:
    process.send_signal(number)
    assert process.wait(timeout=30) == 128 + number, process.stderr.read()
    assert process.stdout.read() == 'saved\n'


def test_a_signal_between_attempts_ends_it(tmp_path):
  crash = "print('ready', flush=True); sys.exit(70)"
  with _supervising(tmp_path, crash, pause=60) as process:
    lines = iter(process.stderr.readline, '')
    assert any('restart 1 of 5 in 60 s' in line for line in lines)
    process.terminate()
    assert process.wait(timeout=30) == 143


# Sends SIGTERM before the n-th line that Python runs in the pause.
AT_EACH_LINE = """
import pathlib, signal, sys
from training.lifecycle import supervisor

supervisor._LOOK_S = 0.001

def at_line(number):
  def trace(frame, event, arg):
    nonlocal number
    number -= event == 'line'
    if number == 0:
      sys.settrace(None)
      signal.raise_signal(signal.SIGTERM)
    return trace
  def say(text):
    assert 'restart 1 of 5' in text
    sys.settrace(trace)
    sys._getframe(1).f_trace = trace  # `settrace` is for new frames
  return say

for number in range(1, 41):
  code = supervisor.Supervisor(
    [sys.executable, '-ESsc', 'raise SystemExit(70)'],
    pathlib.Path(sys.argv[1]), max_restarts=5, first_pause_s=60,
    say=at_line(number),
  ).run()
  assert code == 143, code
print('ended')
"""


def test_a_signal_ends_a_pause_at_every_line(tmp_path):
  ended = subprocess.run(
    [sys.executable, '-c', AT_EACH_LINE, tmp_path],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=120,
    check=False,
  )
  assert ended.stdout == 'ended\n', ended.stderr


@pytest.mark.skipif(sys.platform != 'linux', reason='asks the kernel for it')
def test_a_killed_supervisor_takes_its_child_along(tmp_path):
  orphan = f"""
    sys.path.insert(0, {str(ROOT)!r})
    from training.lifecycle import supervisor
    supervisor.die_with_supervisor()
    (workdir / 'pid').write_text(str(os.getpid()))
    print('ready', flush=True)
    time.sleep(60)
  """
  with _supervising(tmp_path, orphan) as process:
    process.kill()
  _assert_ends(int((tmp_path / 'pid').read_text()))
