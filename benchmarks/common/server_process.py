"""A server in a process of its own, for the benchmarks of HTTP."""

from collections.abc import Generator
import contextlib
import pathlib
import re
import subprocess
import sys
import tempfile
import time


@contextlib.contextmanager
def running(*args: str, replicas: int = 0) -> Generator[tuple[int, int]]:
  """Starts serve.py with these arguments on a free loopback port.

  Args:
    *args: flags of serve.py.
    replicas: processes with an engine; 0: the engine is in the server's.

  Yields:
    The port, once all programs are compiled, and the id of the process.

  Raises:
    ValueError: the server has ended.
  """
  with (
    tempfile.NamedTemporaryFile('w+', encoding='utf-8') as log,
    subprocess.Popen(
      [
        *(sys.executable, 'serve.py', '--port=0', f'--replicas={replicas}'),
        *args,
      ],
      stdout=subprocess.DEVNULL,
      stderr=log,
    ) as process,
  ):
    try:
      yield _port_of(process, log.name, max(replicas, 1)), process.pid
    finally:
      process.terminate()


def children(pid: int) -> list[int]:
  """Returns the processes that a process has started."""
  found = []
  for path in pathlib.Path('/proc').glob('[0-9]*/stat'):
    try:
      # The name, in brackets, may have spaces.
      parent = int(path.read_text().rpartition(')')[2].split()[1])
    except OSError:
      continue  # it has ended
    if parent == pid:
      found.append(int(path.parent.name))
  return found


def _port_of(process: subprocess.Popen, log: str, num_engines: int) -> int:
  while process.poll() is None:
    text = pathlib.Path(log).read_text(encoding='utf-8')
    # Compiling beside the clients would take a core, and memory.
    if text.count('all programs are compiled') >= num_engines:
      return int(re.findall(r'running on http://127.0.0.1:(\d+)', text)[0])
    time.sleep(0.2)
  text = pathlib.Path(log).read_text(encoding='utf-8')
  raise ValueError(f'serve.py has ended: {text[-1000:]}')
