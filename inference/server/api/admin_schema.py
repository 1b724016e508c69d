"""The bodies of POST /admin/models and POST /admin/traffic."""

import math
from typing import Annotated

from checks import expect
from inference.server.api import errors, schema

_MOST_NAME = 128  # characters of the name of a model


class LoadRequest(schema.Body):
  """The body of POST /admin/models."""

  name: str
  # Of a frozen directory or an adapter's, relative to --server.models_root.
  path: str
  # The version that an adapter is loaded beside, NAME@DIGEST; null: the one
  # with the weights that it was trained on.
  base: str | None = None
  kv_memory: str | None = None  # such as 500MB; null: as --engine.kv_memory

  def check(self) -> None:
    """Checks the name.

    Raises:
      ApiError: status 400, it could not be told from NAME@DIGEST.
    """
    is_fit = self.name.strip() and self.name.isprintable()
    if not is_fit or '@' in self.name or len(self.name) > _MOST_NAME:
      raise errors.invalid(
        'name',
        f'got {expect.shown(self.name)}, expected 1 to {_MOST_NAME} printable'
        ' characters without @',
      )

  def check_whole(self) -> None:
    """Refuses what only adapters have.

    Raises:
      ApiError: status 400, a base is given.
    """
    if self.base is not None:
      raise errors.invalid(
        'base',
        f'got {expect.shown(self.base)} with a frozen directory, expected null;'
        ' only an adapter has a base',
      )

  def check_adapter(self) -> None:
    """Refuses what an adapter has not.

    Raises:
      ApiError: status 400, memory for pages is given.
    """
    if self.kv_memory is not None:
      raise errors.invalid(
        'kv_memory',
        f'got {expect.shown(self.kv_memory)} with an adapter, expected null;'
        ' its pages are those of its base',
      )


class TrafficRequest(schema.Body):
  """The body of POST /admin/traffic; versions are NAME@DIGEST, or digests."""

  name: str
  weights: Annotated[
    dict[str, float], schema.FEW
  ]  # relative; {}: nobody answers
  # Share of the requests that each gets a copy of, 0 to 1.
  shadows: Annotated[dict[str, float], schema.FEW] | None = None
  # All requests of a principal go to one version; null: each goes by itself.
  by_principal: bool | None = None

  def check(self) -> None:
    """Checks the ranges of weights and shares.

    Raises:
      ApiError: status 400, one is out of range.
    """
    for version, weight in self.weights.items():
      if not 0 <= weight < math.inf:
        raise errors.invalid(
          'weights',
          f'got {weight} for {expect.shown(version)}, expected a finite number,'
          ' at least 0',
        )
    for version, share in (self.shadows or {}).items():
      if not 0 <= share <= 1:
        raise errors.invalid(
          'shadows',
          f'got {share} for {expect.shown(version)}, expected 0 to 1',
        )
