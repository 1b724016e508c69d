"""The verifier of programs: unit tests, in confined processes.

    {"tests": ["assert add(1, 2) == 3", "assert add(-1, 1) == 0"]}
    {"tests": "def check(f):\\n  assert f(2) == 4", "entry_point": "double"}
    {"cases": [{"stdin": "1 2\\n", "stdout": "3\\n"}]}

`tests` are Python code with asserts, in a process of their own: the program can
only answer their calls, see `sandbox/remote.py`. `cases` run the program as a
script. The expected output stays outside of its process.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

from checks import expect
from evals.verifiers import blocks, verifier
from evals.verifiers.sandbox import runner


@dataclasses.dataclass(frozen=True, kw_only=True)
class UnitTests(verifier.Verifier):
  """Tests of the Python code in an answer: its last fenced block, or all.

  Fields of the record: `tests`, a text or a list of texts, with or without
  `entry_point`; or `cases`.
  """

  is_partial: bool = False  # the score is the share of tests that passed
  limits: runner.Limits = dataclasses.field(default_factory=runner.Limits)

  def check(self, record: verifier.Record) -> None:
    """Raises ValueError for invalid tests."""
    runner.check()
    if 'cases' in record:
      _cases(record)
      return
    for source in _tests(record)[0]:
      try:
        compile(source, 'tests', 'exec')
      except (SyntaxError, ValueError) as error:
        raise verifier.wrong(
          record, 'tests', f'Python code ({error})'
        ) from None

  def __call__(self, answer: str, record: verifier.Record) -> verifier.Score:
    """Returns 1 if all tests pass, or their share; time-outs are failures."""
    source = blocks.block(answer, ('python', 'py', 'python3'))
    if 'cases' in record:
      return self._score(*self._run_cases(source, _cases(record)))
    tests, entry_point = _tests(record)
    faults, ran = runner.run_tests(
      source, tests, self.limits, entry_point=entry_point
    )
    if not faults:
      # A text without asserts, such as `def check`, is no test.
      faults = [ran.reason or 'the tests ended before their last'] * len(tests)
    if entry_point:
      faults = [fault for fault in faults if fault] or faults[-1:]
    return self._score(faults, ran)

  def _run_cases(
    self, source: str, cases: list[tuple[str, str]]
  ) -> tuple[list[str], runner.Ran]:
    faults, worst = [], runner.Ran('ok', '', '')
    for given, right in cases:
      ran = runner.run(source, self.limits, stdin=given)
      fault = ran.reason
      if not fault and ran.output.split() != right.split():
        fault = (
          f'got {expect.shown(ran.output.strip())}, expected'
          f' {expect.shown(right.strip())}'
        )
      faults.append(fault)
      if ran.status == 'time':
        worst = ran
        break  # the other cases would take as long
    return faults + [worst.reason] * (len(cases) - len(faults)), worst

  def _score(self, faults: list[str], ran: runner.Ran) -> verifier.Score:
    num_passed = sum(not fault for fault in faults)
    first = next((fault for fault in faults if fault), '')
    reason = f'{num_passed} of {len(faults)} tests passed'
    if first:
      reason += f'; {first}'
    value = num_passed / len(faults)
    if not self.is_partial:
      value = float(value == 1)
    # Tests that passed before a time-out did pass.
    failure = 'time' if ran.status == 'time' and not value else ''
    return verifier.Score(value, reason, failure=failure)


def _tests(record: verifier.Record) -> tuple[tuple[str, ...], str]:
  tests = verifier.texts_field(record, 'tests')
  entry_point = record.get('entry_point') or ''
  if not isinstance(entry_point, str) or (
    entry_point and not entry_point.isidentifier()
  ):
    raise verifier.wrong(record, 'entry_point', 'the name of a function')
  return tests, entry_point


def _cases(record: verifier.Record) -> list[tuple[str, str]]:
  cases: Any = record['cases']
  if (
    not isinstance(cases, list)
    or not cases
    or not all(
      isinstance(each, Mapping)
      and isinstance(each.get('stdin', ''), str)
      and isinstance(each.get('stdout'), str)
      for each in cases
    )
  ):
    raise verifier.wrong(
      record, 'cases', 'a list of objects with the texts stdin and stdout'
    )
  return [(each.get('stdin', ''), each['stdout']) for each in cases]
