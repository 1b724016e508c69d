"""Names of targets, and the absent devices that a compiler makes of them."""

import os
import subprocess
import sys

import pytest

from hardware import peaks, targets
from tests.helpers import tiny_models


@pytest.fixture
def compilers(monkeypatch):
  """The environment that libtpu needs, as of prepare_environment."""
  pytest.importorskip('libtpu')
  for name, value in targets._ENVIRONMENT.items():
    monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
  ('name', 'num_devices', 'kind'),
  [
    ('v4:4x4x4', 64, 'TPU v4'),
    ('v5e:2x4', 8, 'TPU v5 lite'),
    ('v5p:4x8x8', 256, 'TPU v5'),
    ('v6e:16x16', 256, 'TPU v6 lite'),
    ('tpu7x:2x2x1', 8, 'TPU7x'),  # four chips of two devices
    ('h100:8', 8, 'NVIDIA H100 80GB HBM3'),
    ('h200:16', 16, 'NVIDIA H200'),
  ],
)
def test_a_name_says_how_many_devices_of_what_kind(name, num_devices, kind):
  target = targets.parse(name)
  assert (target.num_devices, target.device_kind) == (num_devices, kind)
  assert peaks.DATASHEETS[kind].memory_bytes > 1e10
  assert peaks.DATASHEETS[kind].link_bytes_per_s > 1e11


@pytest.mark.parametrize(
  ('name', 'message'),
  [
    ('v9:2x2', "got the unknown target 'v9:2x2', expected one of v4, v5e"),
    ('', "got the unknown target '', expected one of v4, v5e"),
    ('v5p:4x4', "got 'v5p:4x4', expected 3 sizes, as in v5p:4x4x4"),
    ('v5e:2x4x1', "got 'v5e:2x4x1', expected 2 sizes, as in v5e:4x4"),
    ('v5e:0x4', "got 'v5e:0x4', expected 2 sizes"),
    ('v5e', "got 'v5e', expected 2 sizes"),
    (
      'h100:many',
      "got 'h100:many', expected a number of devices, as in h100:8",
    ),
    ('v5e:32x32', 'of 1024 chips, expected at most 256, the largest slice'),
    ('h100:12', 'expected at most 8 devices or a multiple of 8'),
  ],
)
def test_a_name_that_is_none_is_refused(name, message):
  with pytest.raises(targets.TargetError, match=message):
    targets.parse(name)


@pytest.mark.parametrize(
  'name', ['v4:2x2x1', 'v5e:1x1', 'v5e:2x4', 'tpu7x:2x2x1']
)
def test_the_compiler_has_the_devices_that_the_name_says(compilers, name):
  target = targets.parse(name)
  devices = targets.devices(target)
  assert len(devices) == target.num_devices
  assert {device.device_kind for device in devices} == {target.device_kind}


@pytest.mark.parametrize('name', ['h100:2', 'h200:16', 'a100:8'])
def test_gpus_are_described_to_the_compiler(compilers, name):
  pytest.importorskip('jax_cuda13_plugin')
  target = targets.parse(name)
  devices = targets.devices(target)
  assert len(devices) == target.num_devices
  assert {device.device_kind for device in devices} == {target.device_kind}


def test_a_topology_that_there_is_not_is_refused(compilers):
  with pytest.raises(
    targets.TargetError,
    match="got the topology 'v5e:3x3', expected one that exists, as in",
  ):
    targets.devices(targets.parse('v5e:3x3'))


@pytest.mark.parametrize(
  ('name', 'package'), [('v5e:2x2', 'libtpu'), ('h100:8', 'jax-cuda13-pjrt')]
)
def test_a_missing_compiler_is_one_line_with_what_to_install(
  monkeypatch, name, package
):
  from jax.experimental import topologies

  def missing(**_):
    raise RuntimeError('no such plugin\nand a traceback')

  monkeypatch.setattr(topologies, 'get_topology_desc', missing)
  with pytest.raises(targets.TargetError) as caught:
    targets.devices(targets.parse(name))
  assert str(caught.value) == (
    f'--plan={name}: got no compiler for it (no such plugin), expected'
    f' {package}; fix: pip install -r requirements-plan.txt'
  )


def test_the_flag_may_stand_alone():
  argv = ['train.py', '--plan', '--config=a.py']
  assert targets.with_default(argv) == ['train.py', '--plan=here', argv[2]]
  assert targets.value_in(targets.with_default(argv)) == 'here'
  assert targets.value_in(['train.py', '-plan=v5e:2x2']) == 'v5e:2x2'
  assert targets.value_in(['train.py', '--plan_mfu=1']) is None


@pytest.mark.parametrize('plan', [None, 'here', 'v5e:2x2'])
def test_a_machine_without_accelerators_is_not_searched_for_them(
  monkeypatch, plan
):
  monkeypatch.setattr(os, 'environ', {})
  monkeypatch.setattr(targets, '_ACCELERATORS', ())
  monkeypatch.delitem(sys.modules, 'jax')
  targets.prepare_for(plan)
  assert os.environ['JAX_PLATFORMS'] == 'cpu'


def test_a_machine_with_accelerators_is_left_to_jax(monkeypatch, tmp_path):
  monkeypatch.setattr(os, 'environ', {})
  monkeypatch.setattr(targets, '_ACCELERATORS', (str(tmp_path),))
  targets.prepare_for(None)
  assert not os.environ


def test_importing_targets_does_not_import_jax():
  code = 'import sys, hardware.targets; sys.exit("jax" in sys.modules)'
  done = subprocess.run(
    [sys.executable, '-c', code], env=tiny_models.subprocess_env(), check=False
  )
  assert done.returncode == 0
