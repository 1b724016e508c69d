"""The registry of paper results: the cheap claims are measured here."""

import dataclasses
import pathlib

import pytest

from evals import claims
from studies import reproduce
from studies.papers import port, registry, table, verdicts

CHEAP = [
  claim
  for claim in registry.all_claims()
  if claim.seconds.get('cpu', 1e9) <= 5 and not claim.inputs
]


def setting(claim, tmp_path):
  return port.Setting(seeds=range(claim.seeds), workdir=tmp_path, inputs={})


@pytest.mark.parametrize('claim', CHEAP, ids=lambda claim: claim.name)
def test_a_cheap_claim_is_measured_as_the_table_says(claim, tmp_path):
  kept = {
    row.quantity: row for row in table.read(registry.all_claims())[claim.name]
  }
  for row in reproduce.measure(claim, setting(claim, tmp_path)):
    found = kept[row.quantity].found
    for name in ('value', 'low', 'high'):
      assert getattr(row.found, name) == pytest.approx(
        getattr(found, name), rel=1e-4, abs=1e-8
      )


def test_the_table_has_all_claims_that_need_no_training():
  rows = table.read(registry.all_claims())
  assert {claim.name for claim in CHEAP} <= set(rows)
  for claim in registry.all_claims():
    if claim.name in rows:
      measured = {row.quantity for row in rows[claim.name]}
      assert measured == {quantity.name for quantity in claim.quantities}


def test_a_wrong_published_value_is_not_reproduced(tmp_path):
  (voting,) = [claim for claim in CHEAP if claim.name == 'voting']
  wrong = dataclasses.replace(
    voting,
    quantities=(claims.digits('1 votes', '.6350'), *voting.quantities[1:]),
  )
  rows = reproduce.measure(wrong, setting(wrong, tmp_path))
  found = [
    verdicts.verdict(quantity, row.found)
    for quantity, row in zip(wrong.quantities, rows, strict=True)
  ]
  assert found == ['not reproduced', *['reproduced'] * 4]


def test_a_quantity_that_was_not_measured_is_refused(tmp_path):
  (voting,) = [claim for claim in CHEAP if claim.name == 'voting']
  more = dataclasses.replace(
    voting, quantities=(claims.digits('2 votes', '1'),)
  )
  with pytest.raises(ValueError, match='got no value of 2 votes'):
    reproduce.measure(more, setting(more, tmp_path))


def test_a_run_replaces_its_rows_and_keeps_the_others(tmp_path, capsys):
  path = tmp_path / 'RESULTS.md'
  of = {claim.name: claim for claim in CHEAP}
  for names in (['voting', 'repeated_data'], ['voting']):
    reproduce.run(
      [of[name] for name in names], {}, tmp_path, is_all=False, path=path
    )
  assert set(table.read(registry.all_claims(), path)) == {
    'voting',
    'repeated_data',
  }
  assert '3 votes: 0.645625, published .6456' in capsys.readouterr().out


def test_two_processes_keep_the_rows_of_each_other(tmp_path, monkeypatch):
  path = tmp_path / 'RESULTS.md'
  known = registry.all_claims()
  voting, other = (
    next(claim for claim in CHEAP if claim.name == name)
    for name in ('voting', 'kl_estimators')
  )
  real = reproduce.measure

  def measured(claim, found):
    # Another process writes its row while this one measures.
    rows = real(other, setting(other, tmp_path))
    table.write(known, {other.name: rows}, path)
    return real(claim, found)

  monkeypatch.setattr(reproduce, 'measure', measured)
  reproduce.run([voting], {}, tmp_path, is_all=False, path=path)
  assert set(table.read(known, path)) == {voting.name, other.name}


def test_a_claim_without_its_file_is_left_out_or_refused(tmp_path, capsys):
  (refit,) = registry.chosen(['chinchilla_refit'], '')
  path = tmp_path / 'RESULTS.md'
  reproduce.run([refit], {}, tmp_path, is_all=True, path=path)
  assert 'left out, it needs --inputs=points=PATH' in capsys.readouterr().out
  assert not path.exists()
  with pytest.raises(ValueError, match='expected --inputs=points=PATH'):
    reproduce.run([refit], {}, tmp_path, is_all=False, path=path)
  with pytest.raises(ValueError, match='names that a claim has'):
    reproduce.run([], {'other': 'x'}, tmp_path, is_all=True, path=path)


def test_budgets_choose_claims():
  assert registry.parse_budget('cpu-10m') == ('cpu', 600.0)
  assert registry.parse_budget('gpu-2h') == ('gpu', 7200.0)
  few = {claim.name for claim in registry.chosen(['all'], 'cpu-5s')}
  assert 'voting' in few
  assert 'muon_ahead' not in few
  on_gpu = registry.chosen(['all'], 'gpu-1h')
  assert [claim.name for claim in on_gpu] == [
    'isoflop_bytes_large', 'knowledge_capacity_large',
  ]  # fmt: skip
  assert registry.chosen(['all'], 'gpu-1m') == ()
  assert len(registry.chosen(['all'], '')) == len(registry.all_claims())


@pytest.mark.parametrize(
  ('names', 'budget', 'words'),
  [
    ([], '', 'got none'),
    (['votting'], '', "got 'votting'"),
    (['all', 'voting'], '', "got 'all'"),
    (['muon_ahead'], 'cpu-10s', 'takes about'),
    (['all'], 'cpu-10', 'a device and a time'),
  ],
)
def test_bad_command_lines_are_refused(names, budget, words):
  with pytest.raises(ValueError, match=words):
    registry.chosen(names, budget)


def test_inputs_are_files_with_names(tmp_path):
  (tmp_path / 'a').write_text('')
  assert reproduce.parse_inputs([f'points={tmp_path / "a"}']) == {
    'points': str(tmp_path / 'a')
  }
  for text, words in (('points', 'NAME=PATH'), ('points=/none', 'exists')):
    with pytest.raises(ValueError, match=words):
      reproduce.parse_inputs([text])


def test_every_claim_has_a_function_and_the_table_is_where_it_is_said():
  for claim in registry.all_claims():
    assert callable(registry.measure_of(claim))
  broken = dataclasses.replace(CHEAP[0], name='another')
  with pytest.raises(ValueError, match='got no function of this name'):
    registry.measure_of(broken)
  assert (
    pathlib.Path(reproduce.__file__).parents[1] / 'experiments/RESULTS.md'
  ) == table.PATH
