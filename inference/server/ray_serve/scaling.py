"""How Ray Serve adds and removes replicas with `replicas=auto`.

Ray divides the number of open requests by a target, and runs so many replicas
once the result has held for some time. Requests that wait in its proxies count
as open. Its own target is two requests (Ray 2.32 and later). An
engine answers as many requests together as it has slots, so with that target
there would be ten times the replicas that the load needs.

Reference: `ray.serve.config.AutoscalingConfig`, Ray 2.50.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

from checks import expect

# Share of the slots of a replica at which another one starts: beyond all of
# them requests wait, and the load grows while a replica starts.
_SHARE = 0.8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scaling:
  """The number of replicas by load; fields have Ray's names.

  Raises:
    ValueError: a value is out of range.
  """

  target_ongoing_requests: float  # open requests per replica
  min_replicas: int = 1
  max_replicas: int = 8
  # Seconds for which more replicas are wanted until one starts, and fewer until
  # one ends. A replica reads weights and compiles for minutes: ending one early
  # costs more than keeping it, as in kubernetes/scaling.yaml.
  upscale_delay_s: float = 30
  downscale_delay_s: float = 600
  look_back_period_s: float = 30  # of the mean of open requests

  def __post_init__(self):
    if not self.target_ongoing_requests > 0:
      raise ValueError(
        f'target_requests: got {self.target_ongoing_requests}, expected a'
        ' number above 0'
      )
    expect.at_least('min_replicas', self.min_replicas, 1)
    expect.at_least('max_replicas', self.max_replicas, self.min_replicas)

  def config(self) -> Mapping[str, Any]:
    """Returns the `autoscaling_config` of a deployment."""
    return dataclasses.asdict(self)


def target_of(num_slots: int) -> float:
  """Returns the open requests per replica that an engine's slots suggest."""
  return max(_SHARE * num_slots, 1.0)
