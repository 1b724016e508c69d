"""Price files: the price of an hour of a device, with its date and source.

    {"name": ..., "date": "2026-11-29", "source": ..., "currency": "USD",
     "device_hour": 2.69, "device": "NVIDIA H100 80GB HBM3"}

The device is a name of `hardware.peaks.DATASHEETS`, so a price comes with the
rates that it pays for. `experiments/prices/` has examples. Prices change: the
date and the source are printed with everything that is computed from a price.
"""

import dataclasses
import datetime
import json
import math
import os
import pathlib

from checks import expect
from hardware import peaks


@dataclasses.dataclass(frozen=True, kw_only=True)
class Price:
  """An hour of a device."""

  name: str
  date: str  # of the price, YYYY-MM-DD
  source: str
  currency: str
  device_hour: float
  device: str

  @property
  def peaks(self) -> peaks.Peaks:
    """Returns the rates of the device."""
    return peaks.DATASHEETS[self.device]

  def of_seconds(self, seconds: float) -> float:
    """Returns the price of `seconds` seconds of one device."""
    return seconds / 3600 * self.device_hour


def read(path: str | os.PathLike) -> Price:
  """Returns the price of a file.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it is not a price file, or a field is wrong.
  """
  text = pathlib.Path(path).read_text('utf-8')
  names = {field.name for field in dataclasses.fields(Price)}
  try:
    fields = json.loads(text)
  except ValueError as error:
    raise ValueError(
      f'--prices: got {path}, which is not JSON ({error}), expected an object'
      f' with {", ".join(sorted(names))}'
    ) from None
  if not isinstance(fields, dict) or set(fields) != names:
    got = sorted(fields) if isinstance(fields, dict) else fields
    raise ValueError(
      f'--prices: got {path} with {got}, expected {", ".join(sorted(names))}'
    )
  price = Price(**fields)
  for name in ('name', 'source', 'currency'):
    if not isinstance(fields[name], str) or not fields[name].strip():
      raise ValueError(
        f'--prices: got {name} = {fields[name]!r} in {path}, expected a text'
      )
  is_number = isinstance(price.device_hour, int | float)
  if not is_number or not 0 < price.device_hour < math.inf:
    raise ValueError(
      f'--prices: got device_hour = {price.device_hour!r} in {path}, expected'
      ' a price above 0'
    )
  try:
    datetime.date.fromisoformat(price.date)
  except (TypeError, ValueError):
    raise ValueError(
      f'--prices: got date = {price.date!r} in {path}, expected YYYY-MM-DD'
    ) from None
  expect.one_of('--prices: device', price.device, tuple(peaks.DATASHEETS))
  return price
