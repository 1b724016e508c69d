"""A router: the effort of a request, from one prefill.

    router = Router.open(path, weights_digest, budget=2e7)
    completion = ...                    # of router.request(prompt_ids)
    decision = router.decide(completion)
    router.paid(flops)

The predictor is what life one has fitted (`python -m training.effort`). A mean
budget in FLOPs per request is held by the price of the pace; a budget of the
request itself is held by taking the best effort that fits. Belongs to one
thread at a time.
"""

from collections.abc import Sequence
import dataclasses
import os
from typing import Any, Self

import numpy as np

from frozen import effort_predictor
from inference.requests import requests as requests_lib
from inference.search.routing import (
  efforts as efforts_lib,
  features,
  policy as policy_lib,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decision:
  """The effort of a request, and why."""

  name: str
  probs: dict[str, float]  # P(correct) by name of an effort
  flops: dict[str, float]  # expected, by name
  prefill: requests_lib.Completion  # from which it was taken

  @property
  def effort(self) -> efforts_lib.Effort:
    """What to do."""
    return efforts_lib.parsed(self.name)

  def told(self) -> dict[str, Any]:
    """Returns the decision for a receipt."""
    return {'effort': self.name, 'probabilities': self.probs}


class Router:
  """Chooses efforts; the pace remembers what was spent."""

  def __init__(
    self,
    predictor: effort_predictor.Predictor,
    *,
    budget: float | None = None,
    policy: policy_lib.Policy | None = None,
    seed: int = 0,
  ):
    """Prepares; spends nothing.

    Args:
      predictor: of this model.
      budget: mean FLOPs per request; None: no limit, so that each request has
        the effort of the most probable right answer.
      policy: found on the calibration questions; None: the pace finds a price
        from what it pays.
      seed: of the draws between two prices.

    Raises:
      ValueError: the budget is not positive, or an effort is unknown.
    """
    for name in predictor.efforts:
      efforts_lib.parsed(name)
    self._predictor = predictor
    none = policy_lib.Policy(low=0.0, high=0.0, share=1.0)
    self.pace = None
    if budget is not None:
      self.pace = policy_lib.Pace(policy=policy or none, budget=budget)
    self._rng = np.random.default_rng(seed)

  @property
  def efforts(self) -> tuple[str, ...]:
    """The names of the efforts among which it chooses."""
    return tuple(self._predictor.efforts)

  @classmethod
  def open(
    cls,
    path: str | os.PathLike,
    weights_digest: str,
    *,
    budget: float | None = None,
  ) -> Self:
    """Returns the router of a predictor's file.

    Args:
      path: the file.
      weights_digest: digest of the model that will answer.
      budget: mean FLOPs per request; None: no limit.

    Raises:
      ValueError: the file is wrong, or of another model.
      OSError: it cannot be read.
    """
    predictor = effort_predictor.read(path, weights_digest)
    try:
      return cls(predictor, budget=budget)
    except ValueError as error:
      raise ValueError(f'{os.fspath(path)}: {error}') from None

  def request(
    self, prompt_ids: Sequence[int], **fields: Any
  ) -> requests_lib.Request:
    """Returns the request of the prefill that is read.

    Args:
      prompt_ids: of the question, as it will be answered.
      **fields: of the request, such as principal and adapter.
    """
    return features.request(
      prompt_ids, pooling=self._predictor.pooling, **fields
    )

  def decide(
    self, prefill: requests_lib.Completion, *, most: float | None = None
  ) -> Decision:
    """Returns the effort of a request.

    Args:
      prefill: completion of `request`.
      most: FLOPs that this request may cost; None: only the mean is limited.

    Raises:
      ValueError: no effort is as cheap as `most`, or the model has another
        width.
    """
    probs_BE, costs_BE = self._predictor(features.of(prefill)[None])
    if self.pace is None:
      most_of_all = np.inf if most is None else most
      which = int(policy_lib.within(probs_BE, costs_BE, most_of_all)[0])
    else:
      draw = self._rng.random()
      which = self.pace.choose(probs_BE[0], costs_BE[0], draw)
      if most is not None and costs_BE[0, which] > most:
        which = int(policy_lib.within(probs_BE, costs_BE, most)[0])
    efforts = self._predictor.efforts
    return Decision(
      name=efforts[which],
      probs=dict(zip(efforts, probs_BE[0].tolist(), strict=True)),
      flops=dict(zip(efforts, costs_BE[0].tolist(), strict=True)),
      prefill=prefill,
    )

  def paid(self, flops: float) -> None:
    """Takes the cost of a request that has ended, its prefill included."""
    if self.pace is not None:
      self.pace = self.pace.paid(flops)

  def paid_late(self, flops: float) -> None:
    """Takes more cost of a request that was paid before, as of one cut off."""
    if self.pace is not None:
      self.pace = self.pace.paid_late(flops)
