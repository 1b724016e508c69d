"""Sizes of memory in flags, such as 2GiB. Imports no JAX."""

import re

_SIZE = re.compile(r'(\d+(?:\.\d+)?) *(|[KMGT]i?)B?', re.IGNORECASE)


def num_bytes(name: str, text: str) -> int:
  """Returns the bytes of a size such as '2GiB' or '500 MB'.

  Args:
    name: of the flag.
    text: its value.

  Raises:
    ValueError: it is no size, or 0.
  """
  found = _SIZE.fullmatch(text.strip())
  if not found or not float(found[1]):
    raise ValueError(
      f'{name}: got {text!r}, expected a size such as 2GiB or 500MB'
    )
  unit = found[2].upper()
  base = 1024 if unit.endswith('I') else 1000
  return int(float(found[1]) * base ** ' KMGT'.index(unit[:1] or ' '))
