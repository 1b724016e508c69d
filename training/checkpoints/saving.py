"""One save: arrays on the devices become a sealed directory, or nothing.

    start()    makes STEP.partial, and copies off the devices; the loop waits
    finish()   writes, merges, hashes, seals, renames to STEP; in a thread

Orbax writes the arrays. This module decides the order of the steps and the data
that processes exchange between steps. Each process writes and hashes its part;
the first process does the rest. A failure in one process reaches all of them
before the next step.
"""

import asyncio
from collections.abc import Callable, Mapping
import dataclasses
import json
import pathlib
import shutil
from typing import Any

from etils import epath
import orbax.checkpoint as ocp

from frozen import seals
from parallel import processes
from storage import atomic, digests, disk, file_names


@dataclasses.dataclass(kw_only=True)
class Save:
  """The part of one process in one save."""

  root: pathlib.Path
  step: int
  handler: ocp.StandardCheckpointHandler
  channel: processes.Channel
  before_seal: Callable[[], None]
  _futures: list[Any] = dataclasses.field(default_factory=list)
  _failure: Exception | None = None

  @property
  def _partial(self) -> pathlib.Path:
    return self.root / f'{self.step}{file_names.PARTIAL}'

  def start(self, items: Mapping[str, Any], progress: dict[str, Any]) -> None:
    """Copies the arrays off the devices and starts to write them.

    A failure is kept and raised by `finish`.
    """

    def make_directories():
      if processes.is_first():
        if self._partial.exists():
          shutil.rmtree(self._partial)
        for name in items:
          (self._partial / name).mkdir(parents=True)
        text = json.dumps(progress)
        (self._partial / file_names.PROGRESS).write_text(text, encoding='utf-8')

    try:
      self._together(make_directories)
      for name, tree in items.items():
        started = asyncio.run(
          self.handler.async_save(
            epath.Path(self._partial / name), args=ocp.args.StandardSave(tree)
          )
        )
        # None if there is nothing to wait for.
        self._futures += started or []
    except Exception as error:
      self._failure = error

  def finish(self, seal: seals.Seal) -> seals.Seal:
    """Waits, merges, hashes, seals and renames; returns the seal with files.

    Raises:
      Exception: a process failed. The partial directory is deleted.
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
        raise disk.SaveError(
          f'{self._partial}: got no {", ".join(lost)}, expected the files just'
          ' written; another program deletes files here'
        )
      self._together(lambda: self._seal(sealed))
    except Exception:
      if processes.is_first():
        shutil.rmtree(self._partial, ignore_errors=True)
      raise
    return sealed

  def _write(self) -> None:
    failure = self._failure
    # Waits for all writes: none may still run when the directory is deleted.
    for future in self._futures:
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
    # In every process: the first one cannot flush the memory of other hosts.
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
    """Calls `do` in every process and exchanges the results.

    Returns:
      The results by process, as JSON values.

    Raises:
      disk.SaveError: `do` failed in a process; the text names it.
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
        raise disk.SaveError(f'{where}{words}') from failure
    return [value for _, value in told]
