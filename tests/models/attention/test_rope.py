"""Rotary positions against a closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.attention import rope


def test_rotation_keeps_lengths_and_depends_on_distance_only():
  q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))

  def score(i, j):
    rotated = [
      rope.rotate(x, rope.angles(jnp.array([[p]]), 8, 10_000.0))
      for x, p in ((q, i), (k, j))
    ]
    np.testing.assert_allclose(
      jnp.linalg.norm(rotated[0]), jnp.linalg.norm(q), rtol=1e-6
    )
    return float(jnp.sum(rotated[0] * rotated[1]))

  assert score(5, 2) == pytest.approx(score(105, 102), abs=1e-4)
  assert abs(score(5, 2) - score(5, 3)) > 1e-3


def test_first_pair_turns_one_radian_per_position():
  """RoFormer equation 15: theta_0 = 1."""
  x_BTHC = jnp.zeros((1, 1, 1, 4)).at[..., 0].set(1.0)
  rotated = rope.rotate(x_BTHC, rope.angles(jnp.array([[2]]), 4, 10_000.0))
  np.testing.assert_allclose(
    rotated[0, 0, 0], [np.cos(2), 0.0, np.sin(2), 0.0], atol=1e-6
  )
