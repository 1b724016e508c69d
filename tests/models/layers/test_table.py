"""Looking up the rows of a table."""

import jax
import jax.numpy as jnp
import numpy as np

from models.layers import table

_TABLE_BYTES = 2 * 4096 * 64


def _looked_up(look_up):
  """Returns the compiled sum of rows, of which a loop looks up one each."""

  def summed(table_VD, ids_T):
    def step(sum_D, id_):
      rows_1D = look_up(table_VD, id_[None])
      return sum_D + rows_1D[0].astype(jnp.float32), None

    return jax.lax.scan(step, jnp.zeros((64,)), ids_T)[0]

  shape = jax.ShapeDtypeStruct((4096, 64), jnp.bfloat16)
  ids_T = jax.ShapeDtypeStruct((8,), jnp.int32)
  return jax.jit(summed).lower(shape, ids_T).compile()


def test_a_loop_does_not_convert_the_table():
  numbers = np.random.default_rng(0).normal(size=(4096, 64))
  table_VD = jnp.asarray(numbers, jnp.bfloat16)
  ids_T = jnp.arange(8, dtype=jnp.int32) * 500
  program = _looked_up(table.look_up_in_loop)
  assert program.memory_analysis().temp_size_in_bytes < _TABLE_BYTES // 8
  np.testing.assert_allclose(
    program(table_VD, ids_T),
    np.float32(table_VD)[np.asarray(ids_T)].sum(axis=0),
    atol=1e-5,
  )
