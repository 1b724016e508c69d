"""The metrics of all versions, in one text for Prometheus.

Each engine counts in a registry of its own. Here every sample gets the labels
`model` and `version`, and families of one name are joined.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import prometheus_client
from prometheus_client import metrics_core


class _Joined:
  """Looks like a registry to prometheus_client."""

  def __init__(self, registries: Iterable[tuple[dict[str, str], Any]]):
    self._registries = registries

  def collect(self) -> Iterator[metrics_core.Metric]:
    """Yields each family once, with the samples of all registries."""
    families: dict[str, metrics_core.Metric] = {}
    for labels, registry in self._registries:
      for family in registry.collect():
        joined = families.setdefault(
          family.name,
          metrics_core.Metric(family.name, family.documentation, family.type),
        )
        joined.samples += [
          each._replace(labels={**labels, **each.labels})
          for each in family.samples
        ]
    yield from families.values()


def text(registries: Iterable[tuple[dict[str, str], Any]]) -> bytes:
  """Returns the metrics of registries, each with labels for its samples."""
  joined: Any = _Joined(list(registries))
  return prometheus_client.generate_latest(joined)
