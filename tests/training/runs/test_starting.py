"""What a start refuses, says has changed, and leaves behind: no trace."""

import dataclasses
import os
import shutil
import subprocess
import sys
import textwrap

import jax
import pytest

from data import data_config
from frozen import format as frozen_format
from storage import atomic, disk, locks
from tests.helpers.training import tiny_run
from training import experiment, run as run_lib
from training.checkpoints import workdir as workdir_lib
from training.optimizer import chain, update_rules
from training.reporting import goodput


@pytest.fixture(scope='module')
def complete(corpus, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('complete')
  tiny_run.run(tiny_run.experiment(corpus, num_steps=4), workdir)
  return workdir


@pytest.fixture
def copy(complete, tmp_path):
  shutil.copytree(complete, tmp_path / 'run')
  return tmp_path / 'run'


def _files(workdir):
  return {
    path.relative_to(workdir): path.read_bytes()
    for path in workdir.rglob('*')
    if path.is_file() and path.name != '.lock'
  }


_HOLD = textwrap.dedent(
  """
  import pathlib, sys
  from training.checkpoints import workdir
  with workdir.held(pathlib.Path(sys.argv[1])):
    print('held', flush=True)
    sys.stdin.read()
  """
)


@pytest.fixture
def held(tmp_path):
  """A workdir that another process writes into."""
  workdir = tmp_path / 'held'
  with subprocess.Popen(
    [sys.executable, '-c', _HOLD, str(workdir)],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
  ) as process:
    assert process.stdout.readline() == b'held\n'
    yield workdir, process
    if process.poll() is None:
      process.kill()


@pytest.mark.slow
def test_two_runs_do_not_share_a_workdir(corpus, held):
  workdir, process = held
  with pytest.raises(
    locks.InUseError,
    match=rf'got a directory that process {process.pid} of \S+ writes into,'
    ' expected one that no run is using; wait for it, stop it, or use another',
  ):
    tiny_run.run(tiny_run.experiment(corpus, num_steps=4), workdir)
  process.kill()
  process.wait()
  result, _ = tiny_run.run(tiny_run.experiment(corpus, num_steps=4), workdir)
  assert result.step == 4


def test_a_file_system_without_locks_is_told_of(tmp_path, monkeypatch):
  def no_locks(descriptor, operation):
    raise OSError(95, 'Operation not supported')

  monkeypatch.setattr(locks.fcntl, 'flock', no_locks)
  told = []
  with workdir_lib.held(tmp_path / 'run', told.append):
    pass
  assert 'expected a file system with locks' in told[0]


def test_a_start_that_fails_leaves_nothing(corpus, tmp_path):
  large = dataclasses.replace(tiny_run.experiment(corpus).model, vocab_size=200)
  for change in (
    {'model': large},
    {'data': {'path': str(tmp_path / '{split}.txt')}},
  ):
    with pytest.raises((ValueError, FileNotFoundError)):
      tiny_run.run(tiny_run.experiment(corpus, **change), tmp_path / 'run')
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_what_a_kill_leaves_before_run_json_is_started_over(corpus, tmp_path):
  workdir = tmp_path / 'run'
  (workdir / 'tokenizer').mkdir(parents=True)
  (workdir / 'tokenizer' / 'tokenizer_config.json').write_text('{"ki')
  with pytest.raises(ValueError, match='a directory with other files in it'):
    tiny_run.run(tiny_run.experiment(corpus, num_steps=4), workdir)
  (workdir / '.lock').touch()
  result, _ = tiny_run.run(tiny_run.experiment(corpus, num_steps=4), workdir)
  assert result.step == 4


@pytest.mark.slow
@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (
      {
        'optimizer': chain.OptimizerConfig(
          rule=update_rules.Lion(), warmup_steps=2
        )
      },
      r'was trained with another optimizer or model: .*optimizer.rule.type: got'
      r" '[\w.]*Lion', before '[\w.]*AdamW'.*; set back the fields that"
      ' change their state',
    ),
    ({'data': {'row_length': 8}}, 'the saved data position has row_length 16'),
  ],
)
def test_a_resume_that_is_refused_changes_nothing(
  corpus, copy, change, message
):
  before = _files(copy)
  with pytest.raises(ValueError, match=message):
    tiny_run.run(tiny_run.experiment(corpus, num_steps=6, **change), copy)
  assert _files(copy) == before


@pytest.mark.slow
def test_a_resume_says_what_it_has_otherwise(corpus, copy):
  optimizer = chain.OptimizerConfig(warmup_steps=2, peak_lr=2e-3)
  _, printed = tiny_run.run(
    tiny_run.experiment(corpus, num_steps=6, optimizer=optimizer), copy
  )
  assert 'changed    num_steps: got 6, before 4' in printed
  assert 'optimizer.peak_lr: got 0.002, before ' in printed


@pytest.mark.slow
def test_a_complete_run_says_what_it_makes_no_use_of(corpus, copy):
  before = _files(copy)
  optimizer = chain.OptimizerConfig(warmup_steps=1, peak_lr=2e-3)
  _, printed = tiny_run.run(
    tiny_run.experiment(corpus, num_steps=3, optimizer=optimizer), copy
  )
  assert 'taken 4 steps, more than config.num_steps = 3:' in printed
  assert (
    'no step is left to take, so these values have no effect: optimizer.peak_lr'
    ': got'
    ' 0.002'
  ) in printed
  assert 'is complete: step 4' in printed
  assert _files(copy) == before


def test_a_complete_run_is_frozen_as_it_is_asked_for_now(corpus, copy):
  freezing = experiment.FreezeConfig(dtype='bfloat16', max_tokens=7)
  asked = tiny_run.experiment(corpus, num_steps=4, freeze=freezing)
  _, printed = tiny_run.run(asked, copy)
  assert 'has freeze.dtype = float32, not bfloat16: freezing' in printed
  frozen = frozen_format.read(copy / 'frozen')
  assert frozen.manifest.dtype == 'bfloat16'
  assert frozen.generation['max_tokens'] == 7
  _, printed = tiny_run.run(asked, copy)
  assert 'freezing' not in printed


def test_a_damaged_hand_over_is_named_and_made_again(corpus, copy):
  weights = next((copy / 'frozen' / 'params').rglob('d/*'))
  weights.write_bytes(b'')
  _, printed = tiny_run.run(tiny_run.experiment(corpus, num_steps=4), copy)
  assert f'{weights}: got SHA-256' in printed
  assert frozen_format.read(copy / 'frozen').manifest.step == 4


def test_new_text_to_evaluate_on_is_told_of(corpus, copy, tmp_path):
  other = tmp_path / 'corpus'
  shutil.copytree(os.path.dirname(os.path.dirname(corpus)), other)
  (other / 'validation' / '00.txt').write_text('another text')
  path = str(other / '{split}' / '*.txt')
  data_dir = tiny_run.experiment(corpus).data.data_dir
  _, printed = tiny_run.run(
    tiny_run.experiment(
      corpus, num_steps=6, data={'path': path, 'data_dir': data_dir}
    ),
    copy,
  )
  assert 'losses before and after are of different text' in printed


@pytest.mark.slow
def test_the_manifest_tells_of_weights_that_changed(corpus, tmp_path):
  sources = tuple(
    data_config.SourceConfig(
      open_source=tiny_run.experiment(corpus).data.open_source,
      path=corpus,
      name=name,
    )
    for name in ('first', 'second')
  )
  for num_steps, weight in ((2, 1.0), (4, 3.0)):
    mixed = (dataclasses.replace(sources[0], weight=weight), sources[1])
    tiny_run.run(
      tiny_run.experiment(corpus, num_steps=num_steps, data={'sources': mixed}),
      tmp_path,
    )
  mix = frozen_format.read(tmp_path / 'frozen').manifest.data_mix
  assert [source['weight'] for source in mix] == [3.0, 1.0]
  assert mix[0]['phases'] == [
    {'from_row': 0, 'weight': 1.0},
    {'from_row': 16, 'weight': 3.0},
  ]


def test_a_damaged_tokenizer_is_named(corpus, copy):
  (copy / 'tokenizer' / 'tokenizer_config.json').write_text('{"ki')
  with pytest.raises(
    ValueError, match='tokenizer: got a tokenizer that cannot be read'
  ):
    tiny_run.run(tiny_run.experiment(corpus, num_steps=6), copy)


def test_a_disk_that_is_full_from_the_start_is_one_line(
  corpus, tmp_path, monkeypatch
):
  def no_space(path, text, *, durable=True):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(atomic, 'write_text', no_space)
  with pytest.raises(
    disk.SaveError,
    match=r'run: got .*No space left on device, expected to write there; make'
    ' room, and start again: nothing was changed',
  ):
    tiny_run.run(tiny_run.experiment(corpus), tmp_path / 'run')
  assert not list(tmp_path.iterdir())


def test_a_workdir_that_is_a_file_is_refused(corpus, tmp_path):
  path = tmp_path / 'run'
  path.write_text('precious')
  with pytest.raises(ValueError, match='got a file, expected a directory'):
    tiny_run.run(tiny_run.experiment(corpus), path)
  with pytest.raises(ValueError, match='expected to write there'):
    tiny_run.run(tiny_run.experiment(corpus), path / 'below')
  assert path.read_text() == 'precious'


def test_an_attempt_that_dies_before_its_loop_is_counted(
  corpus, copy, monkeypatch
):
  before = len(goodput.read(copy))

  def die(*args, **kwargs):
    raise RuntimeError('no devices')

  monkeypatch.setattr('training.learner.Learner.compile_train_step', die)
  with pytest.raises(RuntimeError, match='no devices'):
    tiny_run.run(tiny_run.experiment(corpus, num_steps=6), copy)
  assert len(goodput.read(copy)) == before + 1


@pytest.mark.parametrize(
  ('data', 'message'),
  [
    ({'sources': 5}, 'data.sources: got 5, expected SourceConfigs'),
    (
      {'batch_ramp': ((0, 4), (12, 8))},
      'data.batch_ramp: got a size from step 12, expected one that is reached'
      ' in config.num_steps = 12',
    ),
  ],
)
def test_data_that_cannot_be_is_refused(corpus, data, message):
  with pytest.raises(ValueError, match=message):
    tiny_run.experiment(corpus, data=data).validate()


@pytest.mark.parametrize('seed', [-(2**63) - 1, 2**64])
def test_a_seed_of_more_than_64_bits_is_refused(corpus, seed):
  with pytest.raises(ValueError, match=f'config.seed: got {seed}, expected an'):
    tiny_run.experiment(corpus, seed=seed).validate()


def test_every_bit_of_a_seed_counts():
  keys = [
    run_lib.first_key(seed)
    for seed in (0, 1, 2**32, 2**32 + 1, 2**63 - 1, 2**63, -1)
  ]
  assert len({tuple(jax.random.key_data(key).tolist()) for key in keys}) == 7
  assert keys[1] == jax.random.key(1)


@pytest.mark.slow
def test_a_run_with_a_long_seed_resumes(corpus, tmp_path):
  experiment = tiny_run.experiment(corpus, seed=2**63 + 5, num_steps=8)
  half = dataclasses.replace(experiment, num_steps=4)
  tiny_run.run(half, tmp_path / 'run')
  result, _ = tiny_run.run(experiment, tmp_path / 'run')
  assert result.step == 8
  with pytest.raises(ValueError, match='got seed = 5, expected'):
    tiny_run.run(dataclasses.replace(experiment, seed=5), tmp_path / 'run')
