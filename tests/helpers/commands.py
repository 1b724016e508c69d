"""Commands of the repository, run in the process of the test.

A fresh process takes 2 to 4 s of CPU time to import JAX. Commands that only
refuse their arguments, or print a report, run here instead; at least one test
of each entry point starts a real process.
"""

import contextlib
import dataclasses
import io
import logging
import os
import pathlib
import runpy
import sys
from unittest import mock

from absl import app, flags, logging as absl_logging

ROOT = pathlib.Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True)
class Done:
  """The end of a command, with the fields of subprocess.CompletedProcess."""

  returncode: int
  stdout: str
  stderr: str


def run(path: str, *args: str, stdin: str = '') -> Done:
  """Runs `python PATH ARGS` from the root of the repository, in this process.

  The flags, the environment and the logging of the test stay as they are.
  """
  out, err = (
    io.TextIOWrapper(io.BytesIO(), 'utf-8', write_through=True)
    for _ in range(2)
  )
  with (
    _own_flags(),
    _own_logging(),
    mock.patch.dict(os.environ),
    mock.patch.object(sys, 'argv', [path, *args]),
    mock.patch.object(sys, 'stdin', io.StringIO(stdin)),
    contextlib.chdir(ROOT),
    contextlib.redirect_stdout(out),
    contextlib.redirect_stderr(err),
  ):
    code = _exit_code(path)
  return Done(
    code, *(stream.buffer.getvalue().decode() for stream in (out, err))
  )


def _exit_code(path: str) -> int:
  try:
    runpy.run_path(path, run_name='__main__')
  except SystemExit as end:
    if isinstance(end.code, str):  # the interpreter prints a message so
      print(end.code, file=sys.stderr)
      return 1
    return end.code or 0
  return 0


@contextlib.contextmanager
def _own_flags():
  """Forgets the flags that a command defines, so that another can."""
  app.define_help_flags()  # absl does this once per process
  registry = flags.FLAGS.__dict__
  before = {
    name: value.copy() if isinstance(value, dict) else value
    for name, value in registry.items()
  }
  try:
    yield
  finally:
    registry.clear()
    registry.update(before)


@contextlib.contextmanager
def _own_logging():
  """Undoes the handler and the verbosity that `absl.app.run` sets."""
  handlers, verbosity = logging.root.handlers[:], absl_logging.get_verbosity()
  try:
    yield
  finally:
    logging.root.handlers[:] = handlers
    absl_logging.set_verbosity(verbosity)
