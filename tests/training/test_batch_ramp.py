"""A run whose batches grow, over a mixture: trained, resumed, and counted."""

import dataclasses
import io
import json
import re

import jax
import numpy as np
import pytest
import rich.console

from data import data_config, sources
from storage import file_names
from tests.helpers import tiny_models
from training import (
  experiment as experiment_lib,
  learner as learner_lib,
  run as run_lib,
)
from training.optimizer import chain
from training.planning import plan
from training.reporting import metrics, reporter as reporter_lib

RAMP = ((0, 8), (2, 16))
NUM_STEPS = 5


@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
  """Two sources and a text to evaluate on, which one of them holds."""
  directory = tmp_path_factory.mktemp('corpus')
  rng = np.random.default_rng(0)
  for name in ('code', 'prose'):
    lines = [
      json.dumps({'text': ''.join(map(chr, rng.integers(97, 123, size=90)))})
      for _ in range(30)
    ]
    (directory / f'{name}.jsonl').write_text('\n'.join(lines))
  (directory / 'validation.jsonl').write_text('\n'.join(lines[:3]))
  return directory


def _experiment(corpus, data_dir, **data_fields):
  def source(name, weight):
    return data_config.SourceConfig(
      open_source=sources.jsonl,
      path=str(corpus / f'{name}.jsonl'),
      split='all',
      weight=weight,
      name=name,
    )

  fields = {
    'open_source': sources.jsonl,
    'path': str(corpus / '{split}.jsonl'),
    'sources': (source('code', 3.0), source('prose', 1.0)),
    'data_dir': str(data_dir),
    'row_length': 16,
    'batch_size': 16,
    'batch_ramp': RAMP,
  }
  return experiment_lib.Experiment(
    name='ramp',
    model=tiny_models.llama_like(vocab_size=264, num_layers=1),
    data=data_config.DataConfig(**(fields | data_fields)),
    optimizer=chain.OptimizerConfig(warmup_steps=2),
    num_steps=NUM_STEPS,
    log_every_steps=1,
    eval_every_steps=0,
    checkpoint=experiment_lib.CheckpointConfig(every_steps=3),
    freeze=experiment_lib.FreezeConfig(enabled=False),
  )


def _run(experiment, workdir):
  console = rich.console.Console(file=io.StringIO(), width=300)
  result = run_lib.run(experiment, workdir, console)
  return result, console.file.getvalue()


def _records(workdir, kind):
  return [r for r in metrics.read(workdir) if r['kind'] == kind]


@pytest.fixture(scope='module')
def whole(corpus, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('whole')
  data_dir = tmp_path_factory.mktemp('data')
  _, printed = _run(_experiment(corpus, data_dir), workdir)
  return workdir, data_dir, printed


@pytest.mark.slow
def test_tokens_are_those_of_every_size(whole):
  workdir, _, printed = whole
  tokens = [r['tokens'] for r in _records(workdir, 'train')]
  # But for the end of the last row of each source every target is real.
  assert tokens[:2] == pytest.approx([128, 128], abs=15)
  assert tokens[2:] == pytest.approx([256, 256, 256], abs=30)
  assert '8 -> 16 rows x 16 = 128 -> 256 tokens' in printed
  shown = re.search(r'steps, ([\d,]+) tokens in 1,024 positions', printed)
  # Estimated before the run, by the fill rate of each source.
  assert int(shown[1].replace(',', '')) == pytest.approx(sum(tokens), abs=60)


def test_epochs_and_fill_rates_of_each_source_are_told(whole):
  workdir, _, printed = whole
  speed = _records(workdir, 'speed')[-1]
  # 30 documents of 91 pairs are 171 rows of 16; 64 rows were taken.
  assert speed['epochs/code'] == pytest.approx(48 / 171)
  assert speed['epochs/prose'] == pytest.approx(16 / 171)
  assert 'concat_then_split fills 99.78% of 171 rows' in printed
  assert 'code 0.281, prose 0.0936' in printed
  described = json.loads((workdir / file_names.DATA).read_text())
  assert [s['name'] for s in described['sources']] == ['code', 'prose']
  mix = json.loads((workdir / file_names.RUN).read_text())['data_mix']
  assert [(m['source'], m['weight']) for m in mix] == [
    ('data.sources.jsonl', 3.0),
    ('data.sources.jsonl', 1.0),
  ]


def test_evaluation_text_that_is_trained_on_is_warned_of(whole):
  workdir, _, printed = whole
  lines = [x for x in printed.split('\n') if 'of the evaluation text' in x]
  assert lines[0].startswith('overlap')
  assert lines[1].startswith('WARNING')
  assert '100.00%' in lines[1]
  assert '3 of its 3 documents are copied' in lines[1]
  found = json.loads((workdir / file_names.DATA).read_text())['contamination']
  assert [overlap['share'] for overlap in found] == [0, 1]


def _killed_after(step, experiment, workdir):
  class Killed(Exception):
    pass

  def die(reporter, taken, step_metrics):
    real_add(reporter, taken, step_metrics)
    if taken == step:
      reporter.flush()
      raise Killed

  real_add = reporter_lib.Reporter.add
  reporter_lib.Reporter.add = die
  try:
    with pytest.raises(Killed):
      _run(experiment, workdir)
  finally:
    reporter_lib.Reporter.add = real_add


@pytest.mark.slow
def test_a_resumed_ramp_is_the_uninterrupted_one(corpus, whole, tmp_path):
  workdir, data_dir, _ = whole
  experiment = _experiment(corpus, data_dir)
  _killed_after(4, experiment, tmp_path)
  _, printed = _run(experiment, tmp_path)
  assert 'resumed    after step 3' in printed
  assert _records(tmp_path, 'train') == _records(workdir, 'train')
  assert _records(tmp_path, 'eval') == _records(workdir, 'eval')


@pytest.mark.slow
def test_weights_may_change_on_resume(corpus, whole, tmp_path):
  workdir, data_dir, _ = whole
  experiment = _experiment(corpus, data_dir)
  _killed_after(4, experiment, tmp_path)
  for source in experiment.data.sources:
    source.weight = 1.0
  _run(experiment, tmp_path)
  before, after = _records(workdir, 'train'), _records(tmp_path, 'train')
  assert after[:3] == before[:3]
  assert after[3]['loss'] != before[3]['loss']
  # 32 rows until step 3 by 3 : 1, and 32 by 1 : 1.
  speed = _records(tmp_path, 'speed')[-1]
  assert speed['epochs/code'] == pytest.approx((24 + 16) / 171)


def test_every_size_of_a_ramp_has_to_fit_the_devices(corpus, tmp_path):
  experiment = _experiment(corpus, tmp_path, batch_ramp=((0, 4), (2, 16)))
  with pytest.raises(
    ValueError, match='data.batch_ramp: got 4 rows in 1 micro'
  ):
    learner_lib.make(experiment, jax.devices()[:8])
  changed = dataclasses.replace(experiment, num_microbatches=8)
  with pytest.raises(
    ValueError,
    match='got 8, expected a divisor of a size of data.batch_ramp = 4',
  ):
    changed.validate()


def test_a_source_without_text_is_refused_before_anything_is_written(
  corpus, tmp_path
):
  (corpus / 'empty.jsonl').write_text('{"text": ""}\n')
  experiment = _experiment(corpus, tmp_path / 'data')
  experiment.data.sources[1].path = str(corpus / 'empty.jsonl')
  with pytest.raises(ValueError, match='prose: got 1 documents without any t'):
    _run(experiment, tmp_path / 'run')
  experiment.data.sources[1].weight = 0.0
  with pytest.raises(ValueError, match=r'got weight 0\.0 for prose, expected'):
    _run(experiment, tmp_path / 'run')
  assert not (tmp_path / 'run' / 'run.json').exists()
  assert not (tmp_path / 'data').exists()


def test_a_plan_counts_the_tokens_of_the_ramp(corpus, tmp_path):
  made = plan.make(_experiment(corpus, tmp_path))
  assert made.tokens == 16 * (2 * 8 + 3 * 16)
