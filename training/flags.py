"""Makes what is wrong with a --config flag one line that says what is right.

`ml_collections.config_flags` does the work: it loads the experiment file, calls
its `get_config` and sets the fields named by `--config.<field>=<value>`. Its
own complaints are tracebacks, or name no alternatives.
"""

import dataclasses
import re
import sys
from typing import Any

from absl import flags
from ml_collections import config_flags

# What the libraries say of a wrong value, and what they mean.
_EXPECTED = (
  (r'invalid literal for int\(\)', 'an integer'),
  (r'could not convert string to float', 'a number'),
  (r"\('Non-boolean argument", 'true or false'),
)


class FlagError(ValueError):
  """A flag that cannot be used; the message is for the user."""


def parse(
  argv: list[str], flag_values: flags.FlagValues = flags.FLAGS
) -> list[str]:
  """Parses absl flags like `flags.FLAGS(argv)`, `--config` among them.

  Returns:
    What is left of argv.

  Raises:
    FlagError: got / expected / fix, in one line.
  """
  try:
    _refuse_negative_index(argv)
    rest = flag_values(argv)
    # A file that cannot be loaded is reported when the value is first used.
    _ = getattr(flag_values.config, 'name', None)
    return rest
  except flags.Error as error:
    raise FlagError(_last_line(str(error))) from None
  except (KeyError, IndexError) as error:
    raise FlagError(_unknown_field(argv) or _last_line(str(error))) from None
  except (OSError, TypeError, ValueError, AttributeError) as error:
    raise FlagError(_last_line(str(error))) from None


def _refuse_negative_index(argv: list[str]) -> None:
  # The library counts from the end, and sets what then has another name.
  for arg in argv[1:]:
    if match := re.match(r'--?config\.[^=]*\[-\d+\]', arg):
      raise FlagError(
        f'{match.group(0)}: got an index below 0, expected one counted from 0'
      )


def _unknown_field(argv: list[str]) -> str | None:
  """Finds the override that names no field; says which there are."""
  config = _without_overrides(argv)
  for arg in argv[1:]:
    match = re.match(r'--?config\.([\w.\[\]]+)', arg)
    if match and (words := _lost(config, match.group(1))):
      return f'{match.group(0)}: {words}'
  return None


def _lost(node: Any, path: str) -> str:
  """Says where 'data.sources[5].weight' leads nowhere; '' if it leads."""
  for index, name in re.findall(r'(\[\d+\])|(\w+)', path):
    if index:
      length = len(node) if isinstance(node, tuple | list) else 0
      if int(index[1:-1]) >= length:
        most = (
          f'at most [{length - 1}]' if length else 'none: it has no entries'
        )
        return f'got the index {index}, expected {most}'
      node = node[int(index[1:-1])]
      continue
    fields = (
      [field.name for field in dataclasses.fields(node)]
      if dataclasses.is_dataclass(node)
      else []
    )
    if name not in fields:
      return (
        f'got the unknown field {name!r}, expected one of {", ".join(fields)}'
        if fields
        else f'got the unknown field {name!r}, expected none: it has no fields'
      )
    node = getattr(node, name)
  return ''


def _without_overrides(argv: list[str]) -> Any:
  """Loads the experiment named in argv as its file has it."""
  values = flags.FlagValues()
  config = config_flags.DEFINE_config_file('config', flag_values=values)
  kept = [
    arg
    for i, arg in enumerate(argv)
    if re.match(r'--?config(=|$)', arg)
    or (i and re.match(r'--?config$', argv[i - 1]))
  ]
  # The library looks for overrides in sys.argv, whatever it is given.
  given, sys.argv = sys.argv, [argv[0], *kept]
  try:
    values([argv[0], *kept])
  finally:
    sys.argv = given
  return config.value


def _last_line(message: str) -> str:
  """The error itself, where the library wraps it into a traceback."""
  lines = [line for line in message.split('\n') if line.strip()]
  if len(lines) <= 1:
    if match := re.search(r'field (\S+) is not supported for over', message):
      return (
        f'--{match.group(1)}: got a value, expected none: it is a function,'
        ' chosen in the file of an experiment; write one of your own'
      )
    for pattern, expected in _EXPECTED:
      if match := re.search(pattern, message):
        before = message[: match.start()].rstrip(': ')
        return f'{before}: expected {expected}'
    return message.strip()
  return re.sub(r'^[\w.]+(Error|Exception): ', '', lines[-1])
