"""A table of plans in a Markdown file, whose rows may be written one by one."""

from collections.abc import Mapping, Sequence
import pathlib

Rows = dict[str, dict[str, str]]  # {row: {column: cell}}


def read(path: pathlib.Path) -> Rows:
  """Returns the rows of a file by their first cell; {} if there is none."""
  return parsed(path.read_text(encoding='utf-8')) if path.exists() else {}


def parsed(text: str) -> Rows:
  """Returns the rows of the only table in a text."""
  lines = [line for line in text.splitlines() if line.startswith('|')]
  rows = [[cell.strip() for cell in line.split('|')[1:-1]] for line in lines]
  if not rows:
    return {}
  header, _, *cells = rows
  return {row[0]: dict(zip(header, row, strict=True)) for row in cells}


def table(
  columns: Sequence[str],
  rows: Mapping[str, Mapping[str, str]],
  order: Sequence[str],
) -> str:
  """Returns the text of a table.

  Args:
    columns: in their order.
    rows: cells by column; a column that is not there is empty.
    order: names of rows; others are left out.
  """
  lines = [columns, ['---'] * len(columns)]
  lines += [
    [rows[name].get(column, '') for column in columns]
    for name in order
    if name in rows
  ]
  return ''.join(f'| {" | ".join(line)} |\n' for line in lines)
