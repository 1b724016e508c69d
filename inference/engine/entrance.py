"""How a request enters an engine: it becomes its sequences."""

from collections.abc import Hashable
import itertools

from inference.engine import adapter_table, engine_config, landing
from inference.engine.apart import prefillers as prefillers_lib
from inference.output import stop_strings
from inference.requests import answer as answer_lib, requests as requests_lib
from inference.sampling import settings as settings_lib
from inference.scheduling import page_tables, sequence_manager
from text import tokenizer as tokenizer_lib


def scope_of(
  request: requests_lib.Request,
  weights_digest: str,
  config: engine_config.EngineConfig,
) -> Hashable:
  """Returns the scope of a request, within which prefixes are shared."""
  principal = None if config.share_prefixes else request.principal
  return weights_digest, request.adapter, principal


class Entrance:
  """Makes the sequences of the requests of an engine."""

  def __init__(
    self,
    config: engine_config.EngineConfig,
    *,
    tokenizer: tokenizer_lib.Tokenizer,
    adapters: adapter_table.AdapterTable,
    manager: sequence_manager.SequenceManager,
    answers: landing.Answers,
    prefillers: prefillers_lib.Prefillers | None,
  ):
    """Takes the parts of an engine.

    Args:
      config: of the engine.
      tokenizer: of the model.
      adapters: of the model.
      manager: gets the sequences.
      answers: gets their answers.
      prefillers: compute long prompts; None: the engine does.
    """
    self._config, self._tokenizer, self._adapters = config, tokenizer, adapters
    self._manager, self._answers = manager, answers
    self._prefillers = prefillers
    self._ids = itertools.count()

  def enter(self, request: requests_lib.Request, weights_digest: str) -> int:
    """Makes the n sequences of a checked request; returns its id."""
    assert request.room is not None
    request_id, settings = next(self._ids), request.settings
    base = settings_lib.new_seed() if settings.seed is None else settings.seed
    stop = stop_strings.StopStrings(settings.stop)
    adapter = self._adapters.find(request.adapter)
    parent = None
    for index in range(settings.n):
      sequence = self._sequence(
        (request_id, index), request, weights_digest, parent
      )
      parent = parent or sequence
      self._answers.add(
        answer_lib.Live(
          request_id,
          index,
          request,
          sequence,
          seed=settings_lib.sample_seed(base, request.first_sample + index),
          tokenizer=self._tokenizer,
          adapter=adapter,
          stop=stop,
        )
      )
    return request_id

  def _sequence(
    self,
    id: Hashable,
    request: requests_lib.Request,
    weights_digest: str,
    parent: page_tables.Sequence | None,
  ) -> page_tables.Sequence:
    """Submits one sequence of a request."""
    assert request.room is not None
    scope = scope_of(request, weights_digest, self._config)
    num_sent = 0  # tokens of the prompt that are computed elsewhere
    if self._prefillers and parent is None:
      num_sent = self._prefillers.num_tokens(request, self._manager, scope)
    sequence = self._manager.submit(
      id,
      request.prompt_ids,
      request.room,
      principal=request.principal,
      priority=request.priority,
      weight=request.weight,
      scope=scope,
      # These need every position of the prompt computed.
      reads_prefix_cache=(
        self._config.prefix_cache
        and request.settings.prompt_logprobs is None
        and request.pooling != 'mean'
      ),
      in_chunks=request.pooling is not None,
      awaits_pages=num_sent > 0,
      parent=parent,
    )
    if self._prefillers and num_sent:
      self._prefillers.submit(id, request, num_sent)
    return sequence
