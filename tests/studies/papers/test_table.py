"""The table of results: what is written is read, and lies are refused."""

import dataclasses

import pytest

from evals import claims
from studies.papers import table, verdicts
from tests.evals.test_claims import claim

CLAIM = claim(
  name='one',
  quantities=(
    claims.digits('x', '.25'),
    claims.at_least('y', 'grows', 0.0, 'the direction'),
  ),
)


def rows(x=0.2512345678, y=(0.5, -0.5, 1.5)):
  value, low, high = y
  common = {'claim': 'one', 'seconds': 3.0, 'device': 'cpu', 'made': 'today'}
  return [
    table.Row(
      quantity='x',
      found=verdicts.Finding(value=x, low=x, high=x, seeds=0),
      **common,
    ),
    table.Row(
      quantity='y',
      found=verdicts.Finding(value=value, low=low, high=high, seeds=5),
      **common,
    ),
  ]


def test_a_page_is_read_as_it_was_written(tmp_path):
  path = tmp_path / 'RESULTS.md'
  table.write([CLAIM], {'one': rows()}, path)
  text = path.read_text()
  assert '1 reproduced, 0 not reproduced, 1 inconclusive' in text
  assert '0.5 [-0.5, 1.5] of 5 seeds | inconclusive; about 20 seeds' in text
  read = table.read([CLAIM], path)
  assert [row.quantity for row in read['one']] == ['x', 'y']
  table.write([CLAIM], read, path)
  assert path.read_text() == text
  assert table.read([CLAIM], tmp_path / 'none') == {}


@pytest.mark.parametrize(
  ('old', 'new'),
  [
    ('| 0.251235 | reproduced', '| 0.351235 | reproduced'),
    ('| inconclusive; about 20 seeds would decide', '| reproduced'),
    ('0.245 to 0.255', '0.145 to 0.355'),
    ('[-0.5, 1.5]', '[0.4, 0.6]'),
  ],
)
def test_an_edited_row_is_refused(tmp_path, old, new):
  path = tmp_path / 'RESULTS.md'
  table.write([CLAIM], {'one': rows()}, path)
  text = path.read_text()
  assert old in text
  path.write_text(text.replace(old, new))
  with pytest.raises(table.TableError, match='studies.reproduce one'):
    table.read([CLAIM], path)


def test_a_claim_that_changed_asks_for_a_new_measurement(tmp_path):
  path = tmp_path / 'RESULTS.md'
  table.write([CLAIM], {'one': rows()}, path)
  changed = dataclasses.replace(
    CLAIM, quantities=(claims.digits('x', '.26'), CLAIM.quantities[1])
  )
  with pytest.raises(table.TableError, match='measure the claim again'):
    table.read([changed], path)


def test_a_row_without_a_number_is_refused(tmp_path):
  path = tmp_path / 'RESULTS.md'
  table.write([CLAIM], {'one': rows()}, path)
  path.write_text(path.read_text().replace('0.251235', 'about a quarter'))
  with pytest.raises(table.TableError, match=r'line \d+: got'):
    table.read([CLAIM], path)


def test_rows_of_other_claims_are_left_out(tmp_path):
  path = tmp_path / 'RESULTS.md'
  table.write([CLAIM], {'one': rows()}, path)
  assert table.read([], path) == {}
