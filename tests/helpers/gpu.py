"""The marks of a test that wants a GPU."""

import jax
import pytest


def _problem() -> str:
  platform = jax.default_backend()
  return '' if platform == 'gpu' else f'got the {platform} backend'


# A module with such tests alone has `pytestmark = gpu.MARKS`.
MARKS = [
  pytest.mark.gpu,
  pytest.mark.skipif(
    bool(_problem()), reason=f'{_problem()}, expected a GPU: make test-gpu'
  ),
]
