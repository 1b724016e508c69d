"""A router: the effort of a request, from one prefill.

    router = Router.open(path, engine, weights_digest, budget=2e7)
    effort = router.decide(prompt_ids).effort      # 'low', 'high', ...
    router.paid(flops)

The predictor is what life one has fitted (`python -m training.effort`). A mean
budget in FLOPs per request is held by the price of the pace; a budget of the
request itself is held by taking the best effort that fits. Belongs to one
thread at a time.
"""

from collections.abc import Callable, Sequence
import dataclasses
import os
from typing import Self

import numpy as np

from frozen import effort_predictor
from inference.engine import engine as engine_lib
from inference.search.routing import features, policy as policy_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decision:
  """The effort of a request, and why."""

  effort: str
  probs: dict[str, float]  # P(correct) by effort
  flops: dict[str, float]  # expected, by effort


class Router:
  """Chooses efforts; the pace remembers what was spent."""

  def __init__(
    self,
    predictor: effort_predictor.Predictor,
    read: Callable[[Sequence[int]], np.ndarray],
    *,
    budget: float,
    policy: policy_lib.Policy | None = None,
    seed: int = 0,
  ):
    """Prepares; spends nothing.

    Args:
      predictor: of this model.
      read: the features [F] of a prompt.
      budget: mean FLOPs per request.
      policy: found on the calibration questions; None: the pace finds a price
        from what it pays.
      seed: of the draws between two prices.

    Raises:
      ValueError: the budget is not positive.
    """
    self._predictor, self._read = predictor, read
    none = policy_lib.Policy(low=0.0, high=0.0, share=1.0)
    self.pace = policy_lib.Pace(policy=policy or none, budget=budget)
    self._rng = np.random.default_rng(seed)

  @classmethod
  def open(
    cls,
    path: str | os.PathLike,
    engine: engine_lib.Engine,
    weights_digest: str,
    *,
    budget: float,
  ) -> Self:
    """Returns the router of a predictor's file.

    Raises:
      ValueError: the file is wrong, or of another model.
      OSError: it cannot be read.
    """
    predictor = effort_predictor.read(path, weights_digest)

    def read(prompt_ids: Sequence[int]) -> np.ndarray:
      return features.of_prompts(
        engine, [prompt_ids], pooling=predictor.pooling
      )[0]

    return cls(predictor, read, budget=budget)

  def decide(
    self, prompt_ids: Sequence[int], *, most: float | None = None
  ) -> Decision:
    """Returns the effort of a request.

    Args:
      prompt_ids: of the request.
      most: FLOPs that this request may cost; None: only the mean is limited.

    Raises:
      ValueError: no effort is as cheap as `most`.
    """
    probs_BE, costs_BE = self._predictor(self._read(prompt_ids)[None])
    which = self.pace.choose(probs_BE[0], costs_BE[0], self._rng.random())
    if most is not None and costs_BE[0, which] > most:
      which = int(policy_lib.within(probs_BE, costs_BE, most)[0])
    efforts = self._predictor.efforts
    return Decision(
      effort=efforts[which],
      probs=dict(zip(efforts, probs_BE[0].tolist(), strict=True)),
      flops=dict(zip(efforts, costs_BE[0].tolist(), strict=True)),
    )

  def paid(self, flops: float) -> None:
    """Takes the cost of a request that has ended, its prefill included."""
    self.pace = self.pace.paid(flops)
