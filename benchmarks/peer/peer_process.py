"""The process of a peer: starts `peer_worker`, and asks for turns by a pipe."""

import contextlib
import importlib.util
import json
import pathlib
import subprocess
import sys
from typing import Any

import jax

_ROOT = pathlib.Path(__file__).parents[2]


class PeerProcess(contextlib.AbstractContextManager):
  """A running peer, built and warmed up; leaving the context ends it.

  Args:
    spec: the workload and its shapes, see `peer_worker`.

  Raises:
    ValueError: no peer can run on this machine.
  """

  def __init__(self, spec: dict[str, Any]):
    check_available()
    _check_device(spec.get('device', 'cpu'))
    self._process = subprocess.Popen(
      [sys.executable, '-m', 'benchmarks.peer.peer_worker'],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
      cwd=_ROOT,
    )
    assert self._process.stdout is not None
    self._stdout = self._process.stdout
    self.info = self._ask(spec)

  def turn(self) -> float:
    """Lets the peer run once; returns the seconds that it measured."""
    return self._ask({})['seconds']

  def _ask(self, message: dict[str, Any]) -> dict[str, Any]:
    try:
      print(json.dumps(message), file=self._process.stdin, flush=True)
      answer = self._stdout.readline()
    except BrokenPipeError:
      answer = ''
    if not answer:
      self.__exit__()
      raise RuntimeError(
        f'peer: exited with status {self._process.returncode}, expected an'
        ' answer; its own error is above'
      )
    return json.loads(answer)

  def __exit__(self, *_) -> None:
    self._process.communicate()  # closes its stdin, which ends its loop


def check_available() -> None:
  """Raises ValueError if no peer can run; its message has the fix."""
  missing = [
    name
    for name in ('torch', 'transformers')
    if importlib.util.find_spec(name) is None
  ]
  if missing:
    raise ValueError(
      f'--peer: {" and ".join(missing)} not installed, expected both; fix:'
      ' make bench-peer, or pip install -r requirements-peer.txt'
    )
  if jax.default_backend() not in ('cpu', 'gpu'):
    raise ValueError(
      f'--peer: got the {jax.default_backend()} backend, expected cpu or gpu,'
      ' where a peer runs; fix: JAX_PLATFORMS=cpu'
    )


def _check_device(device: str) -> None:
  """Raises ValueError if the peer would run on another device than ours."""
  backend = jax.default_backend()
  if {'cpu': 'cpu', 'gpu': 'cuda'}[backend] != device:
    raise ValueError(
      f'--peer: got the {backend} backend for ours and {device} for the peer,'
      ' expected the same device; fix: JAX_PLATFORMS=cpu'
    )


def check_same_size(info: dict[str, Any], num_params: int) -> None:
  """Raises ValueError unless the peer's model has `num_params` parameters."""
  if info['num_params'] != num_params:
    raise ValueError(
      f'--peer: got {info["num_params"]} parameters, expected our {num_params};'
      ' fix: give both sides the same shapes'
    )
