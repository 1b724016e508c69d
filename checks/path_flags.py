"""Absl flags whose values are paths; see `checks.paths`."""

from typing import Any

from absl import flags

from checks import paths


class _Parser(flags.ArgumentParser):
  """Replaces ~ and $VARIABLES in the value of one flag."""

  syntactic_help = 'a path; ~ and $VARIABLES are replaced'

  def __init__(self, name: str):
    self._name = f'--{name}'

  def parse(self, argument: str) -> str:
    """Returns the path; absl reports a ValueError with the flag's name."""
    return paths.expanded(self._name, argument)


def DEFINE_path(
  name: str,
  default: str | None,
  help_text: str,
  *,
  flag_values: flags.FlagValues = flags.FLAGS,
  **options: Any,
) -> flags.FlagHolder:
  """Defines a flag that holds a path, as `flags.DEFINE_string` does.

  Args:
    name: name of the flag.
    default: its value if it is not given; ~ and $VARIABLES are replaced, too.
    help_text: for --help.
    flag_values: the registry.
    **options: further arguments of `flags.DEFINE`, such as `required`.
  """
  flags.disclaim_key_flags()  # --help lists it as a flag of the caller
  return flags.DEFINE(
    _Parser(name), name, default, help_text, flag_values, **options
  )
