"""Kills of a sweep: nothing repeated, nothing lost; then two processes."""

import pytest

from tests.survival import sweep_kills

pytest.importorskip('optuna')


@pytest.mark.slow
@pytest.mark.parametrize('flag', ['--together', '--notogether'])
def test_kills_change_nothing(tmp_path, flag):
  assert not sweep_kills.suite(tmp_path, 3, flag)
