"""The flags of serve.py that are made from the fields of dataclasses.

    group = flags_lib.Group(
      config=engine_config.EngineConfig, prefix='engine.', ways=('prompt',)
    )
    group.define()  # --engine.page_size and others
    config = engine_config.EngineConfig(**group.given())

A field is a flag unless its metadata say `flag: False`. The help of the flag is
the `help` of the metadata and the default of the field, so neither is written
twice. The flag of a field with `is_path` in its metadata replaces ~ and
$VARIABLES.
"""

import dataclasses
import typing
from typing import Any

from absl import flags

from checks import path_flags


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
  """One flag for each field of a dataclass."""

  config: type  # a dataclass
  prefix: str = ''  # in front of the name of the field
  # Ways of asking for which the flags matter, such as 'prompt' for --prompt.
  ways: tuple[str, ...]
  default_words: str = '{}'  # how the help states the default of a field

  @property
  def fields(self) -> dict[str, dataclasses.Field]:
    """Returns the field of each flag, by the name of the flag."""
    return {
      self.prefix + field.name: field
      for field in dataclasses.fields(self.config)
      if field.metadata.get('flag', True)
    }

  def define(self, values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines the flags; the value of a flag that is not given is None."""
    flags.disclaim_key_flags()  # --help lists them as flags of the caller
    for name, field in self.fields.items():
      _definer(field)(name, None, self._help(field), flag_values=values)

  def given(self, values: flags.FlagValues = flags.FLAGS) -> dict[str, Any]:
    """Returns the fields that were set by a flag, by name."""
    found = {}
    for name, field in self.fields.items():
      if (value := values[name].value) is not None:
        found[field.name] = tuple(value) if isinstance(value, list) else value
    return found

  def _help(self, field: dataclasses.Field) -> str:
    text = field.metadata['help']
    if field.default is None or field.default in ((), ''):
      return text  # the text says what happens without the flag
    default = str(field.default)
    if isinstance(field.default, bool):
      default = default.lower()  # as a flag spells it
    return f'{text} Default: {self.default_words.format(default)}.'


def _definer(field: dataclasses.Field) -> Any:
  """Returns the absl function that defines a flag of the field's type."""
  kinds = {
    bool: flags.DEFINE_bool,
    int: flags.DEFINE_integer,
    float: flags.DEFINE_float,
    str: flags.DEFINE_string,
    tuple[int, ...]: flags.DEFINE_multi_integer,
    tuple[str, ...]: flags.DEFINE_multi_string,
  }
  kind: Any = field.type
  # `int | None` is the type of a field whose flag is an integer.
  options = [each for each in typing.get_args(kind) if each is not type(None)]
  if type(None) in typing.get_args(kind) and len(options) == 1:
    (kind,) = options
  if field.metadata.get('is_path'):
    assert kind is str, field
    return path_flags.DEFINE_path
  if kind not in kinds:
    raise TypeError(
      f'{field.name}: got a field of type {kind}, expected one of'
      f' {", ".join(map(str, kinds))}; or set flag=False in its metadata'
    )
  return kinds[kind]
