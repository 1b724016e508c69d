"""XLA's options: the user's own win, and unknown ones are left out."""

import dataclasses

import jax
import pytest

from hardware import targets, xla_options


@pytest.fixture
def devices():
  def of(target):
    return targets.devices(targets.parse(target))

  pytest.importorskip('libtpu', reason='needs requirements-plan.txt')
  pytest.importorskip('jax_plugins.xla_cuda13', reason='as above')
  targets.prepare_environment()
  return of


def test_every_row_has_a_reason_and_a_name_of_its_own():
  names = [row.name for row in xla_options.OPTIONS]
  assert len(set(names)) == len(names)
  for row in xla_options.OPTIONS:
    assert row.name.startswith('xla_')
    assert row.platform in ('gpu', 'tpu')
    assert len(row.why) > 20
    assert row.measured


def test_a_cpu_and_a_single_device_take_no_option(devices):
  assert xla_options.of(jax.devices()) == {}
  assert xla_options.of(devices('h100:1'), {}) == {}


@pytest.mark.parametrize('target', ['h100:8', 'v5e:2x4'])
def test_compilers_of_this_version_take_the_table(devices, target):
  found = xla_options.of(devices(target), {})
  platform = 'gpu' if target.startswith('h100') else 'tpu'
  assert found == {
    row.name: row.value
    for row in xla_options.OPTIONS
    if row.platform == platform
  }


@pytest.mark.parametrize('prefix', ['--', '--no'])
@pytest.mark.parametrize('variable', ['XLA_FLAGS', 'LIBTPU_INIT_ARGS'])
def test_flags_of_the_user_win(devices, variable, prefix):
  name = xla_options.OPTIONS[0].name
  found = xla_options.of(
    devices('h100:8'), {variable: f'--xla_a=1 {prefix}{name} --xla_b'}
  )
  assert found
  assert name not in found


def test_an_option_that_xla_does_not_know_is_left_out(devices, monkeypatch):
  known, other = xla_options.OPTIONS[:2]
  unknown = dataclasses.replace(known, name='xla_gpu_of_another_version')
  monkeypatch.setattr(xla_options, 'OPTIONS', (known, unknown, other))
  found = xla_options.of(devices('h100:8'), {})
  assert list(found) == [known.name, other.name]


def test_an_option_with_a_wrong_value_is_an_error(devices, monkeypatch):
  wrong = dataclasses.replace(xla_options.OPTIONS[0], value='perhaps')
  monkeypatch.setattr(xla_options, 'OPTIONS', (wrong,))
  with pytest.raises(Exception, match='perhaps'):
    xla_options.of(devices('h100:8'), {})
