"""Runs programs of strangers in confined processes.

    ran = runner.run('print(6 * 7)')          # Ran('ok', '42\\n', '')
    results, ran = runner.run_tests('def f(x): return x', ['assert f(1) == 1'])

The sandbox is a Python process with the standard library alone, an empty
environment, limits on CPU time, wall time, memory and output, and few system
calls (`syscalls.py`). It starts no process and no program, opens no socket,
changes no file, and signals no other process. It dies with the process that
started it.

The sandbox is no virtual machine. The kernel is shared, so an error of the
kernel in an allowed call is a way out. Without Landlock it
may read the files that its user may read. CPU time and memory are limited, not
reserved: other programs of the machine become slower.
"""

from collections.abc import Mapping, Sequence
import contextlib
import dataclasses
import io
import json
import os
import pathlib
import selectors
import signal
import subprocess
import sys
import time
from typing import Any, NamedTuple

from checks import expect
from evals.verifiers.sandbox import syscalls, values

_ROOT = pathlib.Path(__file__).parents[3]
_START = (
  'import sys; sys.path.insert(0, sys.argv[1]);'
  ' from evals.verifiers.sandbox import child; child.main(sys.argv[2:])'
)
# Nothing of the caller's environment. A fixed seed for the order of sets, so
# that a program does the same when a run is repeated.
_ENVIRONMENT = {'LC_ALL': 'C.UTF-8', 'PYTHONHASHSEED': '0'}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
  """The resources that a confined process may use.

  Raises:
    ValueError: a limit is too low for Python itself.
  """

  cpu_seconds: int = 5
  # Of real time. Well above the CPU time, so that a busy machine decides no
  # result.
  wall_seconds: float = 30.0
  memory_bytes: int = 512 << 20  # address space, Python's own included
  output_bytes: int = 64 << 10  # stdout and stderr together

  def __post_init__(self):
    expect.at_least('cpu_seconds', self.cpu_seconds, 1)
    expect.at_least('wall_seconds', self.wall_seconds, 0.1)
    expect.at_least('memory_bytes', self.memory_bytes, 64 << 20)
    expect.at_least('output_bytes', self.output_bytes, 1)


class Ran(NamedTuple):
  """The end of a confined process."""

  # ok, error (it raised, exited with another code than 0, or died), time (a
  # limit of time) or output (it wrote too much)
  status: str
  output: str  # stdout and stderr, interleaved
  reason: str  # in words; '' for ok


class Unavailable(RuntimeError):
  """This system cannot confine a process; nothing was run."""


def check() -> None:
  """Checks that this system can confine a process.

  Raises:
    Unavailable: it cannot.
  """
  if reason := syscalls.refusal():
    raise Unavailable(f'sandbox: {reason}; run such verifiers there')
  ran = run('', Limits())
  if ran.status != 'ok':
    raise Unavailable(f'sandbox: got {ran.reason or ran.status} from a program'
                      ' that does nothing, expected it to end')  # fmt: skip


def run(
  source: str,
  limits: Limits | None = None,
  *,
  stdin: str = '',
  path: Sequence[str] = (),
) -> Ran:
  """Runs a Python program as a script.

  Args:
    stdin: its input.
    path: directories in which it may import packages, beside the standard
      library.

  Raises:
    Unavailable: this system cannot confine a process.
  """
  limits = limits or Limits()
  with contextlib.ExitStack() as stack:
    out = _pipe(stack)
    task = {'role': 'program', 'source': source}
    started = _start(
      stack, task, limits, out.write.fileno(), stdin=stdin, path=path
    )
    out.write.close()
    found, why = _watch([started], {'output': out.read}, limits)
    code = started.wait()
  return _ran(code, found['output'], why, limits)


def run_tests(
  source: str,
  tests: Sequence[str],
  limits: Limits | None = None,
  *,
  entry_point: str = '',
) -> tuple[list[str], Ran]:
  """Runs tests against a program, each in its own process.

  Args:
    source: Python code that defines the names that the tests call.
    tests: Python code with asserts.
    entry_point: '' or the name of the function that `check` of the tests gets.

  Returns:
    The fault of each test, '' for a passed test, and last the fault of `check`,
    if there is an entry point; empty if the tests did not end. And the end of
    the program.

  Raises:
    Unavailable: this system cannot confine a process.
  """
  limits = limits or Limits()
  with contextlib.ExitStack() as stack:
    out, results = _pipe(stack), _pipe(stack)
    asks, replies = _pipe(stack), _pipe(stack)
    solution = _start(
      stack,
      {
        'role': 'solution',
        'source': source,
        'pipes': [asks.read.fileno(), replies.write.fileno()],
      },
      limits,
      out.write.fileno(),
    )
    tester = _start(
      stack,
      {
        'role': 'tests',
        'tests': list(tests),
        'entry_point': entry_point,
        'pipes': [asks.write.fileno(), replies.read.fileno()],
        'results': results.write.fileno(),
      },
      limits,
      subprocess.DEVNULL,
    )
    for end in (out.write, results.write, *asks, *replies):
      end.close()
    pipes = {'output': out.read, 'results': results.read}
    found, why = _watch([tester, solution], pipes, limits)
    code = _ended(solution)
    tests_code = tester.wait()
  ran = _ran(code, found['output'], why, limits)
  written = b'' if tests_code else found['results']
  return _read_results(written, len(tests) + bool(entry_point)), ran


def _ended(started: subprocess.Popen) -> int:
  """Returns the code of a process that ends because its pipe did; 0: killed."""
  try:
    return started.wait(timeout=0.5)
  except subprocess.TimeoutExpired:
    _end(started)
    return 0


def _read_results(data: bytes, count: int) -> list[str]:
  """Returns the results that the process of the tests wrote; [] for none."""
  try:
    found = json.loads(data[4:])
  except ValueError:
    return []
  return found if len(found) == count else []


class _Pipe(NamedTuple):
  read: io.FileIO
  write: io.FileIO


def _pipe(stack: contextlib.ExitStack) -> _Pipe:
  """Returns a pipe, whose ends are closed with the stack."""
  read, write = os.pipe()
  ends = _Pipe(io.FileIO(read, 'rb'), io.FileIO(write, 'wb'))
  for end in ends:
    stack.callback(end.close)
  return ends


def _start(
  stack: contextlib.ExitStack,
  task: Mapping[str, Any],
  limits: Limits,
  stdout: int,
  *,
  stdin: str = '',
  path: Sequence[str] = (),
) -> subprocess.Popen:
  """Starts a confined process, and waits until it is one."""
  if reason := syscalls.refusal():
    raise Unavailable(f'sandbox: {reason}; run such verifiers there')
  status = _pipe(stack)
  task = {
    **task,
    'status': status.write.fileno(),
    'path': list(path),
    'confinement': {
      'parent': os.getpid(),
      'cpu_seconds': limits.cpu_seconds,
      'memory_bytes': limits.memory_bytes,
      'readable': list(path),
    },
  }
  header = _file(stack, json.dumps(task).encode())
  given = _file(stack, stdin.encode('utf-8', 'replace'))
  numbers = [*task.get('pipes', ()), task['status'], header]
  if 'results' in task:
    numbers.append(task['results'])
  started = subprocess.Popen(
    # -s -S -P: no packages and no files of the user or the directory.
    [sys.executable, '-s', '-S', '-P', '-B', '-c', _START, str(_ROOT),
     str(header)],
    stdin=given, stdout=stdout, stderr=subprocess.STDOUT, cwd='/',
    env=_ENVIRONMENT, pass_fds=numbers, start_new_session=True,
  )  # fmt: skip
  stack.callback(_end, started)
  status.write.close()
  try:
    refused = values.receive(status.read.fileno())
  except EOFError:
    refused = 'the process ended before it was confined'
  if refused:
    raise Unavailable(f'sandbox: {refused}')
  return started


def _file(stack: contextlib.ExitStack, data: bytes) -> int:
  """Returns a file without a name, at its start."""
  file = os.fdopen(os.memfd_create('task'), 'w+b')
  stack.callback(file.close)
  file.write(data)
  file.seek(0)
  return file.fileno()


def _end(started: subprocess.Popen) -> None:
  started.kill()
  started.wait()


def _watch(
  processes: Sequence[subprocess.Popen],
  pipes: Mapping[str, io.FileIO],
  limits: Limits,
) -> tuple[dict[str, bytes], str]:
  """Reads until the first process ends; at a limit, all of them are killed.

  Returns:
    The bytes of each pipe, and the limit that was met: time, output or ''.
  """
  found = {name: bytearray() for name in pipes}
  most = {'output': limits.output_bytes, 'results': values.MOST_BYTES}
  end, why = time.monotonic() + limits.wall_seconds, ''
  with selectors.DefaultSelector() as selector:
    for name, pipe in pipes.items():
      selector.register(pipe, selectors.EVENT_READ, name)
    while not why:
      # A process may close its output and continue.
      is_over = processes[0].poll() is not None
      ready = selector.select(0.02) if selector.get_map() else []
      if is_over and not ready:
        break
      if not selector.get_map():
        time.sleep(0.005)
      for key, _ in ready:
        part = pipes[key.data].read(1 << 16) or b''
        found[key.data] += part
        if not part:
          selector.unregister(key.fileobj)
        elif len(found[key.data]) > most[key.data]:
          why = 'output'
      if time.monotonic() >= end:
        why = 'time'
  if why:
    for each in processes:
      _end(each)
  for name in found:
    del found[name][most[name] :]
  return {name: bytes(data) for name, data in found.items()}, why


def _ran(code: int, output: bytes, why: str, limits: Limits) -> Ran:
  text = output.decode('utf-8', 'replace')
  if why == 'time':
    return Ran('time', text, f'it ran for {limits.wall_seconds:g} s')
  if why == 'output':
    return Ran('output', text, f'it wrote over {limits.output_bytes} bytes')
  if code in (-signal.SIGKILL, -signal.SIGXCPU):  # signals of the CPU limit
    return Ran('time', text, f'it computed for {limits.cpu_seconds} s')
  if code:
    last = text.strip().splitlines()
    said = f': {last[-1][:200]}' if last else ''
    died = f'signal {-code}' if code < 0 else f'code {code}'
    return Ran('error', text, f'it ended with {died}{said}')
  return Ran('ok', text, '')
