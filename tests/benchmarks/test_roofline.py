"""The table of measured rates; no assertion on the rates."""

import jax

from benchmarks import roofline


def test_every_rate_is_measured_every_round():
  rates = roofline.measure(
    jax.devices()[0],
    dtypes=['float32', 'int8'],
    size=32,
    megabytes=1,
    rounds=2,
    seconds=0.001,
  )
  assert list(rates) == ['float32', 'int8', 'read']
  assert all(len(values) == 2 for values in rates.values())
  assert all(rate > 0 for values in rates.values() for rate in values)


def test_report_shows_median_best_and_the_datasheet():
  text = roofline.report(
    {
      'device': 'NVIDIA H200',
      'rates': {'bfloat16': [7e14, 8e14, 1e14], 'read': [4e12, 3e12, 2e12]},
    }
  )
  lines = [line.split() for line in text.splitlines()]
  assert lines[0] == ['Roofline', 'of', 'NVIDIA', 'H200']
  assert lines[2] == ['bfloat16', '700000.0', '800000.0', 'GFLOP/s']
  assert lines[3] == ['read', '3000.0', '4000.0', 'GB/s']
  assert 'NVIDIA datasheet' in text
  assert 'bfloat16 989 TFLOP/s' in text
