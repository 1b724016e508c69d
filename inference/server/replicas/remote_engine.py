"""What the server knows of an engine in another process.

A `Generator` makes requests with it: it checks prompts, and refuses what the
engine could never answer, before anything is sent. It has neither weights nor
programs.
"""

import dataclasses
from typing import Any

from frozen import format as frozen_format
from inference import generate
from inference.constraints import grammars
from inference.engine import adapter_table, engine_config
from inference.requests import requests as requests_lib
from inference.sampling import settings as settings_lib
from inference.server.replicas import values
from text import tokenizer as tokenizer_lib


def generator(
  directory: str, config: engine_config.EngineConfig
) -> generate.Generator:
  """Returns a generator that makes requests for an engine elsewhere.

  Raises:
    FileNotFoundError, ValueError: as `generate.load`, except for weights.
  """
  frozen = frozen_format.open_directory(directory)
  frozen.manifest.check_language_model('model', directory)
  return generate.Generator(
    frozen, config, engine=lambda words: RemoteEngine(frozen, words, config)
  )


class _Backend:
  """The part of `execution.Backend` that fingerprints need."""

  def __init__(self):
    self._numerics: dict[str, Any] = {}
    self.products = ''

  def learn(self, facts: values.Facts) -> None:
    """Takes the values of a loaded engine."""
    self._numerics, self.products = facts.numerics, facts.products

  def numerics(self, *_) -> dict[str, Any]:
    """Returns what decides the numbers of a step."""
    return self._numerics


class _Adapters:
  """The adapters of the engines, by digest."""

  def __init__(self):
    self.rank = 0
    self._found = {'': adapter_table.Loaded('', 0, 0)}

  def find(self, digest: str) -> adapter_table.Loaded:
    """Returns a loaded adapter.

    Raises:
      ValueError: it is not loaded.
    """
    if digest not in self._found:
      raise ValueError(
        f'adapter: got {digest[:16]}, which is not loaded, expected one that'
        ' is; load it first'
      )
    return self._found[digest]

  def add(self, digest: str, num_params: int) -> None:
    """Notes that an adapter is loaded."""
    self._found[digest] = adapter_table.Loaded(digest, 0, num_params)

  def remove(self, digest: str) -> None:
    """Notes that an adapter is unloaded."""
    self._found.pop(digest, None)


class RemoteEngine:
  """Has the members of `Engine` that requests are made with."""

  def __init__(
    self,
    frozen: frozen_format.Opened,
    tokenizer: tokenizer_lib.Tokenizer,
    config: engine_config.EngineConfig,
  ):
    """Knows the manifest; the rest comes with `learn`."""
    self.config, self.tokenizer = config, tokenizer
    self.model_config = dataclasses.replace(frozen.config, scan_layers=False)
    self.context = config.context(frozen.config.max_length)
    self.backend, self.adapters = _Backend(), _Adapters()
    self.device = None  # it is elsewhere
    self._grammars, self._capacity = grammars.Grammars(tokenizer), 0

  def learn(self, facts: values.Facts) -> None:
    """Takes the values of a loaded engine; all replicas have the same."""
    self._capacity = facts.capacity
    self.backend.learn(facts)
    self.adapters.rank = facts.adapter_rank

  def checked(self, request: requests_lib.Request) -> requests_lib.Request:
    """Returns a request with its `room`; see `Engine.checked`.

    A constraint is compiled here to refuse a wrong one; the replica compiles it
    again, since a grammar belongs to its process.
    """
    self.adapters.find(request.adapter)
    room = requests_lib.room_for(
      request,
      vocab_size=self.tokenizer.vocab_size,
      context=self.context,
      capacity=self._capacity,
    )
    constraint, cap = request.settings.constraint, request.thinking
    if constraint or cap:
      kind = constraint.kind if constraint else 'a cap on reasoning'
      if not self.config.constraints:
        raise settings_lib.SettingError(
          'constraint',
          kind,
          'none: this engine answers without grammars',
          'start it with --engine.constraints',
        )
      if request.target is not None or request.pooling:
        raise settings_lib.SettingError(
          'constraint', kind, 'none where no text is sampled'
        )
    if constraint:
      self._grammars.compile(constraint)
    return dataclasses.replace(request, room=room)


def sent(request: requests_lib.Request) -> requests_lib.Request:
  """Returns a checked request as it is sent: of values alone.

  A constrained one is checked again where its grammar is needed.
  """
  if request.settings.constraint is None and request.thinking is None:
    return request
  return dataclasses.replace(request, room=None, grammar=None)
