"""The table of datasheets, and the measurement for other devices."""

import types

import jax
import pytest

from hardware import peaks


def _device(kind):
  return types.SimpleNamespace(device_kind=kind, platform='gpu')


@pytest.mark.parametrize('kind', sorted(peaks.DATASHEETS))
def test_datasheet_rows_are_in_units_of_one(kind):
  row = peaks.peaks(_device(kind))
  # Between 100 TFLOP/s and 10 PFLOP/s, 500 GB/s and 10 TB/s: a slip of a unit
  # prefix falls outside.
  assert all(1e14 < rate < 1e16 for rate in row.flops_per_s.values())
  assert 5e11 < row.bytes_per_s < 1e13
  assert row.flops_per_s['bfloat16'] >= row.flops_per_s['float32']
  assert row.source


def test_h100_sxm_is_989_dense_teraflops():
  row = peaks.peaks(_device('NVIDIA H100 80GB HBM3'))
  assert row.flops_per_s['bfloat16'] == pytest.approx(989.4e12)
  assert row.bytes_per_s == pytest.approx(3.35e12)


def test_a_jax_device_of_ironwood_is_half_a_chip():
  row = peaks.peaks(_device('TPU7x'))
  assert row.flops_per_s['bfloat16'] == pytest.approx(1153.5e12)
  assert row.bytes_per_s == pytest.approx(3690e9)


def test_cpu_is_measured_once_and_shared_between_virtual_devices(monkeypatch):
  calls = []

  def matmul(dtype, **_):
    calls.append(dtype)
    return 80.0

  monkeypatch.setattr(peaks, 'matmul_flops_per_s', matmul)
  monkeypatch.setattr(peaks, 'read_bytes_per_s', lambda **_: 16.0)
  peaks._measured.cache_clear()
  device = jax.devices('cpu')[0]
  try:
    first = peaks.peaks(device)
    assert peaks.peaks(device) is first
  finally:
    peaks._measured.cache_clear()
  assert calls == ['float32', 'bfloat16']
  num_devices = len(jax.devices('cpu'))
  assert first.flops_per_s['float32'] == 80.0 / num_devices
  assert first.bytes_per_s == 16.0 / num_devices
  assert 'measured on cpu' in first.source


def test_measurements_are_finite_rates():
  device = jax.devices('cpu')[0]
  rate = peaks.matmul_flops_per_s(
    'float32', size=64, seconds=0.01, device=device
  )
  # The slowest CPU does more than a megaflop per second; a wrong sign, unit or
  # an unfinished computation does not land in this range.
  assert 1e6 < rate < 1e15
  read = peaks.read_bytes_per_s(megabytes=1, seconds=0.01, device=device)
  assert 1e6 < read < 1e14
