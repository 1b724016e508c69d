"""Commands of the repository, run in the process of the test.

A fresh process takes 2 to 4 s of CPU time to import JAX. Commands that only
refuse their arguments, or print a report, run here instead; at least one test
of each entry point starts a real process.
"""

import contextlib
import dataclasses
import gc
import io
import logging
import os
import pathlib
import runpy
import sys
from unittest import mock

from absl import app, flags, logging as absl_logging

from hardware import compilation_cache

ROOT = pathlib.Path(__file__).parents[2]
_OURS = {path.stem for path in ROOT.iterdir() if not path.name.startswith('.')}


@dataclasses.dataclass(frozen=True)
class Done:
  """The end of a command, with the fields of subprocess.CompletedProcess."""

  returncode: int
  stdout: str
  stderr: str


def run(path: str, *args: str, stdin: str = '') -> Done:
  """Runs `python PATH ARGS` from the root of the repository, in this process.

  The flags, the environment and the logging of the test stay as they are, and
  so does the directory in which engines keep their programs.
  """
  out, err = (
    io.TextIOWrapper(io.BytesIO(), 'utf-8', write_through=True)
    for _ in range(2)
  )
  with (
    own_flags(),
    _own_logging(),
    mock.patch.object(compilation_cache, '_directory', None),
    _own_garbage_collector(),
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
def own_flags():
  """Gives a command the flags of libraries alone, as a fresh process has.

  A test of this process may have imported a benchmark, whose flags would
  collide with those of the command, or be required by it.
  """
  app.define_help_flags()  # absl does this once per process
  registry = flags.FLAGS.__dict__
  # absl changes the lists of flags by module in place.
  before = {
    name: {
      key: each.copy() if isinstance(each, list) else each
      for key, each in value.items()
    }
    if isinstance(value, dict)
    else value
    for name, value in registry.items()
  }
  for module, defined in list(flags.FLAGS.flags_by_module_dict().items()):
    if module.split('.')[0] in _OURS:
      for flag in list(defined):
        delattr(flags.FLAGS, flag.name)
  try:
    yield
  finally:
    registry.clear()
    registry.update(before)


@contextlib.contextmanager
def _own_garbage_collector():
  """Undoes what serve.py does for a process that lives as long as its model."""
  with mock.patch.object(gc, 'freeze'):
    try:
      yield
    finally:
      gc.enable()


@contextlib.contextmanager
def _own_logging():
  """Undoes the handler and the verbosity that `absl.app.run` sets."""
  root, ours = logging.root, absl_logging.get_absl_logger()
  handlers, level, own_level = root.handlers[:], root.level, ours.level
  verbosity = absl_logging.get_verbosity()
  try:
    yield
  finally:
    absl_logging.set_verbosity(verbosity)
    # That set the level of the root logger as well, if absl's handler is there.
    root.handlers[:] = handlers
    root.setLevel(level)
    ours.setLevel(own_level)
