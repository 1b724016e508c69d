"""run.json: the record of a run. Training writes it, freezing reads it.

Version 1 had no `format_version`. This code reads both versions.
"""

import json
import pathlib
from typing import Any

from storage import file_names

FORMAT_VERSION = 2
_READABLE = (1, FORMAT_VERSION)


def read(workdir: pathlib.Path) -> dict[str, Any]:
  """Returns the fields of a run.json.

  Raises:
    FileNotFoundError: there is none.
    ValueError: it is damaged, or of a version that this code cannot read.
  """
  path = workdir / file_names.RUN
  try:
    run = json.loads(path.read_text(encoding='utf-8'))
    version = run.get('format_version', 1)
  except (ValueError, AttributeError) as error:
    raise damaged(workdir, error) from None
  if version not in _READABLE:
    raise ValueError(
      f'{path}: got format version {version!r}, expected one of'
      f' {", ".join(map(str, _READABLE))}; use the code that wrote it, or'
      ' another --workdir'
    )
  return run


def damaged(workdir: pathlib.Path, error: Exception) -> ValueError:
  """Returns the error to raise for a run.json that cannot be read."""
  return ValueError(
    f'{workdir / file_names.RUN}: got a file that cannot be read ({error!r}),'
    ' expected the record of a run; it was damaged: put a copy there, or use'
    ' another --workdir'
  )
