"""The world every test runs in; set before anything imports jax.

Eight fake CPU devices, so that meshes and pmap are exercised on one machine;
silent rank promotion is an error; absl flags count as parsed, which grain's
multi-process readers need outside `absl.app.run`.
"""

import atexit
import gc
import os

from absl import flags
import pytest

from tests.helpers import compiled_programs

NUM_FAKE_DEVICES = 8
# Tests compile far more than they compute. Without LLVM's optimisation the
# suite takes less than half the time; matmuls are library calls either way. The
# older emitter of fusions and one LLVM module per program bring the compilation
# of a small mixture's training step from 5 to 1 s (2 cores, jax 0.10.2).
COMPILE_QUICKLY = (
  '--xla_backend_optimization_level=0'
  ' --xla_cpu_use_fusion_emitters=false'
  ' --xla_cpu_parallel_codegen_split_count=1'
)


def _set_environment() -> compiled_programs.CompiledPrograms:
  os.environ.setdefault('JAX_PLATFORMS', 'cpu')
  os.environ['XLA_FLAGS'] = ' '.join(
    [
      COMPILE_QUICKLY,
      os.environ.get(
        'XLA_FLAGS', ''
      ),  # where a flag is repeated, the last wins
      f'--xla_force_host_platform_device_count={NUM_FAKE_DEVICES}',
    ]
  )
  os.environ['JAX_NUMPY_RANK_PROMOTION'] = 'raise'
  # No test may reach for the network through a library's default.
  os.environ['HF_HUB_OFFLINE'] = '1'
  # Child processes of a test find its compiled programs by this variable.
  programs = compiled_programs.CompiledPrograms(
    compiled_programs.default_store()
  )
  os.environ['JAX_COMPILATION_CACHE_DIR'] = str(programs.directory)
  os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'
  os.environ['JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES'] = '-1'
  # Otherwise XLA's own caches put this process's directory into every key.
  os.environ['JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES'] = 'none'
  atexit.register(programs.close)
  return programs


PROGRAMS = _set_environment()
flags.FLAGS.mark_as_parsed()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol():
  """Shares compiled programs with the other workers, test by test."""
  PROGRAMS.adopt()
  try:
    return (yield)
  finally:
    PROGRAMS.publish()


def pytest_collection_finish():
  """Lets the garbage collector look seldom, and at what tests made only.

  Tracing allocates so much that Python's defaults (700, 10, 10) walk all of
  JAX's caches again and again: 15 % of a warm run of test_metamorphic.py.
  """
  gc.collect()
  gc.freeze()
  gc.set_threshold(50_000, 10, 20)


def pytest_sessionfinish():
  """Removes programs that have not been used for weeks."""
  if 'PYTEST_XDIST_WORKER' not in os.environ:
    compiled_programs.prune(compiled_programs.default_store())
