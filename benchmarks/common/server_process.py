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
def running(*args: str) -> Generator[tuple[int, int]]:
  """Starts serve.py with these arguments on a free loopback port.

  Yields:
    The port, once all programs are compiled, and the id of the process.

  Raises:
    ValueError: the server has ended.
  """
  with (
    tempfile.NamedTemporaryFile('w+', encoding='utf-8') as log,
    subprocess.Popen(
      [sys.executable, 'serve.py', '--port=0', *args],
      stdout=subprocess.DEVNULL,
      stderr=log,
    ) as process,
  ):
    try:
      yield _port_of(process, log.name), process.pid
    finally:
      process.terminate()


def _port_of(process: subprocess.Popen, log: str) -> int:
  while process.poll() is None:
    text = pathlib.Path(log).read_text(encoding='utf-8')
    # Compiling beside the clients would take a core, and memory.
    if 'all programs are compiled' in text:
      return int(re.findall(r'running on http://127.0.0.1:(\d+)', text)[0])
    time.sleep(0.2)
  text = pathlib.Path(log).read_text(encoding='utf-8')
  raise ValueError(f'serve.py has ended: {text[-1000:]}')
