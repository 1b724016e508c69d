"""Parses --config and its overrides; a mistake is one line that says the fix.

`ml_collections.config_flags` does most of the work: it loads the experiment
file, calls its `get_config` and sets the fields named by
`--config.<field>=<value>`. Its own errors are tracebacks, or name no
alternatives.

Fields of a frozen dataclass (an optimizer's rule, an objective) are set here,
because a frozen value is replaced, not changed:

    --config.optimizer.rule=lion         one of the field's `choices`, with
                                         the defaults of that class
    --config.optimizer.rule.beta1=0.95   one field of it

The order of these flags does not matter: a choice comes before its fields. They
may be in a file, --flagfile=FILE, one a line. --config=list lists experiments.
"""

from collections.abc import Iterator
import contextlib
import dataclasses
import re
import sys
from typing import Any

from absl import flags
from ml_collections import config_flags

from checks import expect, paths
from training import experiment_files

# Error texts of the libraries about a wrong value, and the values they expect.
_EXPECTED = (
  (r'invalid literal for int\(\)', 'an integer'),
  (r'could not convert string to float', 'a number'),
  (r"\('Non-boolean argument", 'true or false'),
)
_OVERRIDE = re.compile(
  r'(?P<flag>--?config\.(?P<path>[\w.\[\]]+))(=(?P<text>.*))?$'
)
_PARSERS: dict[Any, flags.ArgumentParser] = {
  bool: flags.BooleanParser(),
  float: flags.FloatParser(),
  int: flags.IntegerParser(),
  str: flags.ArgumentParser(),
}
_TYPE_NAMES = {
  bool: 'True or False',
  float: 'a number',
  int: 'an integer',
  str: 'a string',
}


class FlagError(ValueError):
  """A flag with an error; the message is one line for the user."""


def define_config(help_string: str) -> flags.FlagHolder:
  """Defines --config, the file of an experiment."""
  flags.disclaim_key_flags()  # --help lists it as a flag of the caller
  # The library reads a --flagfile when it defines a flag, and fails with a
  # traceback if there is no such file. `parse` reports the file instead.
  with _command_line(sys.argv[:1]):
    return config_flags.DEFINE_config_file('config', help_string=help_string)


def parse(
  argv: list[str], flag_values: flags.FlagValues = flags.FLAGS
) -> list[str]:
  """Parses absl flags, `--config` among them; returns the other arguments.

  Raises:
    FlagError: got / expected / fix, in one line.
  """
  try:
    argv = _with_paths(with_flagfiles(argv, flag_values))
    _refuse_negative_index(argv)
    own = _of_frozen_values(argv)
    kept = [arg for arg in argv if arg not in own]
    with _command_line(kept):
      rest = flag_values(kept)
    # A file that cannot be loaded is reported when the value is first used.
    _ = getattr(flag_values.config, 'name', None)
    for arg in own:
      _replace(flag_values.config, arg)
    return rest
  except flags.Error as error:
    raise FlagError(_last_line(str(error))) from None
  except (KeyError, IndexError) as error:
    raise FlagError(_unknown_field(argv) or _last_line(str(error))) from None
  except (OSError, TypeError, ValueError, AttributeError) as error:
    raise FlagError(_last_line(str(error))) from None


def with_flagfiles(
  argv: list[str], flag_values: flags.FlagValues = flags.FLAGS
) -> list[str]:
  """Returns the arguments, with each --flagfile replaced by its flags.

  Raises:
    flags.Error: a file cannot be read.
  """
  rest = flag_values.read_flags_from_files(argv[1:], force_gnu=False)
  return [argv[0], *rest]


def asks_for_list(argv: list[str]) -> bool:
  """Returns whether --config asks for the list of experiments."""
  return any(value == 'list' for _, value in _values_of_config(argv))


def config_flags_in(argv: list[str]) -> list[str]:
  """Returns --config and its overrides in `argv`, each as NAME=VALUE."""
  found, values = [], dict(_values_of_config(argv))
  for i, arg in enumerate(argv[1:], 1):
    name = arg.partition('=')[0].lstrip('-')
    if i in values:
      found.append(f'--config={values[i]}')
    elif name.startswith('config.'):
      # An override may stand in two arguments, too.
      has_value = '=' in arg or i + 1 == len(argv)
      found.append(
        f'--{arg.lstrip("-")}' + ('' if has_value else f'={argv[i + 1]}')
      )
  return found


def _values_of_config(argv: list[str]) -> list[tuple[int, str]]:
  """Returns the index and the value of every --config in `argv`."""
  found = []
  for i, arg in enumerate(argv):
    name, equals, value = arg.partition('=')
    if name not in ('--config', '-config'):
      continue
    if equals:
      found.append((i, value))
    elif i + 1 < len(argv):
      found.append((i + 1, argv[i + 1]))
  return found


def _with_paths(argv: list[str]) -> list[str]:
  """Returns `argv` with ~ and $VARIABLES of --config replaced.

  Raises:
    ValueError: there is no such file; the error names the experiments.
  """
  argv = list(argv)
  for i, value in _values_of_config(argv):
    path, colon, variant = value.partition(':')
    path = paths.expanded('--config', path)
    experiment_files.check(path, variant)
    before = argv[i].removesuffix(value)
    argv[i] = f'{before}{path}{colon}{variant}'
  return argv


def _of_frozen_values(argv: list[str]) -> list[str]:
  """Returns the overrides of frozen values, choices before their fields."""
  config, found = None, []
  for arg in argv[1:]:
    if not (match := _OVERRIDE.match(arg)):
      continue
    # Loaded only if needed, and before the library changes the config.
    config = config or _without_overrides(argv)
    holder, names = config, match.group('path').split('.')
    for name in names:
      value = getattr(holder, name, None)
      if _is_frozen(value):
        found.append(arg)
        break
      holder = value
  return sorted(found, key=lambda arg: arg.partition('=')[0].count('.'))


def _is_frozen(value: Any) -> bool:
  # dataclasses has no public function for it.
  params = getattr(type(value), '__dataclass_params__', None)
  return params is not None and params.frozen


def _replace(config: Any, arg: str) -> None:
  """Sets one field of a frozen value, or the value itself, in `config`."""
  match = _OVERRIDE.match(arg)
  assert match
  flag, text, path = match['flag'], match['text'], match['path']
  if text is None:
    raise FlagError(f'{flag}: got no value, expected one, as in {flag}=VALUE')
  if words := _lost(config, path):
    raise FlagError(f'{flag}: {words}')
  holders = _holders(config, path)
  name = path.split('.')[-1]
  _put(holders, path, _parsed(holders[-1], name, flag, text))


def _holders(config: Any, path: str) -> list[Any]:
  """Returns the values on a path to a field, without the last one."""
  holders = [config]
  for name in path.split('.')[:-1]:
    holders.append(getattr(holders[-1], name))
  return holders


def _put(holders: list[Any], path: str, value: Any) -> None:
  """Sets the field of a path, given the values on the way to it."""
  # From the inside out, to the first holder that can be changed.
  names = path.split('.')
  for holder, name in zip(reversed(holders), reversed(names), strict=True):
    if not _is_frozen(holder):
      setattr(holder, name, value)
      return
    value = dataclasses.replace(holder, **{name: value})


def set_field(config: Any, path: str, value: Any) -> None:
  """Sets a field by its dotted name, as --config.PATH=VALUE would.

  Args:
    config: an experiment. Changed.
    path: as optimizer.peak_lr.
    value: of the field's type. A choice of a field, as optimizer.rule, is given
      by its name.

  Raises:
    ValueError: there is no such field, or the value is of another type.
  """
  if '[' in path:
    raise ValueError(f'{path}: got an index, expected names of fields only')
  if words := _lost(config, path):
    raise ValueError(f'{path}: {words}')
  holders, name = _holders(config, path), path.split('.')[-1]
  now = getattr(holders[-1], name)
  (field,) = (f for f in dataclasses.fields(holders[-1]) if f.name == name)
  if field.metadata.get('choices'):
    _put(holders, path, _parsed(holders[-1], name, path, str(value)))
    return
  wanted = float if field.type is float else type(now)
  if wanted not in _PARSERS:
    raise ValueError(
      f'{path}: got {value!r}, expected none: it is chosen in the file of an'
      ' experiment; name one of its fields'
    )
  if wanted is float and type(value) is int:
    value = float(value)
  if type(value) is not wanted:
    raise ValueError(
      f'{path}: got {value!r}, expected {_TYPE_NAMES[wanted]}, as its value'
      f' {now!r} is'
    )
  _put(holders, path, value)


def _parsed(holder: Any, name: str, flag: str, text: str) -> Any:
  """Returns the value that a flag's text means for a field."""
  (field,) = (f for f in dataclasses.fields(holder) if f.name == name)
  if choices := field.metadata.get('choices'):
    if text not in choices:
      raise FlagError(
        f'{flag}: got {text!r}, expected one of'
        f' {", ".join(choices)}{expect.meant(text, choices)}'
      )
    return choices[text]()
  value_type = type(getattr(holder, name))
  # The annotation first: the value of a float field may be written as 1.
  parser = _PARSERS.get(field.type) or _PARSERS.get(value_type)
  if parser is None:
    raise FlagError(
      f'{flag}: got a value, expected none: it is chosen in the file of an'
      ' experiment; write one of your own, or set one of its fields'
    )
  try:
    return parser.parse(text)
  except (TypeError, ValueError) as error:
    raise FlagError(_last_line(f'{flag}={text}: {error}')) from None


def _refuse_negative_index(argv: list[str]) -> None:
  # The library takes an index below 0 from the end, and then sets the field
  # under a name that does not exist.
  for arg in argv[1:]:
    if match := re.match(r'--?config\.[^=]*\[-\d+\]', arg):
      raise FlagError(
        f'{match.group(0)}: got an index below 0, expected one counted from 0'
      )


def _unknown_field(argv: list[str]) -> str | None:
  """Returns an error about the first override of an unknown field, or None."""
  config = _without_overrides(argv)
  for arg in argv[1:]:
    match = re.match(r'--?config\.([\w.\[\]]+)', arg)
    if match and (words := _lost(config, match.group(1))):
      return f'{match.group(0)}: {words}'
  return None


def _lost(node: Any, path: str) -> str:
  """Returns an error about a path such as 'data.sources[5].weight', or ''."""
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
        f'got the unknown field {name!r}, expected one of'
        f' {", ".join(fields)}{expect.meant(name, fields)}'
        if fields
        else f'got the unknown field {name!r}, expected none: it has no fields'
      )
    node = getattr(node, name)
  return ''


def _without_overrides(argv: list[str]) -> Any:
  """Returns the experiment that argv names, without overrides."""
  values = flags.FlagValues()
  config = config_flags.DEFINE_config_file('config', flag_values=values)
  kept = [
    arg
    for i, arg in enumerate(argv)
    if re.match(r'--?config(=|$)', arg)
    or (i and re.match(r'--?config$', argv[i - 1]))
  ]
  with _command_line([argv[0], *kept]):
    values([argv[0], *kept])
  return config.value


@contextlib.contextmanager
def _command_line(argv: list[str]) -> Iterator[None]:
  """Lets config_flags see `argv`: it looks for overrides in sys.argv."""
  given, sys.argv = sys.argv, argv
  try:
    yield
  finally:
    sys.argv = given


def _last_line(message: str) -> str:
  """Returns the error alone, if the library put it into a traceback."""
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
