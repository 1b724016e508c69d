"""Experiments from the JSON values that `Experiment.to_dict` returns.

A run.json and the recipe of a frozen directory hold such values. Only functions
and classes of this project are looked up by their names.
"""

from collections import abc
from collections.abc import Callable, Mapping
import dataclasses
import pkgutil
import types
import typing
from typing import Any

from checks import expect
from training import experiment as experiment_lib

# Packages whose names an experiment may have; training may import them all.
_PACKAGES = ('data', 'evals', 'models', 'parallel', 'text', 'training')


def from_dict(values: Mapping[str, Any]) -> experiment_lib.Experiment:
  """Returns the experiment of JSON values.

  A missing field gets its default: the field is newer than the record.

  Raises:
    ValueError: a field is unknown, or a name is not one of this project.
  """
  return _dataclass(experiment_lib.Experiment, values, 'config')


def _dataclass(cls: type, values: Any, where: str) -> Any:
  if not isinstance(values, Mapping):
    raise ValueError(
      f'{where}: got {expect.shown(values)}, expected the fields of'
      f' {cls.__name__}'
    )
  values = dict(values)
  if 'type' in values and dataclasses.is_dataclass(cls):
    # The record of a frozen dataclass names its class.
    cls = _named(values.pop('type'), f'{where}.type')
  known = {f.name: f for f in dataclasses.fields(cls) if f.init}
  if unknown := sorted(values.keys() - known):
    raise ValueError(
      f'{where}: got the fields {", ".join(unknown)}, expected fields of'
      f' {cls.__name__}: {", ".join(known)}; use the code that wrote the record'
    )
  hints = typing.get_type_hints(cls)
  return cls(
    **{
      name: _value(hints[name], value, f'{where}.{name}')
      for name, value in values.items()
    }
  )


def _value(hint: Any, value: Any, where: str) -> Any:
  """Returns a value of a type hint."""
  origin, args = typing.get_origin(hint), typing.get_args(hint)
  if origin in (types.UnionType, typing.Union):
    if value is None:
      return None
    kinds = [arg for arg in args if arg is not types.NoneType]
    return _value(kinds[0], value, where)
  if isinstance(value, Mapping) and 'type' in value:
    return _dataclass(_named(value['type'], f'{where}.type'), value, where)
  if dataclasses.is_dataclass(hint):
    return _dataclass(typing.cast(type, hint), value, where)
  if isinstance(value, list):
    return _sequence(origin or hint, args, value, where)
  if isinstance(value, str) and _is_callable(hint):
    return _named(value, where)
  if isinstance(value, Mapping):
    inner = args[1] if len(args) == 2 else Any
    return {k: _value(inner, v, f'{where}.{k}') for k, v in value.items()}
  return value


def _sequence(origin: Any, args: tuple, values: list, where: str) -> Any:
  if len(args) == len(values) and Ellipsis not in args:
    hints = list(args)  # a tuple of fixed length
  else:
    hints = [args[0] if args else Any] * len(values)
  found = [
    _value(hint, value, f'{where}[{i}]')
    for i, (hint, value) in enumerate(zip(hints, values, strict=True))
  ]
  return found if origin is list else tuple(found)


def _is_callable(hint: Any) -> bool:
  return hint is Callable or typing.get_origin(hint) is abc.Callable


def _named(name: Any, where: str) -> Any:
  """Returns the function or class of a qualified name.

  Raises:
    ValueError: it is not one of this project's.
  """
  module, _, attribute = str(name).rpartition('.')
  if module.partition('.')[0] not in _PACKAGES:
    raise ValueError(
      f'{where}: got {expect.shown(name)}, expected a function or class of this'
      f' project, in {", ".join(_PACKAGES)}; train the experiment file in place'
      ' of the record'
    )
  try:
    return pkgutil.resolve_name(f'{module}:{attribute}')
  except (ImportError, AttributeError) as error:
    raise ValueError(
      f'{where}: got {expect.shown(name)}, which this code does not have'
      f' ({error}); use the code that wrote the record'
    ) from None
