"""The traffic of a name: the version that answers, and versions with a copy.

    version = traffic.choose(weights, key)

The choice is a function of the key alone, so that it can be explained later:
the key is the id of the request, its conversation or its principal. The method
is weighted rendezvous hashing: each version draws a number from the key, and
the smallest number, divided by the weight, wins. A changed weight moves only
requests that leave or enter that version.

Reference: Schindelhauer and Schomaker, "Weighted Distributed Hash Tables",
SPAA 2005, section 4 (the logarithmic method).
"""

from collections.abc import Mapping
import dataclasses
import hashlib
import math


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traffic:
  """The versions that answer requests to a name, by weights digest."""

  weights: Mapping[str, float]  # relative; a version without one gets none
  # Share of the requests that a version gets a copy of, 0 to 1. Its answer to
  # the copy is discarded.
  shadows: Mapping[str, float] = dataclasses.field(default_factory=dict)
  # Whether all requests of a principal go to one version.
  is_by_principal: bool = False


def key(
  traffic: Traffic, *, request_id: str, principal: str, conversation: str
) -> str:
  """Returns the text that decides the version of a request.

  Requests of one principal that name the same conversation have the same key.
  """
  if conversation:
    return f'conversation\0{principal}\0{conversation}'
  if traffic.is_by_principal:
    return f'principal\0{principal}'
  return f'request\0{request_id}'


def choose(weights: Mapping[str, float], key: str) -> str | None:
  """Returns the version of a key; None if no version has a weight.

  Over many keys, a version is chosen as often as its share of the weights.
  """
  ranked = {
    version: -math.log(_uniform(version, key)) / weight
    for version, weight in weights.items()
    if weight > 0
  }
  return min(ranked, key=ranked.__getitem__, default=None)


def copies(shadows: Mapping[str, float], key: str) -> list[str]:
  """Returns the versions that get a copy of the request of a key."""
  return [
    version
    for version, share in shadows.items()
    # Another hash than in `choose`, so the copies are a fair sample.
    if _uniform(f'shadow\0{version}', key) <= share
  ]


def _uniform(version: str, key: str) -> float:
  """Returns a number in (0, 1] that a version draws from a key."""
  digest = hashlib.sha256(f'{version}\0{key}'.encode()).digest()
  return (int.from_bytes(digest[:8]) + 1) / 2**64
