"""Whole runs of reward models: data, steps, evaluation, frozen models."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from data import sources
from evals import evaluate
from frozen import format as frozen_format, freeze
from inference import generate, model_port
from inference.engine import engine_config
from models import adapter_config
from storage import file_names
from tests.helpers import frozen_dirs, tiny_models
from tests.helpers.training import tiny_run
from training import experiment as experiment_lib
from training.checkpoints import init_from
from training.objectives import next_token, reward
from training.optimizer import chain
from training.reporting import metrics as metrics_lib

MODEL = tiny_models.llama_like(vocab_size=264, num_layers=1, max_length=128)


@pytest.fixture(scope='module')
def pairs(tmp_path_factory):
  """Writes pairs: a sum, right or wrong, and how wrong. Returns the path."""
  directory = tmp_path_factory.mktemp('pairs')
  rng = np.random.default_rng(0)
  for split, count in (('train', 60), ('validation', 12)):
    lines = []
    for _ in range(count):
      a, b, off = rng.integers(1, 9, 3).tolist()
      record = {
        'prompt': f'{a}+{b}?',
        'chosen': f'{a + b}.',
        'rejected': f'{a + b + off}!!',
        'margin': off / 8,
      }
      lines.append(json.dumps(record) + '\n')
    (directory / f'{split}.jsonl').write_text(''.join(lines))
  return directory / '{split}.jsonl'


@pytest.fixture(scope='module')
def make(pairs):
  """Returns a function of the fields that differ to an experiment."""

  def make(**fields):
    data = {
      'open_source': sources.jsonl,
      'examples': 'pairs',
      'packing': 'best_fit',
      'row_length': 128,
      'batch_size': 8,
      **fields.pop('data', {}),
    }
    return tiny_run.experiment(
      str(pairs),
      **{
        'model': dataclasses.replace(MODEL, scan_layers=True),
        'objective': reward.Reward(margin=1.0, centring=0.01),
        'optimizer': chain.OptimizerConfig(
          warmup_steps=0, schedule='constant', peak_lr=3e-3
        ),
        'num_steps': 8,
        'log_every_steps': 2,
        'eval_every_steps': 4,
        'checkpoint': experiment_lib.CheckpointConfig(every_steps=4),
        'data': data,
        **fields,
      },
    )

  return make


@pytest.fixture(scope='module')
def workdir(make, tmp_path_factory):
  """A run of eight steps."""
  directory = tmp_path_factory.mktemp('whole') / 'run'
  tiny_run.run(make(), directory)
  return directory


def _params(workdir, step):
  directory = workdir / file_names.CHECKPOINTS / str(step) / 'params'
  return freeze._restore_params(directory)


def _loaded(directory):
  config = engine_config.EngineConfig(
    max_sequences=2,
    decode_shapes=(2,),
    chunk_tokens=64,
    max_chunks=1,
    max_mixed_chunks=1,
  )
  return generate.load(directory, config, is_for_rewards=True)


@pytest.mark.slow
def test_a_run_resumes_bit_for_bit_with_its_head(make, workdir, tmp_path):
  tiny_run.run(make(num_steps=4), tmp_path / 'run')
  tiny_run.run(make(), tmp_path / 'run')
  resumed, whole = _params(tmp_path / 'run', 8), _params(workdir, 8)
  assert resumed.keys() == {'params', 'heads'}
  jax.tree.map(np.testing.assert_array_equal, resumed, whole)
  before = _params(workdir, 4)['heads']['reward']['kernel']
  assert np.abs(whole['heads']['reward']['kernel'] - before).max() > 0


@pytest.mark.slow
def test_a_run_reports_accuracy_with_its_error(workdir):
  records = metrics_lib.read(workdir)
  trained = [r for r in records if r['kind'] == 'train']
  assert trained[-1]['loss'] < trained[0]['loss']
  assert {'accuracy', 'margin', 'reward'} <= trained[0].keys()
  evaluated = [r for r in records if r['kind'] == 'eval']
  share = evaluated[-1]['accuracy']
  # 12 pairs are evaluated, all of them.
  assert share * 12 == pytest.approx(round(share * 12))
  expected = np.sqrt(share * (1 - share) / 11)
  assert evaluated[-1]['accuracy_error'] == pytest.approx(expected)
  assert 'bits_per_byte' not in evaluated[-1]


@pytest.mark.slow
def test_the_frozen_model_judges_as_training_evaluated(workdir, pairs):
  frozen = frozen_format.read(workdir / 'frozen')
  assert frozen.manifest.heads == ['reward']
  head = frozen.params['heads']['reward']['kernel']
  saved = _params(workdir, 8)['heads']['reward']['kernel']
  np.testing.assert_array_equal(head, saved)
  model = model_port.evaluated(_loaded(workdir / 'frozen'))
  path = str(pairs).format(split='validation')
  result = evaluate.run(f'judge:{path}', model)
  last = [r for r in metrics_lib.read(workdir) if r['kind'] == 'eval'][-1]
  accuracy = result.score('accuracy')
  assert accuracy.value == pytest.approx(last['accuracy'])
  assert accuracy.standard_error == pytest.approx(last['accuracy_error'])
  assert model.reward_fn
  assert model.encode_answer
  gaps = [
    np.subtract(*model.reward_fn([model.encode_answer(p, a) for a in answers]))
    for p, *answers in _records(path)
  ]
  assert np.mean(gaps) == pytest.approx(last['margin'], abs=1e-5)


def _records(path):
  with open(path) as file:
    for line in file:
      record = json.loads(line)
      yield record['prompt'], record['chosen'], record['rejected']


@pytest.mark.slow
def test_a_run_goes_on_from_a_frozen_reward_model(make, workdir, tmp_path):
  start = str(workdir / 'frozen')
  tokenizer = {'kind': 'directory', 'path': f'{start}/tokenizer'}
  again = make(init_from=start, num_steps=1, optimizer=_still())
  again.data.tokenizer = dataclasses.replace(again.data.tokenizer, **tokenizer)
  tiny_run.run(again, tmp_path / 'run')
  # With a learning rate of next to nothing, the head is the frozen one.
  kernel = _params(tmp_path / 'run', 1)['heads']['reward']['kernel']
  frozen = frozen_format.read(start)
  expected = frozen.params['heads']['reward']['kernel']
  np.testing.assert_allclose(kernel, expected, atol=1e-8)
  # It is no language model to go on from.
  text = dataclasses.replace(again, objective=next_token.NextToken())
  with pytest.raises(
    ValueError, match='config.init_from: got .*, a reward model, expected a lan'
  ):
    init_from.read(text)


def _still():
  return chain.OptimizerConfig(
    warmup_steps=0,
    schedule='constant',
    peak_lr=1e-12,
    weight_decay=0.0,
  )


@pytest.mark.slow
def test_a_reward_model_is_trained_with_adapters(make, tmp_path):
  base = tmp_path / 'base'
  frozen_dirs.write(base, config=MODEL)
  experiment = make(
    init_from=str(base),
    adapter=adapter_config.AdapterConfig(rank=2),
  )
  experiment.data.tokenizer = dataclasses.replace(
    experiment.data.tokenizer, kind='directory', path=f'{base}/tokenizer'
  )
  tiny_run.run(experiment, tmp_path / 'run')
  params = _params(tmp_path / 'run', 8)
  assert params.keys() == {'adapters', 'heads'}
  frozen = frozen_format.read(tmp_path / 'run' / 'frozen')
  assert frozen.manifest.heads == ['reward']
  np.testing.assert_array_equal(
    frozen.params['heads']['reward']['kernel'],
    params['heads']['reward']['kernel'],
  )
  last = [r for r in metrics_lib.read(tmp_path / 'run') if r['kind'] == 'eval']
  assert 0 <= last[-1]['accuracy'] <= 1
  with pytest.raises(
    ValueError, match='freeze.merge_adapter: got False for a reward model'
  ):
    freeze.freeze_checkpoint(
      tmp_path / 'run', out=tmp_path / 'adapter', merge_adapter=False
    )
