"""`make test` runs the first cases of a test, CI runs all."""

import pytest

from tests.helpers import tiers


class _Item:
  """A test as pytest has collected it."""

  def __init__(self, nodeid: str, *marks: pytest.MarkDecorator):
    self.nodeid = nodeid
    self._marks = {each.name: each.mark for each in marks}

  def get_closest_marker(self, name: str) -> pytest.Mark | None:
    return self._marks.get(name)

  def add_marker(self, mark: pytest.MarkDecorator) -> None:
    self._marks[mark.name] = mark.mark

  @property
  def is_slow(self) -> bool:
    return 'slow' in self._marks


def test_further_cases_are_slow():
  two = pytest.mark.fast_cases(2)
  items = [
    _Item('a.py::test_cases[0]', two, pytest.mark.slow),
    _Item('a.py::test_cases[1]', two),
    _Item('a.py::test_others[0]', two),
    _Item('a.py::test_cases[2]', two),
    _Item('a.py::test_cases[3]', two),
    _Item('b.py::test_cases[3]', two),
    _Item('a.py::test_unmarked[0]'),
    _Item('a.py::test_unmarked[1]'),
  ]
  tiers.mark_further_cases(items)
  assert [item.is_slow for item in items] == [
    True, False, False, False, True, False, False, False
  ]  # fmt: skip
