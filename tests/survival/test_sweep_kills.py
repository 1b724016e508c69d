"""Kills of a sweep: nothing repeated, nothing lost; then two processes."""

import pytest

from tests.survival import sweep_kills

pytest.importorskip('optuna')


@pytest.mark.slow
@pytest.mark.parametrize(
  ('flag', 'num_trials'), [('--together', 4), ('--notogether', 2)]
)
def test_kills_change_nothing(tmp_path, flag, num_trials):
  assert not sweep_kills.suite(tmp_path, 2, flag, num_trials=num_trials)
