"""A server in a process of its own, on a loopback port, for a deployment."""

import collections
from collections.abc import Mapping, Sequence
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

_ROOT = pathlib.Path(__file__).parents[3]
_PORT = re.compile(r'http://127\.0\.0\.1:(\d+)')
_LINES = 20  # of its output that an error shows
_POLL_SECONDS = 0.5
_PROBE_SECONDS = 10


class Ended(RuntimeError):
  """The server has ended, or cannot be served."""


class Child:
  """A running serve.py."""

  def __init__(self, flags: Sequence[str], environment: Mapping[str, str]):
    """Starts it; `wait` until it is ready.

    Args:
      flags: of serve.py, without host and port.
      environment: of the process.
    """
    self._lines: collections.deque[str] = collections.deque(maxlen=_LINES)
    self._port: int | None = None
    self._process = subprocess.Popen(
      [sys.executable, 'serve.py', '--host=127.0.0.1', '--port=0', *flags],
      cwd=_ROOT,
      env=dict(environment),
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
      errors='replace',
    )
    self._reader = threading.Thread(target=self._read, daemon=True)
    self._reader.start()

  @property
  def url(self) -> str:
    """The address of the server."""
    return f'http://127.0.0.1:{self._port}'

  def wait(self, seconds: float, *, may_be_open: bool) -> None:
    """Waits until the server answers requests.

    Args:
      seconds: the longest wait.
      may_be_open: whether it may answer clients without a key.

    Raises:
      Ended: it has ended, is not ready in time, or is open and may not be.
    """
    deadline = time.monotonic() + seconds
    while not (self._port and self.status('/ready') == 200):
      if self._process.poll() is not None:
        self.stop(0)
        raise Ended(f'serve.py has ended:\n{"".join(self._lines)}')
      if time.monotonic() > deadline:
        self.stop(0)
        raise Ended(
          f'serve.py: got no readiness in {seconds:g} s, expected it; give'
          f' start_seconds\n{"".join(self._lines)}'
        )
      time.sleep(_POLL_SECONDS)
    # It is on loopback, where it needs no key; the proxies of Ray are not.
    if not may_be_open and self.status('/v1/models') == 200:
      self.stop(0)
      raise Ended(
        'api_keys: got none, expected keys, since the proxies of Ray listen for'
        ' other machines; give api_keys or records, or insecure=true'
      )

  def status(self, path: str) -> int:
    """Returns the status of a request, 0 without an answer."""
    try:
      with urllib.request.urlopen(
        self.url + path, timeout=_PROBE_SECONDS
      ) as answer:
        return answer.status
    except urllib.error.HTTPError as error:
      return error.code
    except OSError:
      return 0

  def check(self) -> None:
    """Checks that the server is healthy.

    Raises:
      Ended: it has ended or does not answer.
    """
    if self._process.poll() is not None or self.status('/health') != 200:
      raise Ended(f'serve.py is not healthy:\n{"".join(self._lines)}')

  def stop(self, seconds: float) -> int:
    """Lets the server finish open requests, and ends it; returns its status.

    Args:
      seconds: until it is killed.
    """
    if self._process.poll() is None:
      self._process.send_signal(signal.SIGTERM)
      try:
        self._process.wait(seconds)
      except subprocess.TimeoutExpired:
        self._process.kill()
    status = self._process.wait()
    self._reader.join()  # its last lines
    return status

  def _read(self) -> None:
    assert self._process.stdout
    with self._process.stdout as output:
      for line in output:
        self._lines.append(line)
        if self._port is None and (found := _PORT.search(line)):
          self._port = int(found[1])
