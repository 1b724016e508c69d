"""Log-probabilities of a reference: computed once, kept, counted, and right."""

import dataclasses
import itertools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data import batches as batches_lib
from frozen import freeze
from models import adapter_config, layout, transformer
from parallel import parallel_config
from storage import file_names
from tests.helpers import frozen_dirs, tiny_models
from tests.helpers.training import tiny_run
from training import assemble, experiment as experiment_lib
from training.frozen_inputs import reference
from training.objectives import next_token, port, token_loss
from training.reporting import metrics as metrics_lib

MODEL = tiny_models.llama_like(vocab_size=264, num_layers=2)
# Supervised fine-tuning that stays near its reference.
TIED = token_loss.TokenLoss(
  imitation_scale=1.0, distance_scale=0.1, distance='k3'
)


@pytest.fixture
def base(tmp_path):
  return _frozen(tmp_path / 'base')


def _frozen(directory, seed=0):
  """Writes a frozen directory, with the tokenizer of `tiny_run`."""
  params = transformer.Transformer(MODEL).init(
    jax.random.key(seed), jnp.zeros((1, 1), jnp.int32)
  )
  params, config = layout.unstack(params, MODEL)
  frozen_dirs.write(directory, params=params, config=config)
  return str(directory)


def _experiment(corpus, base, **fields):
  # A data directory beside the base: nothing is known from another test.
  place = str(pathlib.Path(base).parent / 'data')
  data = {'data_dir': place, **fields.pop('data', {})}
  return tiny_run.tuning(
    corpus, base, **{'objective': TIED, 'num_steps': 6, 'data': data, **fields}
  )


class _Passes:
  """Counts the forward passes of references."""

  def __init__(self, monkeypatch):
    self.count = 0
    score = reference._Scorer.__call__

    def counted(scorer, batch):
      self.count += 1
      return score(scorer, batch)

    monkeypatch.setattr(reference._Scorer, '__call__', counted)


@pytest.fixture
def passes(monkeypatch):
  return _Passes(monkeypatch)


def _described(workdir):
  return json.loads((workdir / file_names.DATA).read_text())['logprobs']


@pytest.mark.slow
def test_known_log_probabilities_are_not_computed_again(
  corpus, base, tmp_path, passes
):
  experiment = _experiment(corpus, base, data={'batch_size': 64})
  _, text = tiny_run.run(
    dataclasses.replace(experiment, num_steps=2), tmp_path / 'run'
  )
  train, held_out = _described(tmp_path / 'run')
  # One pass over all rows of both splits, whatever the epochs and evaluations.
  assert (train['source'], held_out['source']) == ('text_files', 'validation')
  assert train['forward_passes'] > 2
  assert held_out['forward_passes'] > 0
  count = train['forward_passes'] + held_out['forward_passes']
  assert passes.count == count
  assert f'of text_files: {train["forward_passes"]} forward passes' in text
  # A run that resumes has them, through further epochs.
  tiny_run.run(
    dataclasses.replace(experiment, num_steps=15),
    tmp_path / 'run',
  )
  speeds = [
    r for r in metrics_lib.read(tmp_path / 'run') if r['kind'] == 'speed'
  ]
  assert speeds[-1]['epochs/text_files'] > 2
  assert [x['forward_passes'] for x in _described(tmp_path / 'run')] == [0, 0]
  assert passes.count == count


@pytest.mark.slow
def test_values_follow_from_weights_tokens_and_numerics(
  corpus, base, tmp_path, passes
):
  def count(name, **fields):
    before = passes.count
    parts = _assembled(
      corpus, base, tmp_path / name, **{'place': tmp_path, **fields}
    )
    parts.batches.close()
    assert sum(x.forward_passes for x in parts.logprobs) == (
      passes.count - before
    )
    return passes.count - before

  first = count('first')
  assert first > 0
  # The rows of a batch and the seed change nothing.
  assert count('again', data={'batch_size': 16}, seed=3) == 0
  other = dataclasses.replace(
    TIED, reference=_frozen(tmp_path / 'other_base', seed=1)
  )
  assert count('reference', objective=other) == first
  assert count('numerics', compute_dtype='bfloat16') == first
  assert count('rows', data={'row_length': 8}) > first


@pytest.mark.slow
@pytest.mark.parametrize('form', ['float', 'int8'])
def test_adapters_start_at_their_reference(corpus, base, tmp_path, form):
  """A policy starts as its base is stored; so is its reference."""
  if form == 'int8':
    pytest.importorskip('qwix', reason='requirements-quant.txt')
  experiment = _experiment(
    corpus,
    base,
    adapter=adapter_config.AdapterConfig(rank=2, base=form),
    num_steps=2,
    freeze=experiment_lib.FreezeConfig(enabled=False),
  )
  tiny_run.run(experiment, tmp_path / 'run')
  records = metrics_lib.read(tmp_path / 'run')
  first = next(r for r in records if r['kind'] == 'train')
  assert first['distance'] == pytest.approx(0, abs=1e-9)
  whole = _experiment(corpus, base, num_steps=2)
  tiny_run.run(whole, tmp_path / 'whole')
  known = form == 'float'
  assert (_described(tmp_path / 'whole')[0]['forward_passes'] == 0) == known


def _logprobs(learner, params, batch):
  # Ids that the tokenizer does not have are masked.
  spare_ids = learner.model.config.spare_ids
  assert spare_ids
  config = dataclasses.replace(MODEL, spare_ids=spare_ids)
  model = port.Model(transformer.Transformer(config))
  hidden = model.hidden(
    params, batch['tokens'], batch['positions'], batch['segment_ids']
  )
  return model.token_logprobs(params, hidden.states_BTD, batch['targets'])


def _assembled(corpus, base, directory, place=None, **fields):
  """Returns the parts of a run.

  Args:
    directory: holds its workdir, and its data too, unless they have another
      place.
  """
  place = str((place or directory) / 'data')
  data = {'data_dir': place, **fields.pop('data', {})}
  experiment = _experiment(corpus, base, data=data, **fields)
  experiment.validate()
  (directory / 'run').mkdir(parents=True)
  return assemble.assemble(experiment, directory / 'run')


@pytest.mark.slow
@pytest.mark.parametrize(
  'packing', ['concat_then_split', 'best_fit', 'first_fit', 'none']
)
def test_the_array_of_a_batch_is_that_of_a_forward_pass(
  corpus, base, tmp_path, packing
):
  parts = _assembled(corpus, base, tmp_path, data={'packing': packing})
  params = transformer.Transformer(MODEL).init(
    jax.random.key(0), jnp.zeros((1, 1), jnp.int32)
  )
  for batches in (parts.batches, parts.eval_batches):
    for batch in itertools.islice(batches, 3):
      assert batch['ref_logprobs'].dtype == np.float32
      real_BT = batch['weights'] > 0
      # Other shapes are other programs, and round otherwise.
      np.testing.assert_allclose(
        batch['ref_logprobs'][real_BT],
        _logprobs(parts.learner, params, batch)[real_BT],
        atol=2e-5,
      )
      assert not np.any(batch['ref_logprobs'][batch['segment_ids'] == 0])
  parts.batches.close()


@pytest.mark.slow
@pytest.mark.parametrize(
  'parallel',
  [
    {'data': 2, 'context': 2, 'tensor': 2},
    {'kind': 'pmap'},
    pytest.param({'data': 2, 'stage': 2, 'fsdp': 2}, marks=pytest.mark.slow),
  ],
  ids=str,
)
def test_every_way_across_devices_computes_the_same(
  corpus, base, tmp_path, parallel
):
  def values(name, **fields):
    parts = _assembled(corpus, base, tmp_path / name, **fields)
    parts.batches.close()
    return [batch['ref_logprobs'] for batch in parts.eval_batches]

  expected = values('rows')
  got = values('many', parallel=parallel_config.ParallelConfig(**parallel))
  np.testing.assert_allclose(got, expected, atol=2e-5)
  assert np.ptp(expected) > 1


@pytest.mark.slow
def test_a_computation_that_was_cut_short_goes_on(
  corpus, base, tmp_path, passes, monkeypatch
):
  monkeypatch.setattr(reference, '_SECONDS_BETWEEN_PARTS', 0.0)
  whole = _assembled(corpus, base, tmp_path / 'whole')
  whole.batches.close()
  total, passes.count = passes.count, 0
  score = reference._Scorer.__call__

  def until_killed(scorer, batch):
    if passes.count == 3:
      raise KeyboardInterrupt
    return score(scorer, batch)

  with monkeypatch.context() as patch:
    patch.setattr(reference._Scorer, '__call__', until_killed)
    with pytest.raises(KeyboardInterrupt):
      _assembled(corpus, base, tmp_path / 'cut')
  (tmp_path / 'cut' / 'run').rename(tmp_path / 'cut' / 'before')
  parts = _assembled(corpus, base, tmp_path / 'cut')
  parts.batches.close()
  assert passes.count == total
  assert parts.logprobs[0].forward_passes == total - 3 - (
    parts.logprobs[1].forward_passes
  )
  for ours, theirs in zip(parts.eval_batches, whole.eval_batches, strict=True):
    np.testing.assert_array_equal(ours['ref_logprobs'], theirs['ref_logprobs'])
  left = list((tmp_path / 'cut' / 'data' / 'logprobs').glob('*.rows'))
  assert not left


@pytest.mark.slow
def test_a_damaged_file_is_refused(corpus, base, tmp_path):
  _assembled(corpus, base, tmp_path / 'one').batches.close()
  (path, *_) = (tmp_path / 'one' / 'data').glob('logprobs/*/logprobs.bin')
  data = bytearray(path.read_bytes())
  data[5] ^= 1
  path.write_bytes(data[:-4])
  (tmp_path / 'one' / 'run').rename(tmp_path / 'one' / 'before')
  with pytest.raises(
    ValueError, match='ref_logprobs of .*logprobs.bin: got .* bytes, expected'
  ):
    _assembled(corpus, base, tmp_path / 'one')


def test_rows_without_a_fixed_layout_are_refused(corpus, base, tmp_path):
  with pytest.raises(ValueError, match='data.packing: got windows, .* TokenL'):
    _assembled(corpus, base, tmp_path, data={'packing': 'windows'})


@pytest.mark.slow
def test_a_run_is_not_resumed_with_another_reference(corpus, base, tmp_path):
  tiny_run.run(_experiment(corpus, base, num_steps=2), tmp_path / 'run')
  recorded = json.loads((tmp_path / 'run' / file_names.RUN).read_text())
  assert recorded['lineage']['ref_logprobs'] == recorded['lineage']['init_from']
  other = _frozen(tmp_path / 'other', seed=1)
  objective = dataclasses.replace(TIED, reference=other)
  with pytest.raises(
    ValueError, match='objective.ref_logprobs: got a model with weights'
  ):
    tiny_run.run(
      _experiment(corpus, base, objective=objective), tmp_path / 'run'
    )


@pytest.mark.slow
def test_a_run_with_a_reference_resumes_bit_for_bit(corpus, base, tmp_path):
  schedule = dataclasses.replace(
    _experiment(corpus, base).optimizer, schedule='constant'
  )
  experiment = _experiment(corpus, base, optimizer=schedule)
  half = dataclasses.replace(experiment, num_steps=4)
  tiny_run.run(half, tmp_path / 'run')
  tiny_run.run(experiment, tmp_path / 'run')
  tiny_run.run(experiment, tmp_path / 'whole')
  resumed, whole = (
    freeze._restore_params(
      tmp_path / name / file_names.CHECKPOINTS / '6' / 'params'
    )
    for name in ('run', 'whole')
  )
  jax.tree.map(np.testing.assert_array_equal, resumed, whole)
  records = [
    r for r in metrics_lib.read(tmp_path / 'whole') if r['kind'] == 'train'
  ]
  assert {'imitation', 'distance', 'loss', 'tokens'} <= records[-1].keys()
  assert records[0]['distance'] == pytest.approx(0, abs=1e-6)
  assert records[-1]['distance'] > 1e-6


@pytest.mark.slow
def test_a_run_without_a_reference_computes_none(corpus, tmp_path, passes):
  tiny_run.run(
    tiny_run.experiment(corpus, objective=next_token.NextToken(), num_steps=2),
    tmp_path / 'run',
  )
  assert passes.count == 0
  assert not _described(tmp_path / 'run')


def test_a_rows_batches_cover_every_token_once(corpus, base, tmp_path):
  """What is scattered over the store is what was in the rows."""
  parts = _assembled(corpus, base, tmp_path)
  parts.batches.close()
  rows = parts.eval_batches.source
  batches = list(batches_lib.EvalBatches(rows, 4))
  values_N = rows.scattered([b['targets'].astype(np.float32) for b in batches])
  starts_D, ids_N = rows.store.starts_D, rows.store.ids_N
  # The first id of a document is no target.
  is_target_N = np.ones(len(ids_N), bool)
  is_target_N[starts_D[:-1] + np.arange(len(starts_D) - 1)] = False
  np.testing.assert_array_equal(values_N[is_target_N], ids_N[is_target_N])
