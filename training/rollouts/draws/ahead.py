"""Drawing ahead: the sampler works while the train steps run.

    draws.ask(index, step, weights)   # of the rollout batches to come
    drawn = draws.take(index)         # waits for it, if need be

With a staleness of S, rollout batch i is drawn by the weights before the first
step on batch i - S, in another thread. The schedule is fixed: which weights
draw which batch does not depend on the speed of either side, so a run has the
same bits every time. (Others bound the staleness and let time decide; for
example Fu et al. 2025, arXiv:2505.24298, section 4.) Tokens of a batch are at
most (S + 1) x steps_per_rollout - 1 steps older than the step that trains them.

With S = 0 there is no thread: the batch is drawn by the weights that it trains.
"""

from collections.abc import Callable
from concurrent import futures
import threading
from typing import Any

import jax
import jax.numpy as jnp

from evals import sampling
from training.rollouts.draws import drawing, stored


class Draws:
  """The rollout batches of a run, drawn in order and each once."""

  def __init__(
    self,
    drawer: drawing.Drawer,
    sampler: sampling.Sampler,
    *,
    staleness: int,
    turn: threading.Lock,
  ):
    """Starts without batches.

    Args:
      drawer: draws the episodes.
      sampler: sampler of the run; it gets the weights of each batch.
      staleness: rollout batches that are drawn ahead.
      turn: held while the sampler works. An evaluation holds it too: the
        sampler has one set of weights at a time.
    """
    self._drawer, self._sampler, self._turn = drawer, sampler, turn
    self.staleness = staleness
    self._pool = (
      futures.ThreadPoolExecutor(1, thread_name_prefix='rollouts')
      if staleness
      else None
    )
    # Batches, with their texts if they are drawn ahead: a record that no
    # checkpoint can hold ends the run at its first batch, not when it saves.
    self._asked: dict[int, futures.Future[tuple[drawing.Drawn, str]]] = {}

  def ask(
    self, index: int, step: int, weights: Callable[[], Any], *, last: int
  ) -> None:
    """Draws the batches up to `index` + staleness that are not drawn yet.

    Args:
      index: the batch that is trained next.
      step: steps that the weights have taken.
      weights: returns the variables of the model. Batches drawn ahead get a
        copy, since the train step takes the buffers of its state.
      last: the last batch of the run.
    """
    wanted = range(index, min(index + self.staleness, last) + 1)
    missing = [i for i in wanted if i not in self._asked]
    if not missing:
      return
    if self._pool is None:
      for i in missing:
        self._asked[i] = futures.Future()
        self._asked[i].set_result(self._draw(i, step, weights()))
      return
    copied = jax.tree.map(jnp.copy, weights())
    for i in missing:
      self._asked[i] = self._pool.submit(self._draw, i, step, copied)

  def _draw(
    self, index: int, step: int, weights: Any
  ) -> tuple[drawing.Drawn, str]:
    with self._turn:
      self._sampler.update(weights, step)
      drawn = self._drawer.draw(self._sampler, index, step)
    return drawn, stored.text_of(drawn) if self.staleness else ''

  def take(self, index: int) -> drawing.Drawn:
    """Returns a batch that was asked for, once, when it is drawn.

    Raises:
      Exception: the one that ended its drawing.
    """
    return self._asked.pop(index).result()[0]

  def get_state(self) -> list[str]:
    """Returns the batches that are drawn ahead; waits for unfinished ones."""
    return [each.result()[1] for each in self._asked.values()]

  def set_state(self, state: list[str]) -> None:
    """Continues with the batches of `get_state`."""
    self._asked = {}
    for text in state:
      drawn = stored.read(text)
      self._asked[drawn.index] = futures.Future()
      self._asked[drawn.index].set_result((drawn, text))

  def close(self) -> None:
    """Waits for the batch that is being drawn, and draws no other."""
    if self._pool is not None:
      self._pool.shutdown(cancel_futures=True)
