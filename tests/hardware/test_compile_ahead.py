"""Refusals of the compiler, the roofline, and sizes as text."""

import pytest

from hardware import compile_ahead, hlo, peaks

_GIB = 2**30


@pytest.mark.parametrize(
  ('message', 'needed', 'available'),
  [
    (
      'RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required'
      ' for HLO temporaries (149.06G) exceeds available HBM (15.75G).',
      149.06,
      15.75,
    ),
    (
      'RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory'
      ' in memory space hbm. Used 17.51G of 15.75G hbm. Exceeded hbm capacity'
      ' by 1.76G.\n\nTotal hbm usage >= 17.76G:',
      17.51,
      15.75,
    ),
    ('RESOURCE_EXHAUSTED: Out of memory while allocating 3 bytes', 0, 0),
  ],
)
def test_a_refusal_says_what_was_needed(message, needed, available):
  refusal = compile_ahead.out_of_memory(message)
  assert refusal is not None
  # The message has two decimals.
  assert refusal.needed == pytest.approx(needed * _GIB, rel=1e-6)
  assert refusal.available == pytest.approx(available * _GIB, rel=1e-6)
  assert '\n' not in refusal.message


@pytest.mark.parametrize(
  'message',
  [
    'INVALID_ARGUMENT: got memory that nobody asked for',
    'RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 20M of'
    ' 16M vmem.',
  ],
)
def test_other_failures_are_not_taken_for_a_refusal(message):
  assert compile_ahead.out_of_memory(message) is None


class _Refusing:
  def __init__(self, message):
    self._message = message

  def compile(self):
    raise RuntimeError(self._message)


def test_compile_turns_a_refusal_into_a_result_and_nothing_else():
  refused = compile_ahead.compile(_Refusing('RESOURCE_EXHAUSTED: no memory'))
  assert isinstance(refused, compile_ahead.OutOfMemory)
  with pytest.raises(RuntimeError, match='of another kind'):
    compile_ahead.compile(_Refusing('a bug of another kind'))


@pytest.mark.parametrize(
  ('flops', 'memory_bytes', 'payload', 'binds', 'seconds'),
  [
    (197e12, 0.0, 0, 'compute', 1.0),
    (0.0, 2 * 819e9, 0, 'HBM', 2.0),
    # In a ring of two, a device sends half of the payload twice.
    (0.0, 0.0, int(3 * 200e9), 'interconnect', 3.0),
  ],
)
def test_the_slowest_resource_binds(
  flops, memory_bytes, payload, binds, seconds
):
  reduced = hlo.Collective(
    kind='all-reduce', num_devices=2, payload_bytes=payload, count=1
  )
  roof = compile_ahead.roofline(
    flops,
    hlo.Traffic(collectives=(reduced,), memory_bytes=memory_bytes, unknown=()),
    peaks.DATASHEETS['TPU v5e'],
    'bfloat16',
  )
  assert roof.binds == binds
  assert roof.seconds == pytest.approx(seconds)


@pytest.mark.parametrize(
  ('num_bytes', 'text'),
  [(0, '0 B'), (1023, '1023 B'), (1536, '1.5 KiB'), (95 * _GIB, '95 GiB')],
)
def test_sizes_are_read_by_people(num_bytes, text):
  assert compile_ahead.size(num_bytes) == text
