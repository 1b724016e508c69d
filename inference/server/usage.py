"""The usage and cost of the requests of a server, from its records.

    python -m inference.server.usage --records=FILE

Prints totals per key, per model and per day (UTC), and for each model the day
on which all inference with it had computed as many FLOPs as its training. The
FLOPs of the training are in the manifest. The server may run.
"""

from collections.abc import Sequence
import datetime
import pathlib
import sqlite3
import sys

from absl import app, flags

from checks import path_flags
from inference.server.access import keys
from inference.server.records import database, ledger

# Columns of every table, with their SQL.
_SUMS = {
  'requests': 'count(*)',
  'prompt': 'sum(prompt_tokens)',
  'cached': 'sum(cached_tokens)',
  'completion': 'sum(completion_tokens)',
  'accepted': 'sum(accepted_tokens)',  # drafts
  'rejected': 'sum(rejected_tokens)',
  'FLOPs': 'sum(flops)',
  'KV byte-s': 'sum(kv_byte_seconds)',
  'price': f'sum(price_nanos) / {ledger.NANOS}.0',
}
_DAY = "date(opened_at, 'unixepoch')"
_GROUPS = {
  'key': ('principal', 'key_id'),
  'model': ('model', 'substr(weights_digest, 1, 16)'),
  'day': (_DAY,),
  'outcome': ('outcome',),
}
_SETTLED = 'FROM ledger WHERE outcome IS NOT NULL'


def report(connection: sqlite3.Connection) -> str:
  """Returns the tables and the comparison with training, as text."""
  parts = [
    _table(connection, title, columns) for title, columns in _GROUPS.items()
  ]
  (num_open,) = connection.execute(
    'SELECT count(*) FROM ledger WHERE outcome IS NULL'
  ).fetchone()
  if num_open:
    parts.append(f'{num_open} requests are open; they are not in the tables')
  return '\n\n'.join([*parts, *map(_compared, passed(connection))])


def passed(connection: sqlite3.Connection) -> list[sqlite3.Row]:
  """Returns each served model, with its FLOPs and the day that passed them.

  Columns: name, weights_digest, training_flops, flops, day. The day is None
  while inference has computed less than training did.
  """
  return connection.execute(
    f"""
    WITH days AS (
      SELECT weights_digest, {_DAY} AS day, sum(flops) AS flops {_SETTLED}
      GROUP BY weights_digest, day
    ), sums AS (
      SELECT weights_digest, day, sum(flops) OVER (
        PARTITION BY weights_digest ORDER BY day
      ) AS flops FROM days
    )
    SELECT name, weights_digest, training_flops,
      coalesce(max(sums.flops), 0.0) AS flops,
      min(CASE WHEN sums.flops >= training_flops THEN day END) AS day
    FROM models LEFT JOIN sums USING (weights_digest)
    GROUP BY weights_digest ORDER BY served_at
    """
  ).fetchall()


def _table(
  connection: sqlite3.Connection, title: str, columns: Sequence[str]
) -> str:
  group = ', '.join(columns)
  sums = ', '.join(_SUMS.values())
  found = connection.execute(
    f'SELECT {group}, {sums} {_SETTLED} GROUP BY {group} ORDER BY {group}'
  ).fetchall()
  num = len(columns)
  lines = [[f'per {title}', *[''] * (num - 1), *_SUMS]]
  lines += [[_written(value) for value in row] for row in found]
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  return '\n'.join(
    '  '.join(
      cell.ljust(width) if i < num else cell.rjust(width)
      for i, (cell, width) in enumerate(zip(line, widths, strict=True))
    )
    for line in lines
  )


def _written(value: str | int | float) -> str:
  if isinstance(value, float):
    return f'{value:.6g}'
  return f'{value:,}' if isinstance(value, int) else value or '-'


def _compared(row: sqlite3.Row) -> str:
  name = f'{row["name"]} ({row["weights_digest"][:16]})'
  trained, used = row['training_flops'], row['flops']
  if not trained:
    return f'{name}: the manifest does not have the cost of its training'
  share = f'{used:.3g} FLOPs, {used / trained:.2%} of the {trained:.3g} of'
  if row['day'] is None:
    return f'{name}: inference has computed {share} its training'
  return (
    f'{name}: inference passed training on {row["day"]}; it has computed'
    f' {share} the training'
  )


def main(argv: list[str]) -> None:
  """Prints the report; errors are one line."""
  if len(argv) > 1:
    raise app.UsageError(f'got arguments {argv[1:]}, expected none')
  path = flags.FLAGS.records
  try:
    if not pathlib.Path(path).is_file():
      raise ValueError(
        f'--records: got {path}, which does not exist, expected the file that a'
        ' server was given with --records'
      )
    records = database.Database(path, tables=[keys.TABLES, ledger.TABLES])
    try:
      now = datetime.datetime.now(datetime.UTC)
      print(f'{path} at {now:%Y-%m-%d %H:%M} UTC\n')
      print(records.submit(report).result())
    finally:
      records.close()
  except (ValueError, OSError) as error:
    print(f'error: {error}', file=sys.stderr)
    sys.exit(2)


if __name__ == '__main__':
  path_flags.DEFINE_path(
    'records', None, 'File of the records of a server.', required=True
  )
  app.run(main)
