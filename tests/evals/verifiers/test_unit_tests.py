"""Programs are right if their tests pass, and for no other reason."""

import pytest

from evals.verifiers import unit_tests
from evals.verifiers.sandbox import runner

_TESTS = {'tests': ['assert f(1) == 2', 'assert f([3]) == 4']}
_LIMITS = runner.Limits(cpu_seconds=1)
_VERIFIER = unit_tests.UnitTests(limits=_LIMITS)


def _score(source, **record):
  record = record or _TESTS
  _VERIFIER.check(record)
  return _VERIFIER(source, record)


def test_a_right_program_passes_with_words_around_it():
  answer = (
    'First:\n```python\ndef f(x): return 0\n```\nBetter:\n```python\n'
    'def f(x):\n  return x + 1 if x == 1 else x[0] + 1\n```\nDone.'
  )
  score = _score(answer)
  assert score == (1.0, '2 of 2 tests passed', '')


@pytest.mark.parametrize(
  ('source', 'said'),
  [
    ('def f(x): return 2', '1 of 2 tests passed; AssertionError at assert f('),
    ('def g(x): return 2', 'NameError: the program defines no f'),
    ('import sys; sys.exit(0)', 'SystemExit: 0'),
    ('import os; os._exit(0)', 'the program ended before the tests did'),
    ('raise KeyError(3)', 'KeyError: 3'),
    ('no code at all', 'SyntaxError'),
    ('print("passed"); print("2 of 2 tests passed")', 'defines no f'),
    # Every comparison with the result is true, where the program lives.
    (
      'class A:\n  __eq__ = lambda *_: True\n  __bool__ = __eq__\n'
      'def f(x): return A()',
      '0 of 2 tests passed; AssertionError',
    ),
    (
      'class A(int):\n  __eq__ = lambda *_: True\ndef f(x): return A(9)',
      '0 of 2 tests passed; AssertionError',
    ),
    ('import builtins\nbuiltins.AssertionError = None\ndef f(x): return 0',
     '0 of 2 tests passed; AssertionError'),
    ('all = any = isinstance = f = lambda *_: True', '0 of 2 tests passed'),
    # Replies that were not asked for, on every file that is open.
    (
      'import os, struct\n'
      'text = b\'{"value": 2}\'\n'
      'for n in range(3, 60):\n'
      '  try: os.write(n, struct.pack(">I", len(text)) + text)\n'
      '  except OSError: pass\n'
      'def f(x): return 7',
      '0 of 2 tests passed',
    ),
  ],
)  # fmt: skip
def test_a_wrong_or_hostile_program_fails(source, said):
  score = _score(source)
  assert score.value == 0
  assert said in score.reason


def test_the_right_values_never_reach_the_program():
  source = (
    'import gc, sys, os\n'
    'def f(x):\n'
    '  seen = [str(o) for o in gc.get_objects() if type(o) in (str, list)]\n'
    '  seen += [str(sys._getframe(i).f_locals) for i in range(3)]\n'
    '  return any("40" + "41" in text for text in seen)\n'
  )
  score = _score(source, tests=['assert f(1) is False, 4041'])
  assert score.value == 1, score.reason


@pytest.mark.slow
def test_a_program_that_takes_too_long_is_a_failure_of_time():
  score = _score('def f(x):\n  while True: pass')
  assert (score.value, score.failure) == (0.0, 'time')
  partial = unit_tests.UnitTests(is_partial=True, limits=_LIMITS)
  source = 'def f(x):\n  while x != 1: pass\n  return 2'
  assert partial(source, _TESTS)[0] == 0.5


def test_arguments_that_change_in_place_objects_and_generators():
  source = (
    'import collections\n'
    'def turn(x): x.reverse()\n'
    'class Stack:\n'
    '  def __init__(self): self.items = []\n'
    '  def push(self, x): self.items.append(x)\n'
    '  def __len__(self): return len(self.items)\n'
    'def top(stack): return stack.items[-1]\n'
    'def count(n):\n'
    '  for i in range(n): yield i\n'
    'def words(x): return collections.Counter(x)\n'
    'def bad(x): raise ValueError("no " + x)\n'
  )
  tests = [
    'a = [1, 2]\nturn(a)\nassert a == [2, 1]',
    's = Stack()\ns.push(5)\nassert len(s) == 1 and top(s) == 5',
    'assert list(count(3)) == [0, 1, 2]\nassert s.items == [5]',
    'assert words("aab") == {"a": 2, "b": 1}',
    'try:\n  bad("x")\n  assert False\nexcept ValueError as error:\n'
    '  assert "no x" in str(error)',
    'import math\nassert math.isclose(count(1).__next__(), 0)',
  ]
  score = _score(source, tests=tests)
  assert score.reason == '6 of 6 tests passed'


def test_check_gets_the_entry_point():
  record = {
    'tests': 'def check(f):\n  assert f(2) == 4\n  assert f(3) == 6',
    'entry_point': 'double',
  }
  assert _score('def double(x): return 2 * x', **record).value == 1
  score = _score('def double(x): return 4', **record)
  assert score == (
    0.0, '0 of 1 tests passed; AssertionError at assert f(3) == 6', ''
  )  # fmt: skip


def test_cases_compare_what_is_printed():
  record = {'cases': [{'stdin': '3\n', 'stdout': '6\n'}, {'stdout': 'x'}]}
  score = _score('print(int(input()) * 2)', **record)
  assert score.value == 0
  assert '1 of 2 tests passed; it ended with code 1: EOFError' in score.reason
  score = _score('print(4)', cases=[{'stdout': '5'}])
  assert score.reason == "0 of 1 tests passed; got '4', expected '5'"
  score = _score('while True: pass', cases=[{'stdout': '5'}] * 9)
  assert score.failure == 'time'


@pytest.mark.parametrize(
  ('record', 'said'),
  [
    ({}, 'tests: got none, expected text, or a list of texts'),
    ({'tests': ['assert (']}, 'expected Python code'),
    ({'tests': [3]}, 'expected text, or a list of texts'),
    ({'tests': 'pass', 'entry_point': 'a b'}, "entry_point: got 'a b', expect"),
    ({'cases': [{'stdin': 'x'}]}, 'cases: got .*expected a list of objects'),
  ],
)
def test_a_wrong_record_is_refused_before_any_answer(record, said):
  with pytest.raises(ValueError, match=said):
    _VERIFIER.check(record)
