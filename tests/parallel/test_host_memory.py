"""Freed memory stays with the process: a step faults its pages in once."""

import subprocess
import sys

import pytest

from tests import fixtures

_STEPS = """
import resource, sys
from parallel import host_memory
if sys.argv[1] == 'keep':
  assert host_memory.reuse_freed_memory()
import jax, jax.numpy as jnp
step = jax.jit(lambda x: jnp.sin(x @ x).sum() + jnp.cos(x.T @ x).sum())
x = jnp.ones((2048, 2048))
def faults():
  for _ in range(5):
    step(x).block_until_ready()
  return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
faults()
print(-faults() + faults())
"""


@pytest.mark.skipif(sys.platform != 'linux', reason='mallopt is of glibc')
def test_steps_stop_faulting_in_their_temporaries():
  faults = {}
  for choice in ('keep', 'default'):
    result = subprocess.run(
      [sys.executable, '-c', _STEPS, choice],
      env=fixtures.subprocess_env(PYTHONPATH='.'),
      capture_output=True,
      text=True,
      check=True,
    )
    faults[choice] = int(result.stdout)
  # Five steps of 16 MB and more: thousands of pages, or huge ones by the dozen.
  assert faults['keep'] < 0.1 * faults['default']
