"""One save: from arrays on the devices to a sealed directory, or to nothing.

    start()    makes STEP.partial, and copies off the devices; the loop waits
    finish()   writes, merges, hashes, seals, renames to STEP; in a thread

Orbax writes the arrays. The order of things is ours, and so is what processes
tell each other in between: each writes and hashes its part, the first one the
rest, and whatever fails in one of them, they all know of it before they go on.
"""

import asyncio
from collections.abc import Callable, Iterator, Mapping
import contextlib
import dataclasses
import json
import logging
import pathlib
import shutil
import sys
from typing import Any

from absl import logging as absl_logging
from etils import epath
import orbax.checkpoint as ocp

from frozen import seals
from parallel import processes
from storage import atomic, digests, layout


class SaveError(RuntimeError):
  """A checkpoint or a frozen directory that could not be written."""


@contextlib.contextmanager
def writing(
  place: pathlib.Path | str, saved: str = 'nothing was changed'
) -> Iterator[None]:
  """Makes one line of a disk that cannot be written.

  Args:
    place: where to.
    saved: what the user has all the same.

  Raises:
    SaveError: it may be possible later: a full disk.
    ValueError: it will not be by itself: no permission, no directory.
  """
  try:
    yield
  except FileNotFoundError:
    raise  # something to be read
  except OSError as error:
    words = f'{place}: got {error}, expected to write there'
    if isinstance(
      error, PermissionError | NotADirectoryError | FileExistsError
    ):
      raise ValueError(
        f'{words}; make it writable, or choose another place: {saved}'
      ) from error
    raise SaveError(f'{words}; make room, and start again: {saved}') from error


def quiet_libraries() -> None:
  """Keeps orbax and what it uses from printing what is raised besides.

  Of many writes that fail together the first is raised. Orbax logs its
  traceback; asyncio those of the others, which nobody asked for; and
  TensorStore one for each that ends after the loop was closed.
  """
  absl_logging.get_absl_logger().addFilter(
    lambda r: '/orbax/' not in r.pathname
  )
  logging.getLogger('asyncio').addFilter(
    lambda r: 'exception was never retrieved' not in r.getMessage()
  )
  hook = sys.unraisablehook

  def filtered(unraisable):
    if str(unraisable.exc_value) != 'Event loop is closed':
      hook(unraisable)

  sys.unraisablehook = filtered


@dataclasses.dataclass(kw_only=True)
class Save:
  """One save, of one process."""

  root: pathlib.Path
  step: int
  handler: ocp.StandardCheckpointHandler
  channel: processes.Channel
  before_seal: Callable[[], None]
  _futures: list[Any] = dataclasses.field(default_factory=list)
  _failure: Exception | None = None

  @property
  def _partial(self) -> pathlib.Path:
    return self.root / f'{self.step}{layout.PARTIAL}'

  def start(self, items: Mapping[str, Any], progress: dict[str, Any]) -> None:
    """Copies off the devices, and starts to write."""

    def make_directories():
      if processes.is_first():
        if self._partial.exists():
          shutil.rmtree(self._partial)
        for name in items:
          (self._partial / name).mkdir(parents=True)
        text = json.dumps(progress)
        (self._partial / layout.PROGRESS).write_text(text, encoding='utf-8')

    try:
      self._together(make_directories)
      for name, tree in items.items():
        started = asyncio.run(
          self.handler.async_save(
            epath.Path(self._partial / name),
            args=ocp.args.StandardSave(tree),
          )
        )
        # None where there is nothing left to wait for.
        self._futures += started or []
    except Exception as error:
      self._failure = error

  def finish(self, seal: seals.Seal) -> seals.Seal:
    """Waits, merges, hashes, seals and renames; returns the seal.

    Raises:
      Exception: any process failed; nothing is left.
    """
    names = list(seal.leaves)
    try:
      self._together(self._write)
      files = self._together(lambda: self._merge(names))[0]
      parts = self._together(
        lambda: self._digest(files[processes.index() :: processes.count()])
      )
      entries = {
        name: digests.Entry(*entry)
        for part in parts
        for name, entry in part.items()
      }
      sealed = dataclasses.replace(seal, files=entries)
      if lost := seals.lost(sealed):
        raise SaveError(
          f'{self._partial}: got no {", ".join(lost)}, expected what was just'
          ' written; somebody else deletes here'
        )
      self._together(lambda: self._seal(sealed))
    except Exception:
      if processes.is_first():
        shutil.rmtree(self._partial, ignore_errors=True)
      raise
    return sealed

  def _write(self) -> None:
    failure = self._failure
    for future in self._futures:  # all: none may still write when this fails
      try:
        future.result()
      except Exception as error:
        failure = failure or error
    if failure is not None:
      raise failure

  def _merge(self, items: list[str]) -> list[str]:
    if not processes.is_first():
      return []
    for name in items:
      self.handler.finalize(epath.Path(self._partial / name))
    return seals.file_names(self._partial)

  def _digest(self, files: list[str]) -> dict[str, digests.Entry]:
    # By the process that reads them: the first one cannot make other hosts
    # write out what they hold in memory.
    for name in files:
      atomic.sync(self._partial / name)
    return digests.of_files(self._partial, files)

  def _seal(self, seal: seals.Seal) -> None:
    if not processes.is_first():
      return
    self.before_seal()
    seals.write(self._partial, seal)
    atomic.publish(self._partial, self.root / str(self.step))

  def _together(self, do: Callable[[], Any]) -> list[Any]:
    """Returns what `do` returned in every process, as JSON values.

    Raises:
      Exception: it failed here.
      SaveError: it failed elsewhere.
    """
    failure, value = None, None
    try:
      value = do()
    except Exception as error:
      failure = error
    words = '' if failure is None else f'{type(failure).__name__}: {failure}'
    told = [
      json.loads(text)
      for text in self.channel.gather(json.dumps([words, value]))
    ]
    for i, (words, _) in enumerate(told):
      if words:
        where = f'process {i}: ' if len(told) > 1 else ''
        raise SaveError(f'{where}{words}') from failure
    return [value for _, value in told]
