"""The world every test runs in; set before anything imports jax.

Eight fake CPU devices, so that meshes and pmap are exercised on one machine;
silent rank promotion is an error; absl flags count as parsed, which grain's
multi-process readers need outside `absl.app.run`.
"""

import atexit
import os
import shutil
import tempfile

from absl import flags

NUM_FAKE_DEVICES = 8
# Tests compile far more than they compute: without LLVM's optimisation the
# suite takes less than half the time. Matmuls are library calls either way.
COMPILE_QUICKLY = '--xla_backend_optimization_level=0'


def _set_environment():
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
  # Many tests compile the same tiny programs, some in child processes. One
  # directory per session: JAX writes cache entries in place, so two sessions
  # sharing one could read each other's half-written files.
  cache = tempfile.mkdtemp(prefix='two_lives_jax_cache_')
  atexit.register(shutil.rmtree, cache, ignore_errors=True)
  os.environ['JAX_COMPILATION_CACHE_DIR'] = cache
  os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'
  os.environ['JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES'] = '-1'


_set_environment()
flags.FLAGS.mark_as_parsed()
