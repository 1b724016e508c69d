"""Whole runs of preferences: data, reference, steps, evaluation, resumption."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from data import data_config
from data.examples import encoding
from frozen import freeze
from storage import file_names
from tests.helpers import frozen_dirs, tiny_models
from tests.helpers.training import tiny_experiment, tiny_run
from training import experiment as experiment_lib, learner as learner_lib
from training.frozen_inputs import reference
from training.objectives import next_token, port, preference
from training.optimizer import chain
from training.reporting import metrics as metrics_lib, summary

MODEL = tiny_models.llama_like(vocab_size=264, num_layers=1, max_length=64)


class Records:
  """Pairs of answers, or labelled ones: a sum, right or wrong."""

  def __init__(self, count, seed):
    rng = np.random.default_rng(seed)
    self._numbers = rng.integers(0, 9, (count, 3)).tolist()

  def __len__(self):
    return len(self._numbers)

  def __getitem__(self, index):
    a, b, off = self._numbers[index]
    record = {
      'prompt': f'{a}+{b}=',
      'chosen': f'{a + b}.',
      'rejected': f'{a + b + 1 + off}!!',
      'label': bool(index % 3),
    }
    return {'record': record, 'id': f'line {index}'}

  def fingerprint(self):
    return json.dumps(self._numbers)


def open_records(path, split, data_dir, text_key):
  """Opens the records; a source of an experiment."""
  del path, data_dir, text_key
  return Records(40 if split == 'train' else 9, seed=len(split))


class Bytes:
  """Encodes records without a chat template."""

  def __init__(self, tokenizer, template, kind):
    del template
    self.tokenizer, self.kind = tokenizer, kind

  def digest(self):
    return 'bytes'

  def _document(self, prompt, completion):
    prompt_ids = [self.tokenizer.bos_id, *prompt.encode()]
    answer = [*completion.encode(), self.tokenizer.eos_id]
    ids = np.array([*prompt_ids, *answer, self.tokenizer.pad_id])
    trained = np.zeros(len(ids), bool)
    trained[len(prompt_ids) : -1] = True
    return encoding.Document(ids, trained)

  def unit(self, record, where, other=None):
    del where
    prompt, chosen = record['prompt'], record['chosen']
    if self.kind == 'pairs':
      answers, streams = (chosen, record['rejected']), {}
    else:
      own = chosen if record['label'] else record['rejected']
      answers = own, other['chosen']
      streams = {'labels': (1.0 if record['label'] else -1.0, 0.0)}
    return encoding.Unit(
      tuple(self._document(prompt, answer) for answer in answers), streams
    )


@pytest.fixture
def experiment(tmp_path, monkeypatch):
  """Returns a function of a loss to the experiment that trains with it."""
  monkeypatch.setattr(encoding, 'Encoder', Bytes)
  params = frozen_dirs.params(MODEL)
  frozen_dirs.write(tmp_path / 'base', params=params, config=MODEL)

  def make(loss, **fields):
    return experiment_lib.Experiment(
      **{
        'name': 'preferences',
        'model': dataclasses.replace(MODEL, scan_layers=True),
        'data': data_config.DataConfig(
          open_source=open_records,
          path='-',
          data_dir=str(tmp_path / 'data'),
          examples='labelled' if loss == 'kto' else 'pairs',
          packing='best_fit',
          row_length=64,
          batch_size=8,
          tokenizer=data_config.TokenizerConfig(
            kind='directory', path=str(tmp_path / 'base' / 'tokenizer')
          ),
        ),
        'optimizer': chain.OptimizerConfig(
          warmup_steps=0, schedule='constant', peak_lr=3e-3, end_lr=0.0001
        ),
        'init_from': str(tmp_path / 'base'),
        'objective': preference.Preference(loss=loss),
        'num_steps': 8,
        'log_every_steps': 2,
        'eval_every_steps': 4,
        'checkpoint': experiment_lib.CheckpointConfig(every_steps=2),
        **fields,
      }
    )

  return make


def _params(workdir, step):
  directory = workdir / file_names.CHECKPOINTS / str(step) / 'params'
  return freeze._restore_params(directory)


@pytest.mark.slow
@pytest.mark.parametrize('loss', ['dpo', 'kto'])
def test_a_run_resumes_bit_for_bit_and_learns(experiment, tmp_path, loss):
  whole = experiment(loss)
  half = dataclasses.replace(whole, num_steps=4)
  tiny_run.run(half, tmp_path / 'run')
  tiny_run.run(whole, tmp_path / 'run')
  tiny_run.run(whole, tmp_path / 'whole')
  jax.tree.map(
    np.testing.assert_array_equal,
    _params(tmp_path / 'run', 8),
    _params(tmp_path / 'whole', 8),
  )
  records = metrics_lib.read(tmp_path / 'whole')
  trained = [r for r in records if r['kind'] == 'train']
  # It begins at the reference.
  start = 0.5 if loss == 'kto' else np.log(2)
  assert trained[0]['loss'] == pytest.approx(start, abs=1e-5)
  assert trained[0]['chosen_reward'] == pytest.approx(0, abs=1e-4)
  assert trained[-1]['chosen_reward'] > trained[-1]['rejected_reward']
  evaluated = [r for r in records if r['kind'] == 'eval']
  assert evaluated[-1]['loss'] < start
  assert evaluated[-1]['accuracy'] > 0.7
  assert 'bits_per_byte' not in evaluated[-1]
  # Tokens are the targets that are trained, not pairs.
  assert trained[0]['tokens'] > 4 * 8
  resumed = [
    r for r in metrics_lib.read(tmp_path / 'run') if r['kind'] == 'eval'
  ]
  for name, value in evaluated[-1].items():
    if name not in ('time', 'at'):
      assert resumed[-1][name] == value, name


@pytest.mark.slow
def test_a_run_without_a_reference_needs_no_frozen_model(experiment, tmp_path):
  tiny_run.run(experiment('simpo', init_from=''), tmp_path / 'run')
  described = json.loads((tmp_path / 'run' / file_names.DATA).read_text())
  assert described['logprobs'] == []
  with pytest.raises(ValueError, match='no frozen model for ref_logprobs'):
    tiny_run.run(experiment('dpo', init_from=''), tmp_path / 'other')


def test_dropout_beside_a_reference_is_told(experiment):
  noisy = dataclasses.replace(MODEL, dropout_rate=0.1)
  rows = summary._warn_of_dropout(experiment('dpo', model=noisy))
  assert [name for name, _ in rows] == ['WARNING']
  assert 'dropout 0.1 is on in the model and off in its reference' in rows[0][1]
  assert not summary._warn_of_dropout(experiment('dpo'))
  assert not summary._warn_of_dropout(experiment('simpo', model=noisy))


@pytest.mark.slow
def test_the_evaluation_split_has_its_reference_too(
  experiment, tmp_path, monkeypatch
):
  counted = []
  score = reference._Scorer.__call__

  def count(scorer, batch):
    counted.append(1)
    return score(scorer, batch)

  monkeypatch.setattr(reference._Scorer, '__call__', count)
  for loss in ('dpo', 'ipo', 'robust'):
    tiny_run.run(experiment(loss, num_steps=2), tmp_path / loss)
  # One computation serves all losses of the same pairs.
  described = [
    json.loads((tmp_path / loss / file_names.DATA).read_text())['logprobs']
    for loss in ('dpo', 'ipo', 'robust')
  ]
  passes = [[x['forward_passes'] for x in each] for each in described]
  assert passes[0][0] > 0
  assert passes[0][1] > 0
  assert passes[1:] == [[0, 0], [0, 0]]
  assert len(counted) == sum(passes[0])


@dataclasses.dataclass(frozen=True, kw_only=True)
class WithModel(preference.Preference):
  """DPO that computes its reference in each step: what is avoided."""

  def batch_spec(self):
    return port.TOKEN_ROWS

  def totals(self, params, batch, model, **others):
    return None

  def __call__(self, params, batch, model, **others):
    frozen = jax.lax.stop_gradient(params)
    hidden = model.hidden(
      frozen, batch['tokens'], batch['positions'], batch['segment_ids']
    )
    ref_BT = model.token_logprobs(frozen, hidden.states_BTD, batch['targets'])
    return super().__call__(params, {**batch, 'ref_logprobs': ref_BT}, model)


@pytest.mark.slow
def test_forward_passes_of_a_step_are_counted():
  """By the step's FLOPs: a backward pass costs two forward ones."""

  def passes(objective):
    learner = learner_lib.make(
      tiny_experiment.make(
        model=dataclasses.replace(MODEL, num_layers=2),
        data={'row_length': 64},
        objective=objective,
      ),
      jax.devices()[:1],
    )
    # Before XLA, which finds equal passes where a batch is not cut up.
    step = learner.build_train_step(lambda x: x, lambda key: key)
    lowered = jax.jit(step).lower(
      learner.abstract_state, learner.batch_shapes()
    )
    return lowered.cost_analysis()['flops']

  one_third = passes(next_token.NextToken()) / 3

  def of(objective):
    return passes(objective) / one_third

  # Chunks of logits are computed again in the backward pass.
  dpo = of(preference.Preference(loss='dpo'))
  assert dpo == pytest.approx(3, abs=0.5)
  for loss in ('ipo', 'orpo', 'simpo', 'cpo'):
    assert of(preference.Preference(loss=loss)) == pytest.approx(dpo, abs=0.05)
  # The mean log ratio of mismatched answers comes before the loss of any.
  assert of(preference.Preference(loss='kto')) == pytest.approx(
    dpo + 1, abs=0.1
  )
  assert of(WithModel()) == pytest.approx(dpo + 1, abs=0.1)
