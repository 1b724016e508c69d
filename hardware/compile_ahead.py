"""Compiles a program for devices that are not here, and says what it takes.

    compiled = compile_ahead.compile(lowered)      # Program, or OutOfMemory
    roof = compile_ahead.roofline(flops, compiled.traffic, peaks, 'bfloat16')

A roofline (Williams et al. 2009): a step takes at least as long as its
products, its reads and writes of main memory, and what it sends over the links
each take by themselves at the device's peak. The largest of the three binds;
that the others hide behind it is the best case.
"""

import dataclasses
import math
import re
from typing import Any

from hardware import hlo, peaks as peaks_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
  """What the compiler says of a program; bytes of one device."""

  arguments: int
  outputs: int
  temporaries: int  # as allocated, gaps between them included
  aliased: int  # outputs that take the place of arguments
  peak: int  # most that is in use at a time; 0 where nobody says
  traffic: hlo.Traffic

  @property
  def allocated(self) -> int:
    """Bytes that the device must have for the program to be loaded."""
    return self.arguments + self.outputs - self.aliased + self.temporaries

  @property
  def in_use(self) -> int:
    """The peak where the compiler tells it, else what is allocated."""
    return self.peak or self.allocated


@dataclasses.dataclass(frozen=True, kw_only=True)
class OutOfMemory:
  """The compiler refused: the program does not fit its device."""

  needed: int  # bytes; 0 where the message does not say
  available: int
  message: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Roofline:
  """Least seconds of each resource, and the one that binds."""

  compute: float
  memory: float
  links: float

  @property
  def binds(self) -> str:
    """Which of them takes longest: compute, HBM or interconnect."""
    seconds = {
      'compute': self.compute,
      'HBM': self.memory,
      'interconnect': self.links,
    }
    return max(seconds, key=lambda name: seconds[name])

  @property
  def seconds(self) -> float:
    """The step at best: everything else hides behind what binds."""
    return max(self.compute, self.memory, self.links)


def compile(lowered: Any) -> Program | OutOfMemory:
  """Compiles what `jit(f).lower(...)` returned for absent devices."""
  try:
    compiled = lowered.compile()
  except Exception as error:  # the class is the compiler's own
    refusal = out_of_memory(str(error))
    if refusal is None:
      raise
    return refusal
  stats = compiled.memory_analysis()
  return Program(
    arguments=stats.argument_size_in_bytes,
    outputs=stats.output_size_in_bytes,
    temporaries=stats.temp_size_in_bytes,
    aliased=stats.alias_size_in_bytes,
    peak=getattr(stats, 'peak_memory_in_bytes', 0),
    traffic=hlo.traffic(hlo.parse(compiled.as_text())),
  )


_AMOUNT = r'([\d.]+)([KMGT]?)i?B?'
_SCALE = {'': 1, 'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}


def out_of_memory(message: str) -> OutOfMemory | None:
  """Reads a compiler's refusal; None if the message is of something else."""
  is_main_memory = re.search(r'hbm|memory', message, re.IGNORECASE)
  if 'RESOURCE_EXHAUSTED' not in message or not is_main_memory:
    return None
  if re.search(r'vmem|smem', message, re.IGNORECASE) and not re.search(
    r'hbm', message, re.IGNORECASE
  ):
    return None  # a kernel's blocks, which no layout of the model changes
  match = re.search(
    rf'Used {_AMOUNT} of {_AMOUNT} hbm', message, re.IGNORECASE
  ) or re.search(rf'\({_AMOUNT}\) exceeds available HBM \({_AMOUNT}\)', message)
  needed, available = 0, 0
  if match:
    amount, unit, limit, limit_unit = match.groups()
    needed = int(float(amount) * _SCALE[unit])
    available = int(float(limit) * _SCALE[limit_unit])
  return OutOfMemory(
    needed=needed, available=available, message=message.split('\n')[0]
  )


def roofline(
  flops: float, traffic: hlo.Traffic, peaks: peaks_lib.Peaks, dtype: str
) -> Roofline:
  """Returns the least seconds of a program on one device.

  Args:
    flops: of matrix products, those done twice for lack of memory included.
    traffic: of the program.
    peaks: of the device.
    dtype: that products are computed in.
  """
  sent = traffic.sent_bytes
  return Roofline(
    compute=flops / peaks.flops_per_s[dtype],
    memory=traffic.memory_bytes / peaks.bytes_per_s,
    links=sent / peaks.link_bytes_per_s if sent else 0.0,
  )


def size(num_bytes: float) -> str:
  """Returns a number of bytes as a person reads it."""
  if not num_bytes:
    return '0 B'
  power = min(int(math.log2(num_bytes) // 10), 4)
  unit = ('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]
  amount = num_bytes / 2 ** (10 * power)
  return f'{amount:.0f} {unit}' if amount >= 100 else f'{amount:.3g} {unit}'
