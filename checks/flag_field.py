"""Fields of dataclasses from which serve.py makes flags."""

import dataclasses
from typing import Any


def field(default: Any, text: str = '', **metadata: Any) -> Any:
  """Returns a dataclass field with the help text of its flag.

  Args:
    default: value of the field.
    text: help text of the flag; `inference.flags` adds the default to it.
    **metadata: further metadata, which `inference.flags` and its readers know,
      such as `is_path`.
  """
  return dataclasses.field(default=default, metadata={'help': text, **metadata})
