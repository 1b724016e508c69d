"""Paths as their user writes them: ~ and $VARIABLES are replaced.

A shell replaces neither in `--workdir=~/run`, and no shell sees a value in the
file of an experiment. Every path that a user gives passes through `expanded`.
"""

import os
import re

from checks import expect

_VARIABLE = re.compile(r'\$(\w+|\{\w+\})')


def named(flag: str, text: str) -> tuple[str, str]:
  """Returns the name and the path of a text NAME=PATH.

  Args:
    flag: the flag as its user writes it, for the error.
    text: the text; spaces around both parts are removed.

  Raises:
    ValueError: the text has another form, or the path is not `expanded`.
  """
  name, _, path = (part.strip() for part in text.partition('='))
  if not (name and path and name.isprintable()):
    raise ValueError(
      f'{flag}: got {expect.shown(text)}, expected NAME=PATH with a printable'
      ' name, and commas between several'
    )
  return name, expanded(flag, path)


def expanded(name: str, path: str | os.PathLike) -> str:
  """Returns a path with its ~, ~USER and $VARIABLES replaced.

  A path that contains a $ and exists as written is returned unchanged.

  Args:
    name: the flag or the field as its user writes it, for the error.
    path: the path as the user wrote it; '' stays ''.

  Raises:
    ValueError: there is no such user or variable.
  """
  text = os.fspath(path)
  replaced = os.path.expanduser(text)
  if replaced.startswith('~'):
    raise ValueError(
      f'{name}: got {text!r}, expected a home directory that is known; write'
      f' it out, or ./{text} for a file of that name'
    )
  if os.path.lexists(replaced):
    return replaced
  for variable in _VARIABLE.findall(replaced):
    if not os.environ.get(variable.strip('{}')):
      raise ValueError(
        f'{name}: got {text!r}, expected ${variable} to be set; set it, or'
        ' write the path out'
      )
  return os.path.expandvars(replaced)
