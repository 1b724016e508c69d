"""Makes, lists, changes and revokes keys of a server, in its records.

    python -m inference.server.keys create --records=FILE --name=alice
    python -m inference.server.keys create --records=FILE --name=me --role=admin
    python -m inference.server.keys create --records=FILE --name=alice \\
      --requests_per_minute=60 --tokens_per_minute=90000 --budget=20 --weight=2
    python -m inference.server.keys list --records=FILE
    python -m inference.server.keys change --records=FILE \\
      --id=key_0123456789ab --budget=50 --unlimited=tokens_per_minute
    python -m inference.server.keys revoke --records=FILE --id=key_0123456789ab

The server may run meanwhile: it reads a change within a second. The text of a
key is printed once, and is not kept. Keys of one name share the cached prompts
and the turn of that name, so that a key can be replaced while the old one is
used. A change of limits keeps the key: requests, tokens and money that it has
used still count.
"""

import datetime
import pathlib
import sys

from absl import app, flags

from checks import path_flags
from inference.server.access import keys
from inference.server.records import database

_LIMITS = (
  'requests_per_minute',
  'tokens_per_minute',
  'max_concurrent',
  'budget',
)
_USAGE = (
  'expected one of create, list, change, revoke, as in create --records=FILE'
  ' --name=NAME'
)


def main(argv: list[str]) -> None:
  """Runs the command of the argument; errors are one line."""
  ways = {
    'create': _create,
    'list': _list,
    'change': _change,
    'revoke': _revoke,
  }
  if len(argv) != 2 or argv[1] not in ways:
    raise app.UsageError(f'got arguments {argv[1:]}, {_USAGE}')
  values = flags.FLAGS
  try:
    if argv[1] != 'create' and not pathlib.Path(values.records).is_file():
      raise ValueError(
        f'--records: got {values.records}, which does not exist, expected the'
        ' file of a server; `create` makes one'
      )
    records = database.Database(values.records, tables=[keys.TABLES])
    try:
      ways[argv[1]](records, values)
    finally:
      records.close()
  except (ValueError, OSError) as error:
    print(f'error: {error}', file=sys.stderr)
    sys.exit(2)


def _create(records: database.Database, values: flags.FlagValues) -> None:
  if values.name is None:
    raise ValueError('--name: got none, expected the name of the owner')
  fields = {name: values[name].value for name in _LIMITS}
  key, text = records.submit(
    lambda connection: keys.create(
      connection,
      name=values.name,
      is_admin=values.role == 'admin',
      allows_feedback=values.allows_feedback,
      weight=values.weight,
      **fields,
    )
  ).result()
  print(f'{key.id} of {key.name} ({values.role}); it is not shown again:')
  print(text)


def _list(records: database.Database, values: flags.FlagValues) -> None:
  del values
  head = 'id', 'name', 'role', 'created', 'revoked', 'feedback', 'limits'
  lines: list[tuple[str, ...]] = [head]
  for row in records.submit(keys.rows).result():
    limits = [
      f'{name}={row[name]:g}' for name in _LIMITS if row[name] is not None
    ]
    lines.append(
      (
        row['id'],
        row['name'],
        'admin' if row['is_admin'] else 'user',
        _day(row['created_at']),
        _day(row['revoked_at']),
        'yes' if row['allows_feedback'] else 'no',
        ' '.join([*limits, f'weight={row["weight"]:g}']),
      )
    )
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  for line in lines:
    padded = map(str.ljust, line, widths)
    print('  '.join(padded).rstrip())


def _change(records: database.Database, values: flags.FlagValues) -> None:
  """Changes the fields whose flags are given."""
  key_id = _given_id(values)
  fixed = [name for name in ('name', 'role') if values[name].present]
  if fixed:
    raise ValueError(
      f'--{fixed[0]}: got one for a key that exists, expected none: the ledger'
      ' and the admin routes trust it; create a new key and revoke this one'
    )
  unlimited = values.unlimited
  if unknown := sorted(set(unlimited) - set(_LIMITS)):
    raise ValueError(
      f'--unlimited: got {unknown[0]}, expected names of {", ".join(_LIMITS)}'
    )
  given = [
    name
    for name in (*_LIMITS, 'weight', 'allows_feedback')
    if values[name].present
  ]
  if both := sorted(set(given) & set(unlimited)):
    raise ValueError(
      f'--unlimited: got {both[0]}, which --{both[0]} limits, expected one of'
      ' the two flags'
    )
  fields = {name: values[name].value for name in given}
  fields |= dict.fromkeys(unlimited)
  if not fields:
    raise ValueError(
      'change: got no new value, expected a limit, --weight, --allows_feedback'
      ' or --unlimited'
    )
  key = records.submit(
    lambda connection: keys.change(connection, key_id, **fields)
  ).result()
  new = ' '.join(
    f'{name}={getattr(key, name)}' if name not in unlimited else f'no {name}'
    for name in fields
  )
  print(f'changed {key.id} of {key.name}: {new}')


def _revoke(records: database.Database, values: flags.FlagValues) -> None:
  key_id = _given_id(values)
  records.submit(keys.revoke, key_id).result()
  print(f'revoked {key_id}')


def _given_id(values: flags.FlagValues) -> str:
  if values.id is None:
    raise ValueError('--id: got none, expected a key id; `list` prints the ids')
  return values.id


def _day(seconds: float | None) -> str:
  if seconds is None:
    return '-'
  return f'{datetime.datetime.fromtimestamp(seconds, datetime.UTC):%Y-%m-%d}'


def _define_flags() -> None:
  path_flags.DEFINE_path(
    'records', None, 'File of the records of a server.', required=True
  )
  flags.DEFINE_string('name', None, 'create: name of the owner of the key.')
  flags.DEFINE_enum(
    'role', 'user', ['user', 'admin'], 'Role; an admin may use /admin.'
  )
  flags.DEFINE_bool(
    'allows_feedback', False, 'Whether feedback of this key may be stored.'
  )
  for name, text in (
    ('requests_per_minute', 'Requests per minute.'),
    ('tokens_per_minute', 'Tokens per minute, of prompts and completions.'),
    ('max_concurrent', 'Requests that may be open at once.'),
  ):
    flags.DEFINE_integer(name, None, f'{text} If not given: no limit.')
  flags.DEFINE_float(
    'budget',
    None,
    'Money that the key may spend, in the currency of --server.price_prompt and'
    ' the other prices. If not given: no limit.',
  )
  flags.DEFINE_float(
    'weight',
    1.0,
    'Share of the engine: twice the weight gets twice the tokens, while others'
    ' wait too.',
  )
  flags.DEFINE_list(
    'unlimited', [], 'change: names of limits that the key has no longer.'
  )
  flags.DEFINE_string('id', None, 'Id of the key to change or to revoke.')


if __name__ == '__main__':
  _define_flags()
  app.run(main)
