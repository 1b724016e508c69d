"""A fleet: replicas behind one front, and what its users would see."""

from collections.abc import Callable, Sequence
import dataclasses
import math

import numpy as np

from studies.fleet import replica as replica_lib, traffic

# Returns the index of the replica that answers, and may note that it does.
Place = Callable[[traffic.Request, Sequence[replica_lib.Replica]], int]


def least_busy(
  request: traffic.Request, replicas: Sequence[replica_lib.Replica]
) -> int:
  """Places a request on the replica with the fewest open requests."""
  del request
  return min(
    replicas, key=lambda each: (each.num_open, each.num_served, each.index)
  ).index


def in_turn(
  request: traffic.Request, replicas: Sequence[replica_lib.Replica]
) -> int:
  """Places requests on one replica after the other."""
  del request
  return min(replicas, key=lambda each: (each.num_served, each.index)).index


def simulate(
  replicas: Sequence[replica_lib.Replica],
  requests: Sequence[traffic.Request],
  place: Place = least_busy,
) -> list[replica_lib.Answer]:
  """Returns the answers of all requests.

  Args:
    replicas: at second 0; they are used up.
    requests: in the order of their arrival.
    place: of a request, when it arrives.
  """
  answers = []
  for request in requests:
    _run(replicas, until=request.arrival)
    answers.append(replicas[place(request, replicas)].submit(request))
  _run(replicas, until=math.inf)
  return answers


def _run(replicas: Sequence[replica_lib.Replica], *, until: float) -> None:
  """Steps replicas until each is idle, or has reached a second."""
  # Between two arrivals replicas do not meet: one runs after the other.
  for each in replicas:
    while each.has_work and each.now < until:
      each.step()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
  """The speed of a fleet. Seconds; percentiles over requests."""

  requests_per_s: float
  tokens_per_s: float  # of answers
  to_last_mean: float
  to_first_p50: float
  to_first_p99: float
  per_token_p50: float
  per_token_p99: float
  cached: float  # share of the prompt tokens
  busy: float  # share of the time that devices compute


def summary(
  answers: Sequence[replica_lib.Answer],
  replicas: Sequence[replica_lib.Replica],
) -> Summary:
  """Returns the speed of a fleet from all of its answers."""
  start = min(each.request.arrival for each in answers)
  seconds = max(each.last for each in answers) - start
  first = np.array([each.to_first for each in answers])
  per_token = np.array([each.per_token for each in answers])
  prompts = sum(len(each.request.prompt) for each in answers)
  return Summary(
    requests_per_s=len(answers) / seconds,
    tokens_per_s=sum(each.num_made for each in answers) / seconds,
    to_last_mean=float(
      np.mean([each.last - each.request.arrival for each in answers])
    ),
    to_first_p50=float(np.percentile(first, 50)),
    to_first_p99=float(np.percentile(first, 99)),
    per_token_p50=float(np.percentile(per_token, 50)),
    per_token_p99=float(np.percentile(per_token, 99)),
    cached=sum(each.num_cached for each in answers) / prompts,
    busy=sum(each.busy for each in replicas)
    / (seconds * max(len(replicas), 1)),
  )
