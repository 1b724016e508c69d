"""Feedback becomes preference data, or is deleted for a principal.

    python -m inference.server.feedback export --records=FILE --out=prefs.jsonl
    python -m inference.server.feedback export ... --kind=labels
    python -m inference.server.feedback delete --records=FILE --principal=alice

A line is a JSON object in the format that preference trainers commonly read:
lists of messages with role and content.

    pairs     {"prompt": [...], "chosen": [...], "rejected": [...]}
    labels    {"prompt": [...], "completion": [...], "label": true}

A pair is an answer and a better one that the client wrote; or two answers of
one principal to the same prompt, one with thumb up and one with thumb down. A
label is the thumb of an answer. Each line has the ids of its feedback, so that
feedback deleted here can be deleted in the exported file. It has no principal.

Reference: huggingface.co/docs/trl/dataset_formats (conversational, explicit
prompt).
"""

from collections.abc import Iterable, Iterator
import contextlib
import json
import pathlib
import sqlite3
import sys
from typing import Any

from absl import app, flags

from checks import path_flags
from inference.server.records import feedback
from storage import atomic

KINDS = ('pairs', 'labels')
_VERBS = ('export', 'delete')
_Row = dict[str, Any]


def pairs(rows: Iterable[_Row]) -> Iterator[_Row]:
  """Yields the pairs of answers in rows of the records."""
  rated: dict[tuple[str, str], dict[str | None, list[_Row]]] = {}
  for row in rows:
    if row['preferred'] is not None and row['preferred'] != row['answer']:
      yield _pair(row, row['preferred'], row['answer'], row['id'])
    prompt = row['principal'], json.dumps(row['messages'], sort_keys=True)
    rated.setdefault(prompt, {}).setdefault(row['thumb'], []).append(row)
  for by_thumb in rated.values():
    for good in by_thumb.get('up', ()):
      for bad in by_thumb.get('down', ()):
        if good['answer'] != bad['answer']:
          yield _pair(
            good, good['answer'], bad['answer'], good['id'], bad['id']
          )


def labels(rows: Iterable[_Row]) -> Iterator[_Row]:
  """Yields the answers that have a thumb."""
  for row in rows:
    if row['thumb'] is not None:
      yield {
        'prompt': row['messages'],
        'completion': _message(row['answer']),
        'label': row['thumb'] == 'up',
        'model': row['model'],
        'feedback': [row['id']],
      }


def _pair(row: _Row, chosen: str, rejected: str, *ids: str) -> _Row:
  return {
    'prompt': row['messages'],
    'chosen': _message(chosen),
    'rejected': _message(rejected),
    'model': row['model'],
    'feedback': list(ids),
  }


def _message(text: str) -> list[dict[str, str]]:
  return [{'role': 'assistant', 'content': text}]


def export(records: str, out: str, kind: str) -> tuple[int, int]:
  """Writes the lines of a kind; returns the numbers of lines and of rows.

  Raises:
    ValueError: `records` is no file with feedback.
  """
  with _opened(records, mode='ro') as connection:
    rows = list(feedback.rows(connection))
  made = pairs(rows) if kind == 'pairs' else labels(rows)
  lines = [json.dumps(each, ensure_ascii=False) for each in made]
  text = ''.join(f'{line}\n' for line in lines)
  atomic.write_text(pathlib.Path(out), text)
  return len(lines), len(rows)


def delete(records: str, principal: str) -> int:
  """Deletes all feedback of a principal; returns the number of rows.

  Raises:
    ValueError: `records` is no file with feedback.
  """
  with _opened(records, mode='rw') as connection, connection:
    return feedback.delete_all(connection, principal)


@contextlib.contextmanager
def _opened(records: str, *, mode: str) -> Iterator[sqlite3.Connection]:
  """Opens the file of a server, which may run."""
  path = pathlib.Path(records).absolute()
  try:
    connection = sqlite3.connect(f'{path.as_uri()}?mode={mode}', uri=True)
    with contextlib.closing(connection):
      yield connection
  except sqlite3.Error as error:
    raise ValueError(
      f'--records: got {records} ({error}), expected the file that serve.py was'
      ' given as --records'
    ) from error


def main(argv: list[str]) -> None:
  """Exports or deletes; errors are one line."""
  values = flags.FLAGS
  if len(argv) != 2 or argv[1] not in _VERBS:
    raise app.UsageError(f'got {argv[1:]}, expected one of {", ".join(_VERBS)}')
  try:
    if argv[1] == 'delete':
      if values.principal is None or values.out is not None:
        raise ValueError('delete: expected --records and --principal only')
      num = delete(values.records, values.principal)
      print(f'deleted {num} rows; lines that were exported are not deleted')
      return
    if values.out is None or values.principal is not None:
      raise ValueError('export: expected --records and --out, no --principal')
    num, num_rows = export(values.records, values.out, values.kind)
    print(f'wrote {num} {values.kind} of {num_rows} rows to {values.out}')
  except (ValueError, OSError) as error:
    print(f'error: {error}', file=sys.stderr)
    sys.exit(2)


if __name__ == '__main__':
  path_flags.DEFINE_path(
    'records', None, 'File of the records of a server.', required=True
  )
  path_flags.DEFINE_path('out', None, 'export: JSONL file to write.')
  flags.DEFINE_enum(
    'kind',
    'pairs',
    KINDS,
    'export: the kind of each line: pairs (a chosen and a rejected answer) or'
    ' labels (an answer and its thumb).',
  )
  flags.DEFINE_string(
    'principal', None, "delete: whose feedback; '' without keys."
  )
  app.run(main)
