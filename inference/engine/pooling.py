"""One vector of a prompt: its final hidden states, pooled.

    pool = Pool('mean')
    pool.add(hidden_RD, start)     # chunk by chunk
    vector_D = pool.vector_D()

The states are those from which the engine makes its logits: after the final
norm. The sum runs on the host, token by token in float64, so that it does not
depend on where chunks begin. A prompt that lost its pages begins again at 0.
"""

import numpy as np

from checks import expect

KINDS = 'mean', 'last'


def check(kind: str | None) -> None:
  """Raises ValueError for a kind of pooling that does not exist."""
  expect.one_of('pooling', kind, (None, *KINDS))


class Pool:
  """The pooled hidden states of one prompt, so far."""

  def __init__(self, kind: str):
    """Starts without tokens.

    Args:
      kind: 'mean', of all tokens, or 'last', the state of the last token.
    """
    self._kind = kind
    self._num_tokens, self._pooled_D = 0, np.zeros((), np.float64)

  def add(self, hidden_RD: np.ndarray, start: int) -> None:
    """Adds the states of the next tokens, of which the first is at `start`."""
    hidden_RD = np.asarray(hidden_RD, np.float64)
    if self._kind == 'last':
      self._num_tokens, self._pooled_D = 1, hidden_RD[-1]
      return
    if not start:
      self._num_tokens, self._pooled_D = 0, np.zeros_like(hidden_RD[0])
    self._num_tokens += len(hidden_RD)
    # NumPy adds along the first axis row by row: one sum, however it is cut.
    self._pooled_D = np.add.reduce(
      np.concatenate([self._pooled_D[None], hidden_RD])
    )

  def vector_D(self) -> np.ndarray:
    """Returns the pooled states, float64 [D]."""
    return self._pooled_D / max(self._num_tokens, 1)
