"""Threads for the collectives of several CPU devices: hardware/cpu_threads."""

import os
import pathlib
import sys

import jax
import pytest

from hardware import cpu_threads

FLAG = '--xla_force_host_platform_device_count='


@pytest.mark.parametrize(
  ('flags', 'least'),
  [(f'{FLAG}8', 64), (f'{FLAG}2 {FLAG}16', 128)],
)
def test_several_devices_get_threads_each(flags, least):
  environment = {'XLA_FLAGS': flags}
  cpu_threads.provide(environment)
  assert int(environment[cpu_threads.VARIABLE]) >= least


def test_a_device_with_peers_gets_threads():
  environment = {}
  cpu_threads.provide(environment, has_peers=True)
  assert int(environment[cpu_threads.VARIABLE]) >= 8


@pytest.mark.parametrize(
  'environment',
  [
    {},
    {'XLA_FLAGS': '--xla_cpu_enable_fast_math=false'},
    {'XLA_FLAGS': f'{FLAG}1'},
    {'XLA_FLAGS': f'{FLAG}8', 'NPROC': '3'},
  ],
)
def test_another_environment_stays(environment):
  before = dict(environment)
  cpu_threads.provide(environment)
  assert environment == before


@pytest.mark.skipif(sys.platform != 'linux', reason='threads are in /proc')
def test_xla_has_these_threads_here():
  """The variable means something to XLA: it is not documented."""
  jax.devices('cpu')
  names = [
    path.read_text().strip()
    for path in pathlib.Path('/proc/self/task').glob('*/comm')
  ]
  pools = {name: names.count(name) for name in set(names)}
  assert max(pools.values()) >= int(os.environ[cpu_threads.VARIABLE]), pools
