"""Checkpoints on disk: sealed, verified, kept, and what happens if they fail.

States of a few numbers; whole runs are in tests/training/runs/ and
tests/survival/.
"""

import dataclasses
import hashlib
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from frozen import seals
from storage import digests
from training import experiment, state as state_lib
from training.checkpoints import checkpoint, saving

IDENTITY = {'experiment': 'tiny', 'seed': 0, 'model.num_layers': 1}


def _state(step, dtype=jnp.float32, **params):
  params = {'w': jnp.arange(6, dtype=dtype).reshape(2, 3) + step} | params
  return state_lib.TrainState(
    step=jnp.int32(step),
    params=params,
    opt_state=({'m': jnp.ones((2, 3), dtype) * step}, jnp.int32(step)),
    key=jax.random.key(7),
  )


def _abstract(state):
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
  )


def _unopened(workdir, *, identity=None, **config):
  return checkpoint.Checkpoints(
    workdir, experiment.CheckpointConfig(**config), identity or IDENTITY
  )


def _open(workdir, *, tell=lambda text: None, **fields):
  saved = _unopened(workdir, **fields)
  saved.open(tell)
  return saved


def _save(saved, step, **extras):
  outcomes = []
  saved.save(
    _state(step),
    checkpoint.Progress(tokens_seen=step * 10, data_state={'row': step}),
    done=outcomes.append,
    **extras,
  )
  saved.wait()
  (outcome,) = outcomes
  return outcome


def _tree(directory):
  """Returns a digest of every file below, by path."""
  return {
    path.relative_to(directory).as_posix(): hashlib.sha256(
      path.read_bytes()
    ).hexdigest()
    for path in directory.rglob('*')
    if path.is_file()
  }


@pytest.fixture(scope='module')
def two(tmp_path_factory):
  """A workdir with checkpoints of steps 4 and 8; copy it to change it."""
  workdir = tmp_path_factory.mktemp('two')
  saved = _open(workdir)
  for step in (4, 8):
    assert not _save(saved, step).error
  return workdir


@pytest.fixture
def copy(two, tmp_path):
  shutil.copytree(two, tmp_path / 'run')
  return tmp_path / 'run'


def test_a_run_resumes_from_the_newest_checkpoint(two, tmp_path):
  assert _unopened(two).open() == checkpoint.Resume(step=8)
  assert _unopened(tmp_path).peek() == checkpoint.Resume()
  assert _unopened(tmp_path).open() == checkpoint.Resume()


def test_a_checkpoint_of_a_later_version_is_refused_and_left_there(copy):
  path = copy / 'checkpoints' / '8' / 'seal.json'
  fields = json.loads(path.read_text()) | {'format_version': 2, 'new': 0}
  assert seals.FORMAT_VERSION == 1
  del fields['seal_digest']
  signed = {**fields, 'seal_digest': digests.of_json(fields)}
  path.write_text(json.dumps(signed))
  for look in (_unopened(copy).peek, _unopened(copy).open):
    with pytest.raises(
      ValueError, match='seal.json: got format version 2, expected 1; use the'
    ):
      look()
  assert seals.steps(copy / 'checkpoints') == [4, 8]
  # A version that does not match the digest is a damaged bit.
  path.write_text(json.dumps(signed | {'format_version': 3}))
  assert _unopened(copy).open() == checkpoint.Resume(step=4)


def test_a_checkpoint_whose_seal_is_damaged_may_owe_something(copy):
  (copy / 'checkpoints' / '8' / 'seal.json').write_text('{')
  seen = _unopened(copy).peek()
  assert seen == checkpoint.Resume(step=8, evaluation_owed=True)
  assert _unopened(copy).open() == checkpoint.Resume(step=4)


def test_a_state_comes_back_to_the_bit(two):
  saved = _open(two)
  assert saved.wait() == 8
  state, progress = saved.restore(_abstract(_state(0)))
  jax.tree.map(np.testing.assert_array_equal, state.params, _state(8).params)
  jax.tree.map(
    np.testing.assert_array_equal, state.opt_state, _state(8).opt_state
  )
  assert int(state.step) == 8
  assert state.key == _state(8).key
  assert progress.tokens_seen == 80
  assert progress.data_state == {'row': 8}


def test_the_seal_names_what_it_seals(two):
  directory = two / 'checkpoints' / '8'
  seal = seals.read(directory)
  assert seal.identity == IDENTITY
  assert seal.leaves['params'] == {"['w']": 'float32[2, 3]'}
  assert set(seal.leaves['opt_state'].values()) == {'float32[2, 3]', 'int32[]'}
  assert seal.libraries['jax'] == jax.__version__
  assert seal.files.keys() == set(_tree(directory)) - {'seal.json'}


def _damage(directory, how):
  file = max(
    (p for p in (directory / 'params').rglob('*') if p.is_file()),
    key=lambda p: p.stat().st_size,
  )
  if how == 'flip':
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)
  elif how == 'truncate':
    file.write_bytes(file.read_bytes()[:-1])
  elif how == 'empty':
    file.write_bytes(b'')
  elif how == 'remove':
    file.unlink()
  elif how == 'add':
    file = directory / 'params' / 'more'
    file.write_text('x')
  elif how == 'half':
    shutil.rmtree(directory / 'opt_state')
    file = directory / 'opt_state'
  elif how == 'unsealed':
    file = directory / 'seal.json'
    file.unlink()
  elif how == 'seal':
    file = directory / 'seal.json'
    text = file.read_text()
    file.write_text(text.replace('"step": 8', '"step": 9'))
  elif how == 'same seal':  # says the same in other bytes
    file = directory / 'seal.json'
    file.write_text(file.read_text().replace('"step": 8', '"step":  8'))
  return file


@pytest.mark.parametrize(
  ('how', 'words'),
  [
    ('flip', 'bytes and SHA-256'),
    ('truncate', 'bytes and SHA-256'),
    ('empty', 'got 0 bytes'),
    ('remove', 'got no such file'),
    ('add', 'got a file that seal.json does not list, expected none'),
    ('half', 'got no such file'),
    ('unsealed', 'expected a seal: the checkpoint was never finished, or was'),
    ('seal', 'got contents that do not match their digest'),
    ('same seal', 'got contents that do not match their digest'),
  ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(
  copy, how, words
):
  file = _damage(copy / 'checkpoints' / '8', how)
  told = []
  saved = _open(copy, tell=told.append)
  assert saved.wait() == 4
  (text,) = told
  assert 'checkpoint of step 8 is damaged' in text
  assert str(file) in text
  assert words in text
  assert 'Moved to damaged-8-0, resuming from step 4' in text
  assert (copy / 'checkpoints' / 'damaged-8-0').is_dir()
  state, _ = saved.restore(_abstract(_state(0)))
  np.testing.assert_array_equal(state.params['w'], _state(4).params['w'])
  # And the step can be saved again.
  assert not _save(saved, 8).error
  assert _open(copy).wait() == 8


def test_if_all_are_damaged_nothing_is_done(copy):
  for step in (4, 8):
    _damage(copy / 'checkpoints' / str(step), 'flip')
  before = _tree(copy)
  for _ in range(2):
    with pytest.raises(
      ValueError,
      match=r'(?s)got no checkpoint that is whole \(step 8: .* step 4: .*\),'
      ' expected at least one; put a good copy there, or start over: delete',
    ):
      _open(copy)
  assert _tree(copy) == before


def test_what_was_moved_aside_is_no_new_start(copy):
  root = copy / 'checkpoints'
  seals.move_aside(root, 8)
  shutil.rmtree(root / '4')
  with pytest.raises(ValueError, match=r'whole \(damaged-8-0\)'):
    _open(copy)


def test_a_checkpoint_that_was_sealed_without_a_part_is_not_used(copy):
  newest = copy / 'checkpoints' / '8'
  shutil.rmtree(newest / 'params')
  (newest / 'progress.json').unlink()
  seal = seals.read(newest)
  files = digests.of_files(newest, seals.file_names(newest))
  seals.write(newest, dataclasses.replace(seal, files=files))
  told = []
  assert _open(copy, tell=told.append).wait() == 4
  assert 'got a seal that lists nothing of params, expected some' in told[0]
  assert 'lists nothing of progress.json' in told[0]


def test_a_checkpoint_that_lost_a_part_is_not_sealed(copy, monkeypatch):
  merge = saving.Save._merge

  def merge_and_lose(save, items):
    (save.root / f'{save.step}.partial' / 'progress.json').unlink()
    return merge(save, items)

  monkeypatch.setattr(saving.Save, '_merge', merge_and_lose)
  saved = _open(copy)
  assert (
    'got no progress.json, expected the files just' in _save(saved, 12).error
  )
  assert saved.wait() == 8
  assert seals.steps(copy / 'checkpoints') == [4, 8]


def test_what_kills_left_behind_is_removed(copy):
  root = copy / 'checkpoints'
  for name in ('12.partial', '2.deleted'):
    shutil.copytree(root / '8', root / name)
  (root / '8' / 'seal.tmp').write_text('{')  # an evaluation being recorded
  assert _open(copy).wait() == 8
  assert sorted(path.name for path in root.iterdir()) == ['4', '8']


@pytest.mark.parametrize(
  ('identity', 'message'),
  [
    ({'experiment': 'other'}, "got experiment = 'tiny', expected 'other'"),
    ({'model.num_layers': 2}, 'got model.num_layers = 1, expected 2'),
  ],
)
def test_a_checkpoint_of_another_run_is_refused(copy, identity, message):
  before = _tree(copy)
  with pytest.raises(ValueError, match=f'8: got a checkpoint of .*{message}'):
    _open(copy, identity=IDENTITY | identity)
  assert _tree(copy) == before


def test_a_checkpoint_from_before_a_field_of_the_model_is_used(copy):
  """The field has its default on the side that lacks it."""
  scaling = {'kind': 'none', 'factor': 0.0}
  later = IDENTITY | {'model.window': 0, 'model.rope_scaling': scaling}
  assert _open(copy, identity=later).wait() == 8
  with pytest.raises(ValueError, match='got model.window = 0, expected 7'):
    _open(copy, identity=IDENTITY | {'model.window': 7})
  scaling = {'kind': 'linear', 'factor': 2.0}
  with pytest.raises(ValueError, match='got model.rope_scaling = '):
    _open(copy, identity=IDENTITY | {'model.rope_scaling': scaling})


def test_a_checkpoint_that_a_kill_set_aside_is_restored(copy):
  root = copy / 'checkpoints'
  (root / '8').rename(root / '.8.previous-0a1b2c3d')
  assert _open(copy).wait() == 8
  assert sorted(path.name for path in root.iterdir()) == ['4', '8']


def test_a_checkpoint_under_the_name_of_another_step_is_refused(copy):
  (copy / 'checkpoints' / '8').rename(copy / 'checkpoints' / '16')
  with pytest.raises(
    ValueError, match='16: got a checkpoint of step 8, expected one of step 16'
  ):
    _open(copy)


@pytest.mark.parametrize(
  ('wanted', 'message'),
  [
    (
      lambda: _state(0, w=jnp.zeros((2, 3), jnp.bfloat16)),
      r"params\['w'\]: got float32\[2, 3\], expected bfloat16\[2, 3\]",
    ),
    (
      lambda: _state(0, w=jnp.zeros((3, 2))),
      r"params\['w'\]: got float32\[2, 3\], expected float32\[3, 2\]",
    ),
    (
      lambda: _state(0, b=jnp.zeros(3)),
      r"params\['b'\]: got nothing, expected float32\[3\]",
    ),
    (
      lambda: dataclasses.replace(
        _state(0), opt_state=_state(0, 'bfloat16').opt_state
      ),
      'optimizer state: got float32, expected bfloat16; set',
    ),
    (
      lambda: dataclasses.replace(
        _state(0), opt_state=({'m': jnp.zeros((2, 3))},)
      ),
      r'opt_state\[1\]: got int32\[\], expected nothing; .* another --workdir',
    ),
  ],
)
def test_arrays_of_other_shapes_or_dtypes_are_refused(two, wanted, message):
  with pytest.raises(ValueError, match=f'checkpoint of step 8, {message}'):
    _open(two).restore(_abstract(wanted()))


def test_an_array_that_is_not_what_the_seal_says_is_refused(copy):
  """The files are those that were sealed, and the seal is not of them."""
  directory = copy / 'checkpoints' / '8'
  seal = seals.read(directory)
  leaves = {**seal.leaves, 'params': {"['w']": 'bfloat16[2, 3]'}}
  seals.write(directory, dataclasses.replace(seal, leaves=leaves))
  wanted = _abstract(_state(0, w=jnp.zeros((2, 3), jnp.bfloat16)))
  saved = _open(copy)
  restore = saved._handler.restore
  # Orbax casts on its way in; here it does not.
  saved._handler.restore = lambda path, args: restore(path)
  with pytest.raises(ValueError, match=r"params\['w'\]: got float32\[2, 3\]"):
    saved.restore(wanted)


def test_the_latest_the_best_and_every_so_many_are_kept():
  losses = {10: 3.0, 20: 1.0, 30: None, 40: 1.0, 50: 2.0, 60: None}
  config = experiment.CheckpointConfig

  def kept(**fields):
    return checkpoint.steps_to_keep(losses, config(**fields))

  assert kept(keep_latest=1, keep_best=0) == {60}
  assert kept(keep_latest=2, keep_best=1) == {40, 50, 60}
  assert kept(keep_latest=1, keep_best=2) == {20, 40, 60}
  assert kept(keep_latest=1, keep_best=0, keep_every_steps=20) == {20, 40, 60}
  assert checkpoint.steps_to_keep({}, config()) == set()


def test_the_best_is_known_after_a_restart(tmp_path):
  saved = _open(tmp_path, keep_latest=1, keep_best=1)
  _save(saved, 1, eval_loss=1.0)
  _save(saved, 2, eval_loss=2.0)
  saved = _open(tmp_path, keep_latest=1, keep_best=1)
  _save(saved, 3, eval_loss=3.0)
  assert seals.steps(tmp_path / 'checkpoints') == [1, 3]


def test_an_owed_evaluation_is_remembered_and_paid(tmp_path):
  saved = _open(tmp_path, keep_latest=1)
  _save(saved, 1, evaluation_owed=True)
  saved = _unopened(tmp_path, keep_latest=1)
  owing = checkpoint.Resume(step=1, evaluation_owed=True)
  assert saved.peek() == saved.open() == owing
  saved.mark_evaluated(1, 0.5)
  saved = _unopened(tmp_path, keep_latest=1)
  assert saved.peek() == saved.open() == checkpoint.Resume(step=1)
  _save(saved, 2)
  assert seals.steps(tmp_path / 'checkpoints') == [1, 2]


def _no_space(*args, **options):
  raise OSError(28, 'No space left on device')


def _fails_to_write(monkeypatch, workdir):
  from orbax.checkpoint._src.serialization import jax_array_handlers

  monkeypatch.setattr(
    jax_array_handlers.ArrayHandler, 'serialize', _no_space, raising=True
  )


def _fails_to_seal(monkeypatch, workdir):
  monkeypatch.setattr(seals, 'write', _no_space)


def _fails_to_hash(monkeypatch, workdir):
  monkeypatch.setattr(digests, 'of_files', _no_space)


def _is_no_directory(monkeypatch, workdir):
  root = workdir / 'checkpoints'
  root.rename(workdir / 'elsewhere')
  root.write_text('not a directory')


@pytest.mark.parametrize(
  ('fail', 'words'),
  [
    (_fails_to_write, 'No space left on device'),
    (_fails_to_seal, 'No space left on device'),
    (_fails_to_hash, 'No space left on device'),
    (_is_no_directory, 'Not a directory'),
  ],
)
def test_a_save_that_fails_does_no_harm_and_is_tried_again(
  tmp_path, fail, words
):
  saved = _open(tmp_path, keep_latest=1)
  assert not _save(saved, 1).error
  root = tmp_path / 'checkpoints'
  before = _tree(root)
  with pytest.MonkeyPatch.context() as monkeypatch:
    fail(monkeypatch, tmp_path)
    outcome = _save(saved, 2)
  assert words in outcome.error
  assert saved.wait() == 1
  if (tmp_path / 'elsewhere').exists():
    root.unlink()
    (tmp_path / 'elsewhere').rename(root)
  assert _tree(root) == before
  assert [path.name for path in root.iterdir()] == ['1']
  assert not _save(saved, 3).error
  assert [path.name for path in root.iterdir()] == ['3']


def test_metrics_that_cannot_be_written_fail_the_save(tmp_path):
  outcome = _save(_open(tmp_path), 1, before_seal=_no_space)
  assert 'No space left' in outcome.error
  assert not list((tmp_path / 'checkpoints').iterdir())


def test_the_old_one_is_there_until_the_new_one_is_sealed(tmp_path):
  saved = _open(tmp_path, keep_latest=1)
  _save(saved, 1)
  root = tmp_path / 'checkpoints'
  seen = []
  outcome = _save(
    saved, 2, before_seal=lambda: seen.extend(p.name for p in root.iterdir())
  )
  assert not outcome.error
  assert sorted(seen) == ['1', '2.partial']
  assert [path.name for path in root.iterdir()] == ['2']


def test_a_step_in_flight_is_not_saved_twice(tmp_path):
  saved = _open(tmp_path)
  outcomes = []
  for _ in range(2):
    saved.save(
      _state(1),
      checkpoint.Progress(),
      done=outcomes.append,
    )
  saved.wait()
  assert [outcome.step for outcome in outcomes] == [1]
