"""Ahead-of-time compilation for absent devices: memory, traffic and roofline.

    compiled = compile_ahead.compile(lowered)      # Program, or OutOfMemory
    roof = compile_ahead.roofline(flops, compiled.traffic, peaks, 'bfloat16')

The roofline (Williams et al. 2009) is a lower bound of a step's time. Its
products, its main-memory traffic and its messages over the links each take some
time at the device's peak rate. The longest of the three binds; in the best case
it hides the two others.

Breaks first when jax moves: `out_of_memory` reads the text of the compilers'
RESOURCE_EXHAUSTED errors, and `compile` the fields of
`compiled.memory_analysis()`.
"""

import dataclasses
import math
import re
from typing import Any

from hardware import hlo, peaks as peaks_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
  """The compiler's account of a program; bytes of one device."""

  arguments: int
  outputs: int
  temporaries: int  # as allocated, with the gaps between them
  aliased: int  # outputs that reuse the memory of donated arguments
  peak: int  # largest amount in use at one time; 0 if the compiler is silent
  traffic: hlo.Traffic

  @property
  def allocated(self) -> int:
    """The bytes that the device must have free to load the program."""
    return self.arguments + self.outputs - self.aliased + self.temporaries

  @property
  def in_use(self) -> int:
    """The peak if the compiler reports it, else the allocated bytes."""
    return self.peak or self.allocated


@dataclasses.dataclass(frozen=True, kw_only=True)
class OutOfMemory:
  """The compiler's refusal of a program that does not fit its device."""

  needed: int  # bytes; 0 if the message has no number
  available: int  # bytes; 0 if the message has no number
  message: str  # its first line


@dataclasses.dataclass(frozen=True, kw_only=True)
class Roofline:
  """The least seconds of a program on each resource of a device."""

  compute: float  # matrix products
  memory: float  # main memory (HBM)
  links: float  # interconnect

  @property
  def binds(self) -> str:
    """The resource that takes longest: compute, HBM or interconnect."""
    seconds = {
      'compute': self.compute,
      'HBM': self.memory,
      'interconnect': self.links,
    }
    return max(seconds, key=lambda name: seconds[name])

  @property
  def seconds(self) -> float:
    """The least seconds of the step: the binding resource hides the others."""
    return max(self.compute, self.memory, self.links)


def compile(lowered: Any) -> Program | OutOfMemory:
  """Returns the compiled program of `jit(f).lower(...)`, or the refusal.

  Raises:
    Exception: the compiler failed for another reason than memory.
  """
  try:
    compiled = lowered.compile()
  except Exception as error:  # each compiler raises a class of its own
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
  """Returns the refusal that a compiler's message reports, or None.

  A message about anything but main memory is no refusal.
  """
  is_main_memory = re.search(r'hbm|memory', message, re.IGNORECASE)
  if 'RESOURCE_EXHAUSTED' not in message or not is_main_memory:
    return None
  if re.search(r'vmem|smem', message, re.IGNORECASE) and not re.search(
    r'hbm', message, re.IGNORECASE
  ):
    # A kernel's own tiles are too large: no layout of the model changes them.
    return None
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
    flops: FLOPs of matrix products, including products that rematerialisation
      repeats.
    dtype: dtype of the operands of the products.
  """
  sent, rate = traffic.sent_bytes, peaks.link_bytes_per_s
  return Roofline(
    compute=flops / peaks.flops_per_s[dtype],
    memory=traffic.memory_bytes / peaks.bytes_per_s,
    # Parts of one CPU have no links.
    links=sent / rate if sent and rate else 0.0,
  )


def size(num_bytes: float) -> str:
  """Returns a number of bytes as text, e.g. '1.5 KiB'."""
  if not num_bytes:
    return '0 B'
  power = min(int(math.log2(num_bytes) // 10), 4)
  unit = ('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]
  amount = num_bytes / 2 ** (10 * power)
  return f'{amount:.0f} {unit}' if amount >= 100 else f'{amount:.3g} {unit}'
