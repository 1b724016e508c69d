"""Building the native product: once, whole, and a reason where it cannot be."""

from concurrent import futures

import jax
import jax.numpy as jnp
import pytest

from models.linear import products
from models.linear.native import few_rows, product as native_product
from models.linear.stored import product
from models.native import build, processor
from tests.helpers import any_kernels

_QUICKLY = ('-O0',)  # compiled in 2 s, not 5


@pytest.fixture
def _has_compiler():
  try:
    build._compiler()
  except build.BuildError as error:
    pytest.skip(str(error))


def _params(kind='int8'):
  return {'params': {'up': {'kernel': any_kernels.kernel(kind, 64, 4)}}}


def _compiled(directory):
  """Returns the libraries of a directory; they are all that is in it."""
  found = list(directory.iterdir())
  assert all(path.suffix == '.so' for path in found)
  return found


@pytest.mark.slow
@pytest.mark.usefixtures('_has_compiler')
def test_a_library_is_built_once_and_again_when_it_is_damaged(
  tmp_path, monkeypatch
):
  built = []
  run = build._run
  monkeypatch.setattr(
    build, '_run', lambda command: built.append(command) or run(command)
  )
  path = build.built(_QUICKLY, tmp_path)

  def num_compilations():
    assert _compiled(tmp_path) == [path]
    assert build._is_whole(path)
    return sum('-shared' in command for command in built)

  assert build.built(_QUICKLY, tmp_path) == path
  assert num_compilations() == 1
  data = path.read_bytes()
  for count, damaged in enumerate((data[: len(data) // 2], b''), start=2):
    path.write_bytes(damaged)
    assert build.built(_QUICKLY, tmp_path) == path
    assert num_compilations() == count


@pytest.mark.usefixtures('_has_compiler')
def test_the_name_tells_options_and_sources_apart(monkeypatch):
  compiler = build._compiler()
  keys = {build._key(compiler, build.NATIVE), build._key(compiler, ())}
  keys.add(build._key(compiler, (), build.FEW_ROWS))
  monkeypatch.setattr(processor, 'described', lambda: 'another')
  keys.add(build._key(compiler, ()))
  assert len(keys) == 4


@pytest.mark.slow
@pytest.mark.usefixtures('_has_compiler')
def test_builds_at_the_same_time_do_not_disturb_each_other(tmp_path):
  with futures.ThreadPoolExecutor() as pool:
    building = [pool.submit(build.built, _QUICKLY, tmp_path) for _ in range(3)]
  (path,) = {each.result() for each in building}
  assert _compiled(tmp_path) == [path]
  assert build._is_whole(path)


def test_without_a_compiler_products_are_plain_with_the_reason(
  tmp_path, monkeypatch
):
  monkeypatch.setenv('PATH', str(tmp_path))
  monkeypatch.delenv('CXX', raising=False)
  found = products.choose('auto', _params(), jnp.float32, 'cpu')
  assert found.stored is product.in_blocks
  assert found.reason.startswith('plain JAX: no compiler g++, clang++, c++ on')
  with pytest.raises(ValueError, match="native: got 'on', but no compiler"):
    products.choose('on', _params(), jnp.float32, 'cpu')


@pytest.mark.usefixtures('_has_compiler')
def test_a_compiler_that_fails_is_a_reason_and_leaves_nothing(tmp_path):
  with pytest.raises(build.BuildError, match='failed: .*no-such-option'):
    build.built(('--no-such-option',), tmp_path)
  assert not _compiled(tmp_path)


@pytest.mark.usefixtures('_has_compiler')
def test_a_directory_that_cannot_be_written_is_a_reason(tmp_path):
  blocked = tmp_path / 'file'
  blocked.touch()
  with pytest.raises(build.BuildError, match='the library .*file'):
    build.built(_QUICKLY, blocked / 'd')


def test_the_choice_says_why():
  def reason(*args):
    found = products.choose(*args)
    assert found.stored is product.in_blocks
    return found.reason

  dtype = jnp.float32
  assert reason('off', _params(), dtype, 'cpu') == (
    'plain JAX: engine.native is off'
  )
  narrow = {'up': {'kernel': any_kernels.narrow(64, 4)}}
  for platform in ('cpu', 'gpu', 'tpu'):
    assert 'got a scale per 8' in reason('auto', narrow, dtype, platform)
  assert 'no kernel for metal' in reason('auto', _params(), dtype, 'metal')


@pytest.mark.parametrize('platform', ['gpu', 'tpu'])
def test_accelerators_have_kernels_of_pallas(platform):
  params = {'a': _params(), 'narrow': any_kernels.narrow(64, 4)}
  dtype = jnp.bfloat16
  if platform == 'tpu':  # rows of 64 bytes are refused there
    params['a'] = {'kernel': any_kernels.kernel('int8', 128, 4)}
  found = products.choose('on', params, dtype, platform)
  assert found.is_native
  assert type(found.stored).__module__.endswith(f'stored_{platform}')
  assert found.reason.startswith(f'Pallas, {platform}; 1 of 2 kernels in plain')
  invariant = products.choose(
    'auto', params, dtype, platform, is_invariant=True
  )
  assert invariant.reason.startswith('plain JAX: invariant numerics')
  assert not invariant.is_native
  assert products.choose('auto', {}, dtype, platform) == products.Choice()


def test_floats_are_native_where_a_cache_does_not_hold_them():
  def params(rows, dtype='float32'):
    leaf = jax.ShapeDtypeStruct((rows, 1024), dtype)
    return {'up': {'kernel': leaf}, 'norm': {'scale': leaf.update(shape=(8,))}}

  small, large = params(16 * 1023), params(16 * 1024)  # 64 MiB
  for found in (
    products.choose('auto', small, jnp.float32, 'cpu'),
    products.choose('auto', large, jnp.float32, 'gpu'),
    products.choose('auto', large, jnp.float32, 'cpu', is_invariant=True),
  ):
    assert found == products.Choice()
  found = products.choose('auto', large, jnp.bfloat16, 'cpu')
  assert found.linear is None
  assert found.reason == 'plain JAX: got weights of float32 in bfloat16'
  for text, given in (
    ('no kernel is in fewer bits', (small, jnp.float32, 'gpu')),
    ('got weights of float32', (small, jnp.bfloat16, 'cpu')),
    ('no kernel is in fewer bits, and floats', ({}, jnp.float32, 'cpu')),
  ):
    with pytest.raises(ValueError, match=f"native: got 'on', but .*{text}"):
      products.choose('on', *given)


@pytest.mark.usefixtures('_has_compiler')
def test_floats_and_kernels_in_fewer_bits_are_native_at_once():
  floats = {'down': {'kernel': jax.ShapeDtypeStruct((4, 4), 'float32')}}
  alone = products.choose('on', floats, jnp.float32, 'cpu', is_transposed=True)
  assert isinstance(alone.linear, few_rows.Linear)
  assert isinstance(alone.unembed, few_rows.Unembed)
  assert alone.linear.is_transposed
  assert alone.reason.startswith('native up to 8 rows, ')
  both = products.choose('on', {**floats, **_params()}, jnp.float32, 'cpu')
  assert isinstance(both.stored, native_product.Port)
  assert both.reason.startswith('native, ')
  assert '; floats native up to 8 rows, ' in both.reason


@pytest.mark.usefixtures('_has_compiler')
def test_kernels_of_both_kinds_are_counted():
  narrow = {'up': {'kernel': any_kernels.narrow(64, 4)}}
  params = {'a': _params(), 'b': narrow, 'c': _params('Q8_0')}
  shapes = jax.eval_shape(lambda: params)
  found = products.choose('auto', shapes, jnp.float32, 'cpu')
  assert isinstance(found.stored, native_product.Port)
  assert '1 of 3 kernels in plain JAX: got a scale per 8' in found.reason
