"""Metrics files, the loss curve, validation figures, flag errors."""

import io
import json
import math
import pathlib
import sys

import numpy as np
import pytest
import rich.console

from storage import file_names
from tests.helpers import commands, tiny_models
from training import flags as flags_lib
from training.evaluation import validation
from training.reporting import metrics, terminal as terminal_lib

ROOT = pathlib.Path(__file__).parents[3]


def test_records_after_the_checkpoint_are_dropped_on_resume(tmp_path):
  log = metrics.Log(tmp_path, first_step=0)
  for step in (1, 2, 3):
    log.write('train', step, {'loss': 1.0 / step})
  log.close()
  with (tmp_path / file_names.METRICS).open('a') as file:
    file.write('{"kind": "tr')  # cut short by a kill
  log = metrics.Log(tmp_path, first_step=2)
  log.write('train', 3, {'loss': 0.5})
  log.close()
  assert metrics.read(tmp_path) == [
    {'kind': 'train', 'step': 1, 'loss': 1.0},
    {'kind': 'train', 'step': 2, 'loss': 0.5},
    {'kind': 'train', 'step': 3, 'loss': 0.5},
  ]


@pytest.mark.parametrize(
  'damage',
  [
    b'\0' * 300,
    b'\0\n\0\n' + b'\0' * 40,
    b'{"kind": "train", "st' + b'\0' * 40,
    b'\0' * 40 + b'ain", "step": 2}',
  ],
)
def test_lines_that_a_power_loss_left_are_skipped_and_said(tmp_path, damage):
  path = tmp_path / file_names.METRICS
  first, last = ({'kind': 'train', 'step': step} for step in (1, 3))
  lines = json.dumps(first).encode(), damage, json.dumps(last).encode()
  path.write_bytes(b'\n'.join(lines) + b'\n')
  said = []
  assert metrics.read(tmp_path, said.append) == [first, last]
  assert len(said) == 1
  assert said[0].startswith(f'{path}, line 2: got ')
  assert 'such lines are skipped' in said[0]
  log = metrics.Log(tmp_path, first_step=3, tell=said.append)
  log.write('train', 4, {})
  log.close()
  # The file is whole again.
  assert len(said) == 2
  assert [r['step'] for r in metrics.read(tmp_path, said.append)] == [1, 3, 4]
  assert len(said) == 2


def test_a_record_behind_a_lost_block_is_kept(tmp_path):
  path = tmp_path / file_names.METRICS
  path.write_bytes(b'\0' * 20 + b'{"kind": "train", "step": 7}\n\0\0')
  assert metrics.read(tmp_path) == [{'kind': 'train', 'step': 7}]


def test_tensorboard_gets_the_same_values(tmp_path):
  from tensorboardX.proto import event_pb2

  log = metrics.Log(tmp_path, first_step=0)
  log.write('train', 1, {'loss': 0.25})
  log.close()
  (path,) = (tmp_path / 'tensorboard').iterdir()
  data, values = path.read_bytes(), []
  while data:  # length (8 bytes), its checksum (4), event, checksum (4)
    length = int.from_bytes(data[:8], 'little')
    event = event_pb2.Event.FromString(data[12 : 12 + length])
    values += [(v.tag, event.step, v.simple_value) for v in event.summary.value]
    data = data[16 + length :]
  assert values == [('train/loss', 1, 0.25)]


def test_sparkline_shows_the_shape():
  assert terminal_lib.sparkline([]) == ''
  assert terminal_lib.sparkline([1.0]) == '▁'
  assert terminal_lib.sparkline([8.0, 6.0, 4.0, 1.0]) == '█▆▄▁'
  assert len(terminal_lib.sparkline(list(range(1000)))) == 60


def test_plain_output_has_a_line_per_report():
  out = io.StringIO()
  console = rich.console.Console(file=out)
  with terminal_lib.Terminal(console, num_steps=100) as terminal:
    terminal.update(1, 3.0, {})
    terminal.update(
      40,
      2.0,
      {
        'tokens_per_s': 1234.5,
        'mfu': 0.5,
        'seconds_per_step': 61.0,
        'goodput': 0.931,
      },
    )
    terminal.update(
      50,
      2.0,
      {
        'tokens_per_s': 1000.0,
        'mfu': 0.1,
        'positions_per_s': 4200.0,
        'positions_mfu': 0.42,
        'seconds_per_step': 1.0,
        'goodput': 1.0,
      },
    )
  assert out.getvalue().splitlines() == [
    'step 1/100 | loss 3.0000',
    'step 40/100 | loss 2.0000 | 1,234 tokens/s | MFU 50.0% | goodput 93%'
    ' | 1h01m left',
    'step 50/100 | loss 2.0000 | 1,000 tokens/s (4,200 with padding)'
    ' | MFU 10.0% (42.0% with padding) | goodput 100% | 0m50s left',
  ]


def test_bits_per_byte_from_a_known_distribution():
  """A uniform model of 8 tokens: 3 bits per token, 2 bytes each."""
  num_bytes_V = np.array([2, 2, 2, 2, 2, 2, 2, 0])
  batch = tiny_models.batch(vocab_size=7, num_padding=5)

  def eval_step(params, batch):
    del params
    weight = batch['weights'].sum()
    return {'loss': weight * math.log(8), 'weight': weight}

  def run(batches, **args):
    return validation.evaluate(
      eval_step,
      None,
      batches,
      put_batch=lambda b: b,
      num_bytes_V=num_bytes_V,
      **args,
    )

  values = run([batch, batch])
  assert values['loss'] == pytest.approx(math.log(8))
  assert values['bits_per_byte'] == pytest.approx(1.5)
  # The special token costs bits and has no bytes.
  batch['targets'][:, 0] = 7
  assert run([batch])['bits_per_byte'] == pytest.approx(1.5 * 11 / 10)
  wrong = {**batch, 'weights': batch['weights'] * np.nan}
  assert run([batch, wrong], max_batches=1)['loss'] == values['loss']
  with pytest.raises(ValueError, match='got no text, expected at least one'):
    run([])


QUICKSTART = '--config=experiments/quickstart.py'


@pytest.mark.parametrize(
  ('args', 'message'),
  [
    (
      [QUICKSTART, '--config.optimizer.lr=1'],
      "--config.optimizer.lr: got the unknown field 'lr', expected one of"
      ' rule, peak_lr, end_lr',
    ),
    (
      [QUICKSTART, '--config.optimiser.peak_lr=1'],
      "got the unknown field 'optimiser', expected one of name, model, data",
    ),
    (
      [QUICKSTART, '--config.num_steps=many'],
      'num_steps=many: expected an int',
    ),
    ([QUICKSTART, '--config.num_steps=1.5'], 'num_steps=1.5: expected an int'),
    ([QUICKSTART, '--config.optimizer.peak_lr=big'], 'big: expected a number'),
    (
      [QUICKSTART, '--config.freeze.enabled=maybe'],
      'enabled=maybe: expected true or false',
    ),
    (
      [QUICKSTART, '--config.objective=x'],
      '--config.objective: got a value, expected none: it is chosen in the',
    ),
    (
      [QUICKSTART, '--config.data.sources[5].weight=1'],
      '--config.data.sources[5].weight: got the index [5], expected none: it'
      ' has no entries',
    ),
    (
      [QUICKSTART, '--config.data.sources[-1].weight=1'],
      '--config.data.sources[-1]: got an index below 0, expected one counted',
    ),
    (['--config=experiments/shakespeare_char.py:tpu'], "got 'tpu', expected"),
    (['--config=experiments/none.py'], 'none.py'),
    ([QUICKSTART, '--wrkdir=x'], "Unknown command line flag 'wrkdir'"),
  ],
)
def test_flag_errors_are_one_line(args, message, monkeypatch):
  from absl import flags
  from ml_collections import config_flags as library

  argv = ['train.py', *args]
  monkeypatch.setattr(sys, 'argv', argv)
  monkeypatch.chdir(ROOT)
  values = flags.FlagValues()
  library.DEFINE_config_file('config', flag_values=values)
  with pytest.raises(flags_lib.FlagError) as caught:
    flags_lib.parse(argv, values)
  assert message in str(caught.value)
  assert '\n' not in str(caught.value)


def test_the_command_line_reports_errors_in_one_line(tmp_path):
  result = commands.run(
    'train.py', QUICKSTART, '--config.seed=x', f'--workdir={tmp_path}'
  )
  assert result.returncode != 0
  assert result.stderr.startswith('error: ')
  assert result.stderr.count('\n') == 1
  result = commands.run(
    'train.py',
    QUICKSTART,
    '--config.num_steps=0',
    f'--workdir={tmp_path / "run"}',
  )
  assert result.returncode == 1
  assert result.stderr.splitlines()[-1] == (
    'error: config.num_steps: got 0, expected at least 1'
  )
  assert not (tmp_path / 'run').exists()


def test_records_are_json(tmp_path):
  log = metrics.Log(tmp_path, first_step=0)
  log.write('eval', 5, {'loss': 1.5})
  log.close()
  text = (tmp_path / file_names.METRICS).read_text()
  assert json.loads(text) == {'kind': 'eval', 'step': 5, 'loss': 1.5}
