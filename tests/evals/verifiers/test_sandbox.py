"""Hostile programs stay inside of the sandbox, and end."""

import os
import subprocess
import sys
import textwrap
import time

import pytest

from evals.verifiers.sandbox import runner, syscalls, values

_SHORT = runner.Limits(cpu_seconds=1, wall_seconds=20.0)
_LONG = runner.Limits(cpu_seconds=20, wall_seconds=60.0)


def test_a_program_has_its_input_and_the_standard_library():
  ran = runner.run(
    'import json, re, collections, threading\n'
    'words = json.loads(input())\n'
    'thread = threading.Thread(target=print, args=(sorted(words),))\n'
    'thread.start(); thread.join()',
    stdin='["b", "a"]',
  )
  assert ran == runner.Ran('ok', "['a', 'b']\n", '')


@pytest.mark.parametrize(
  ('source', 'status', 'said'),
  [
    ('while True: pass', 'time', 'it computed for 1 s'),
    ('x = bytearray(10**10)', 'error', 'MemoryError'),
    ('x = []\nwhile True: x.append("a" * 10**6)', 'error', 'MemoryError'),
    ('while True: print("a" * 1000)', 'output', 'it wrote over 65536 bytes'),
    ('1 / 0', 'error', 'ZeroDivisionError: division by zero'),
    ('raise SystemExit(3)', 'error', 'it ended with code 3'),
    ('import os; os.abort()', 'error', 'it ended with signal 6'),
    ('def f(): f()\nf()', 'error', 'RecursionError'),
    ('def f(:', 'error', 'SyntaxError'),
    ('import numpy', 'error', 'ModuleNotFoundError'),
  ],
)
def test_a_program_ends_in_words(source, status, said):
  # On a busy machine, to fill the memory can take longer than a second.
  limits = _SHORT if status == 'time' else _LONG
  ran = runner.run(source, limits)
  assert ran.status == status
  assert said in ran.reason
  assert len(ran.output) <= limits.output_bytes


@pytest.mark.slow
def test_a_program_that_sleeps_ends_also_where_it_closed_its_output():
  limits = runner.Limits(wall_seconds=1.0)
  for source in (
    'import time; time.sleep(60)',
    'import os, time; os.close(1); os.close(2); time.sleep(60)',
  ):
    began = time.monotonic()
    assert runner.run(source, limits).status == 'time'
    assert time.monotonic() - began < 30


@pytest.mark.parametrize(
  'source',
  [
    'import os\nwhile True: os.fork()',
    'import subprocess; subprocess.run(["ls"])',
    'import os; os.execv("/bin/ls", ["ls"])',
    'import os; os.kill(os.getppid(), 9)',
    'import os; os.kill(-1, 9)',
    'import socket; socket.create_connection(("127.0.0.1", 80))',
    'import socket; socket.socketpair()',
    'import os; os.sched_setaffinity(0, {0})',
    'import os; os.setpriority(os.PRIO_PROCESS, 0, -5)',
    'import ctypes; l = ctypes.CDLL(None, use_errno=True)\n'
    'r = l.ptrace(16, 1, 0, 0); e = ctypes.get_errno()\n'
    'if r < 0: raise PermissionError(e)',
  ],
)
def test_no_process_no_network_no_signal(source):
  ran = runner.run(source, _SHORT)
  assert ran.status == 'error'
  assert 'PermissionError' in ran.output


def test_no_file_is_changed_and_few_are_read(tmp_path):
  kept = tmp_path / 'kept.txt'
  kept.write_text('before')
  kept.chmod(0o666)
  tmp_path.chmod(0o777)
  changes = [
    f'open({str(kept)!r}, "w")',
    f'open({str(kept)!r}, "a")',
    f'open({str(kept)!r}, "r+")',
    f'open({str(tmp_path / "new")!r}, "x")',
    f'os.remove({str(kept)!r})',
    f'os.rename({str(kept)!r}, {str(tmp_path / "new")!r})',
    f'os.truncate({str(kept)!r}, 0)',
    f'os.chmod({str(kept)!r}, 0)',
    f'os.mkdir({str(tmp_path / "new")!r})',
    f'os.symlink("/", {str(tmp_path / "new")!r})',
    'open("/proc/self/mem", "r+b")',
    # Landlock or a namespace of users: the process that started it is closed.
    'open(f"/proc/{os.getppid()}/mem", "rb")',
    'open(f"/proc/{os.getppid()}/environ", "rb")',
  ]
  tries = '\n'.join(
    f'try: {change}; print({change!r})\nexcept PermissionError: pass'
    for change in changes
  )
  ran = runner.run(f'import os\n{tries}')
  assert ran == runner.Ran('ok', '', '')
  assert kept.read_text() == 'before'
  assert [path.name for path in tmp_path.iterdir()] == ['kept.txt']


def test_limits_cannot_be_raised_and_the_environment_is_empty(monkeypatch):
  monkeypatch.setenv('SECRET', 'x')
  ran = runner.run(
    'import os, resource\n'
    'for name in ("CPU", "AS", "FSIZE", "NOFILE"):\n'
    '  try: resource.setrlimit(getattr(resource, "RLIMIT_" + name), (99**5,)*2)'
    '\n  except (ValueError, PermissionError): pass\n'
    '  else: print(name)\n'
    'print(sorted(os.environ), os.sys.argv)'
  )
  assert ran.output == "['LC_ALL', 'PYTHONHASHSEED'] ['answer']\n"


def test_one_program_runs_twice_alike():
  source = 'print({str(i) for i in range(50)})'
  assert runner.run(source).output == runner.run(source).output


def test_a_killed_caller_leaves_no_process_behind(tmp_path):
  caller = textwrap.dedent("""
    from evals.verifiers.sandbox import runner
    source = 'import os,sys,time; print(os.getpid(),flush=True); time.sleep(60)'
    original = runner._start
    def start(*args, **kwargs):
      started = original(*args, **kwargs)
      print(started.pid, flush=True)
      return started
    runner._start = start
    runner.run(source)
  """)
  with subprocess.Popen(
    [sys.executable, '-c', caller], stdout=subprocess.PIPE, text=True
  ) as process:
    assert process.stdout
    child = int(process.stdout.readline())
    process.kill()
  for _ in range(500):
    if not os.path.exists(f'/proc/{child}') or _is_dead(child):
      return
    time.sleep(0.02)
  raise AssertionError(f'process {child} is alive')


def _is_dead(pid: int) -> bool:
  try:
    with open(f'/proc/{pid}/stat', encoding='utf-8') as file:
      return file.read().rpartition(')')[2].split()[0] in 'ZX'
  except OSError:
    return True


def test_another_system_is_refused_and_nothing_runs(monkeypatch):
  monkeypatch.setattr(
    os, 'uname', lambda: type('U', (), {'sysname': 'Plan9', 'machine': 'vax'})
  )
  with pytest.raises(runner.Unavailable, match='got Plan9 on vax, expected Li'):
    runner.run('print(1)')


@pytest.mark.parametrize('machine', ['x86_64', 'aarch64'])
def test_the_filter_allows_what_it_lists_and_nothing_else(machine):
  """Runs the filter by hand, instruction by instruction."""
  arch, column = {'x86_64': (0xC000003E, 0), 'aarch64': (0xC00000B7, 1)}[
    machine
  ]
  program = syscalls.filter_of(machine, 77)
  assert len(program) < 4096  # of the kernel

  def result(number, *arguments, arch=arch):
    data = {0: number, 4: arch}
    for i, each in enumerate(arguments):
      data |= {16 + 8 * i: each & 0xFFFFFFFF, 20 + 8 * i: each >> 32}
    place = loaded = 0
    while True:
      code, if_true, if_false, value = program[place]
      place += 1
      if code == 0x20:
        loaded = data[value]
      elif code == 0x06:
        return value
      else:
        holds = {
          0x15: loaded == value, 0x35: loaded >= value, 0x45: loaded & value
        }[code]  # fmt: skip
        place += if_true if holds else if_false

  allow, kill, fails = 0x7FFF0000, 0x80000000, 0x00050001
  read, execve, openat = [(0, 63), (59, 221), (257, 56)], (59, 221), (257, 56)
  assert result(read[0][column]) == allow
  assert result(execve[column]) == fails
  assert result(read[0][column], arch=0x40000003) == kill  # 32-bit calls
  assert result(999) == fails
  for flags, expected in ((0o2000000, allow), (1, fails), (0o102, fails)):
    assert result(openat[column], 0, 0, flags) == expected
  clone, prlimit, tgkill = (56, 220), (302, 261), (234, 131)
  assert result(clone[column], 0x3D0F00) == allow  # a thread
  assert result(clone[column], 0x1200011) == fails  # a process
  assert result(prlimit[column], 0, 0, 0) == allow
  assert result(prlimit[column], 0, 0, 1 << 40) == fails
  assert result(prlimit[column], 0, 0, 4096) == fails
  assert result(tgkill[column], 77) == allow
  assert result(tgkill[column], 78) == fails
  assert result(435) == 0x00050026  # clone3: ENOSYS
  if machine == 'x86_64':
    assert result(0x40000000) == kill


def test_values_come_back_as_plain_data():
  kept = []

  def refer(value):
    kept.append(value)
    return len(kept) - 1

  given = {
    (1, 2.5): [None, True, 'é', b'\x00'], 'set': {1}, 'z': 1j, 'f': len,
    'frozen': frozenset([3]),
  }  # fmt: skip
  encoded = values.encode(given, refer)
  assert values.decode(encoded, kept.__getitem__) == given
  for bad in ({'list': 1}, {'a': 1, 'b': 2}, {'other': []}, {'dict': [[1]]},
              {'dict': [[{'list': []}, 1]]}, {'bytes': 'x'}):  # fmt: skip
    with pytest.raises(ValueError, match=r'got|non-hex|unpack'):
      values.decode(bad, kept.__getitem__)


@pytest.mark.parametrize(
  ('field', 'value'),
  [('cpu_seconds', 0), ('memory_bytes', 1), ('wall_seconds', 0)],
)
def test_limits_that_are_too_low_are_refused(field, value):
  with pytest.raises(ValueError, match=f'{field}: got {value}, expected at le'):
    runner.Limits(**{field: value})
