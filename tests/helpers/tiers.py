"""The two tiers of tests: which cases of a test are slow."""

import collections
from collections.abc import Iterable

import pytest


def mark_further_cases(items: Iterable[pytest.Item]) -> None:
  """Marks cases as slow beyond the first n of a test with `fast_cases(n)`.

  Cases that are slow by themselves do not count.
  """
  seen: collections.Counter[str] = collections.Counter()
  for item in items:
    mark = item.get_closest_marker('fast_cases')
    if mark is None or item.get_closest_marker('slow'):
      continue
    (most,) = mark.args
    test = item.nodeid.partition('[')[0]
    seen[test] += 1
    if seen[test] > most:
      item.add_marker(pytest.mark.slow)
