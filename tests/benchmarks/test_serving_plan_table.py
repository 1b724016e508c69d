"""The committed table of plans of serving against the plans of today's code."""

import pytest

from benchmarks import serving_plan_table as made
from benchmarks.common import plan_rows
from hardware import targets


@pytest.fixture
def compilers(monkeypatch):
  """The environment that libtpu needs, as of prepare_environment."""
  pytest.importorskip('libtpu')
  for name, value in targets._ENVIRONMENT.items():
    monkeypatch.setenv(name, value)


@pytest.fixture(scope='module')
def committed():
  """The rows of experiments/SERVING_PLANS.md."""
  return plan_rows.read(made.PATH)


def test_every_row_is_in_the_table(committed):
  assert tuple(committed) == made.ROWS
  # The words around the table are those of serving_plan_table, too.
  assert made.write(committed) == made.PATH.read_text(encoding='utf-8')


@pytest.mark.parametrize('row', made.ROWS)
def test_cells_without_a_compiler_are_as_committed(committed, row, compilers):
  cells = made.analytic_cells(row, made.plan(row, is_compiled=False))
  for column, cell in zip(made.ANALYTIC, cells, strict=True):
    assert committed[row][column] == cell, (
      f'{row}, {column}: run make plan-table, or'
      f' python -m benchmarks.serving_plan_table --rows={row}'
    )


@pytest.mark.parametrize('row', made.ROWS)
def test_compiler_and_formula_agree(committed, row):
  cells = committed[row]
  if cells['sequences that fit'] == '0':
    assert cells['fits'] == 'NO'
    return
  assert cells['fits'] == 'yes'
  assert cells['weights sent'] == 'no'
  assert abs(float(cells['ratio']) - 1) <= 0.15
  ratio = float(cells['formula GiB']) / float(cells['compiler GiB'])
  # Two cells of two decimals each.
  assert ratio == pytest.approx(float(cells['ratio']), abs=5e-3)
