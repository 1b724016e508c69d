"""JSON Lines files of examples: an object per line; empty lines are skipped.

The fields of a line depend on the kind of evaluation. All kinds have the
optional field `id`, the name of the example in results; the default is the line
number and a digest of the line. Most kinds also have

    cluster    name of a group of examples that may err together, such as the
               questions on one passage, or the texts of one author

An unknown field is an error. Errors name file and line.
"""

from collections.abc import Sequence
import hashlib
import json
import os
import pathlib
from typing import Any, NamedTuple


class Record(NamedTuple):
  """One line of a file."""

  place: str  # 'FILE, line N'
  id: str
  fields: dict[str, Any]

  def error(self, name: str, expected: str) -> ValueError:
    """Returns the error about a field that is not as expected."""
    got = repr(self.fields.get(name))
    return ValueError(
      f'{self.place}: {name}: got {got[:80]}, expected {expected}'
    )

  def text(self, name: str, default: str | None = None) -> str:
    """Returns a field that is a string."""
    value = self.fields.get(name, default)
    if not isinstance(value, str):
      raise self.error(name, 'a string')
    return value

  def texts(self, name: str, least: int) -> tuple[str, ...]:
    """Returns a field that is a list of non-empty strings."""
    value = self.fields.get(name, [])
    if (
      not isinstance(value, list)
      or len(value) < least
      or not all(isinstance(item, str) and item for item in value)
    ):
      raise self.error(
        name, f'a list of at least {least} strings, none of them empty'
      )
    return tuple(value)


def read(
  path: str | os.PathLike,
  *,
  required: Sequence[str],
  optional: Sequence[str] | None,
) -> list[Record]:
  """Returns the lines of a file.

  Args:
    path: path of the file.
    required: fields that every line has.
    optional: further fields that a line may have; None: any.

  Raises:
    FileNotFoundError: there is no file.
    ValueError: a line is wrong, two have the same id, or there is none.
  """
  path = pathlib.Path(path)
  records, seen = [], {}
  for i, line in enumerate(read_text(path).split('\n'), 1):
    if not line.strip():
      continue
    record = _record(f'{path}, line {i}', line, i, required, optional)
    if record.id in seen:
      raise record.error('id', f'another than that of {seen[record.id]}')
    seen[record.id] = f'line {i}'
    records.append(record)
  if not records:
    raise ValueError(f'{path}: got no lines, expected at least one example')
  return records


def _record(
  place: str,
  line: str,
  number: int,
  required: Sequence[str],
  optional: Sequence[str] | None,
) -> Record:
  try:
    fields = json.loads(line)
  except ValueError as error:
    raise ValueError(
      f'{place}: got {line[:60]!r}, expected a JSON object ({error})'
    ) from None
  if not isinstance(fields, dict):
    raise ValueError(f'{place}: got {line[:60]!r}, expected a JSON object')
  missing = [name for name in required if name not in fields]
  known = fields if optional is None else (*required, *optional)
  unknown = [name for name in fields if name not in known]
  if missing or unknown:
    others = (
      '' if optional is None else f' and no others but {", ".join(optional)}'
    )
    raise ValueError(
      f'{place}: got the fields {", ".join(fields) or "none"}, expected'
      f' {", ".join(required)}{others}'
    )
  name = fields.get('id', f'{number}:{_digest(line)}')
  if not isinstance(name, str | int):
    raise ValueError(f'{place}: id: got {name!r}, expected text or a number')
  return Record(place, str(name), fields)


def _digest(line: str) -> str:
  return hashlib.sha256(line.strip().encode('utf-8')).hexdigest()[:12]


def read_text(path: str | os.PathLike) -> str:
  """Returns the text of a UTF-8 file, its line ends unchanged.

  Raises:
    FileNotFoundError: there is no file.
    ValueError: it is a directory, or not UTF-8.
  """
  try:
    return pathlib.Path(path).read_bytes().decode('utf-8')
  except FileNotFoundError:
    raise FileNotFoundError(
      f'{path}: got no such file, expected one of examples'
    ) from None
  except IsADirectoryError:
    raise ValueError(f'{path}: got a directory, expected a file') from None
  except UnicodeDecodeError as error:
    line = error.object[: error.start].count(b'\n') + 1
    raise ValueError(
      f'{path}, line {line}: got bytes that are no UTF-8, expected text;'
      ' convert the file'
    ) from None


def clusters(examples: Sequence[Any]) -> tuple[str, ...] | None:
  """Returns the cluster of each example; without one, the example is alone."""
  if not any(example.cluster for example in examples):
    return None
  return tuple(
    f'cluster {example.cluster}' if example.cluster else f'id {example.id}'
    for example in examples
  )
