"""Errors of a disk that cannot be written, as one line with a fix."""

from collections.abc import Iterator
import contextlib
import pathlib


class SaveError(RuntimeError):
  """A write that failed and may work later, as on a full disk."""


@contextlib.contextmanager
def writing(
  place: pathlib.Path | str, saved: str = 'nothing was changed'
) -> Iterator[None]:
  """Turns an OSError of the block into an error for the user.

  Args:
    place: the file or directory that the block writes.
    saved: the part of the work that is safe on disk if the block fails.

  Raises:
    SaveError: the write may work later, as when the disk is full.
    ValueError: the user must change something: a permission or a path.
    FileNotFoundError: passed on; a file to be read is missing.
  """
  try:
    yield
  except FileNotFoundError:
    raise
  except OSError as error:
    words = f'{place}: got {error}, expected to write there'
    if isinstance(
      error, PermissionError | NotADirectoryError | FileExistsError
    ):
      raise ValueError(
        f'{words}; make it writable, or choose another place: {saved}'
      ) from error
    raise SaveError(f'{words}; make room, and start again: {saved}') from error
