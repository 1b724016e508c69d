"""The environment of benchmarks and tests on a GPU, in one place.

    os.environ.update(gpu_environment.BENCHMARKS)    # before jax opens a device

jax and XLA read these variables once, so that they are set in a fresh process.
"""

import glob

_BOTH = {
  # The GPU, and the CPU for references and for arrays of the host.
  'JAX_PLATFORMS': 'cuda,cpu',
  # jax takes 75 % by default. A part stays free for cuDNN's workspaces.
  'XLA_PYTHON_CLIENT_MEM_FRACTION': '0.9',
}
BENCHMARKS = _BOTH | {
  # A peer in another process needs the memory before or after us.
  'XLA_PYTHON_CLIENT_PREALLOCATE': 'false',
}
TESTS = BENCHMARKS | {
  # References in float32: by default a GPU multiplies them in TF32, with 10
  # bits, and is off by 1e-4.
  'JAX_DEFAULT_MATMUL_PRECISION': 'highest',
  # tests/conftest.py sets a flag for quick compilation on CPUs. XLA takes the
  # last value of a repeated flag.
  'XLA_FLAGS': '--xla_backend_optimization_level=3',
}


def missing() -> str:
  """Returns why this machine has no usable GPU, or ''. Does not import jax."""
  if not glob.glob('/dev/nvidia[0-9]*') and not glob.glob('/dev/dxg'):
    return 'got no NVIDIA GPU (/dev/nvidia0), expected one; use such a machine'
  return ''
