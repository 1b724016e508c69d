"""Placement by prefix affinity, as the server places requests on replicas."""

from collections.abc import Sequence

from inference.server.replicas import placement
from studies.fleet import replica as replica_lib, traffic

# Requests by which the replica that knows a prefix may be busier than others.
MARGIN = 4


class Affinity:
  """Places a request where its prefix is known, within a margin of load.

  The choice is `inference.server.replicas.placement`, the server's own.
  """

  def __init__(self, most_tokens: int, margin: int = MARGIN):
    """Starts without any prefix.

    Args:
      most_tokens: that the cache of a replica holds.
      margin: requests by which a replica may be busier.
    """
    self._most_tokens, self._margin = most_tokens, margin
    self._known: dict[int, placement.Known] = {}

  def __call__(
    self,
    request: traffic.Request,
    replicas: Sequence[replica_lib.Replica],
  ) -> int:
    """Returns the replica that answers, which knows the prompt from now on."""
    blocks = placement.blocks((), request.prompt)
    for each in replicas:
      if each.index not in self._known:
        self._known[each.index] = placement.Known(self._most_tokens)
    found = placement.choose(
      [
        placement.Candidate(
          index=each.index,
          num_open=each.num_open,
          num_known=self._known[each.index].num_known(blocks),
          num_served=each.num_served,
        )
        for each in replicas
      ],
      margin=self._margin,
    )
    self._known[found.index].add(blocks)
    return found.index
