"""The processor of this machine, and the instructions that it has."""

import functools
import pathlib
import platform


@functools.cache
def described() -> str:
  """Returns the name of the processor and all of its instructions.

  Where the system does not tell them: a text for this machine alone.
  """
  try:
    lines = pathlib.Path('/proc/cpuinfo').read_text().splitlines()
  except OSError:
    return f'{platform.processor()} {platform.node()}'
  wanted = 'model name', 'flags', 'Features', 'CPU part'
  return '\n'.join(sorted({line for line in lines if line.startswith(wanted)}))


def has_bfloat16_tiles() -> bool:
  """Returns whether the processor multiplies matrices of bfloat16 (AMX).

  XLA:CPU has a fast product for kernels that lie transposed in memory on such
  processors alone. On others it takes up to 7 times as long as with kernels
  that lie as they are (1 to 16 rows, SmolLM2's shapes, EPYC with AVX-512).
  """
  return 'amx_bf16' in described().split()
