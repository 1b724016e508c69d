"""The answers of an engine: they take the tokens of its dispatches, and end.

The engine sends steps. When the outputs of one are read, each sequence of it
gets its tokens here, is charged for them, and is closed if one of them ends its
answer.
"""

from inference.engine import (
  engine_config,
  flight as flight_lib,
  inputs as inputs_lib,
  metrics as metrics_lib,
  steps,
)
from inference.engine.drafting import speculating
from inference.requests import accounts as accounts_lib, answer, requests
from inference.scheduling import page_tables, sequence_manager, spans


class Answers:
  """The answers that are open; belongs to the thread of the engine."""

  def __init__(
    self,
    config: engine_config.EngineConfig,
    manager: sequence_manager.SequenceManager,
    metrics: metrics_lib.Metrics,
    accounts: accounts_lib.Accounts,
    speculator: speculating.Speculator,
  ):
    """Starts without answers; the arguments are parts of the engine."""
    self._config, self._manager, self._metrics = config, manager, metrics
    self._accounts, self._speculator = accounts, speculator
    self.live: dict[page_tables.Sequence, answer.Live] = {}
    self.num_constrained = 0  # by a grammar

  def add(self, live: answer.Live) -> None:
    """Opens an answer."""
    live.adapter.num_open += 1
    self.num_constrained += live.matcher is not None
    self.live[live.sequence] = live

  def close(self, live: answer.Live, reason: str) -> None:
    """Removes an answer and its sequence, which have ended."""
    self._metrics.finished.labels(reason).inc()
    is_sound = reason != 'error' or live.is_stuck
    self._manager.end(live.sequence, is_sound=is_sound)
    self.num_constrained -= live.matcher is not None
    self._speculator.forget(live.sequence)
    live.adapter.num_open -= 1
    del self.live[live.sequence]

  def charge_memory(self, now: float) -> None:
    """Charges running sequences for their pages since the last charge."""
    running = self._manager.running()
    self._accounts.charge_memory([self.live[each] for each in running], now)

  def land(
    self, flight: flight_lib.Flight, now: float, outputs: steps.Outputs
  ) -> list[requests.Update]:
    """Takes the tokens of a dispatch; returns the updates of its sequences.

    Args:
      flight: that was read.
      now: the time of that, in seconds of `time.perf_counter`.
      outputs: of the dispatch, on the host.
    """
    self.charge_memory(now)
    num_decodes, _ = flight.shape
    # After the last answer one dispatch may be left, which the host reads when
    # the next request comes. It is not timed.
    is_timed = any(span.sequence in self.live for span in flight.step.spans)
    updates, num_decoded, num_prefilled = [], 0, 0
    for place, span in inputs_lib.placed_spans(flight.step, num_decodes):
      row = outputs.tokens_SR[:, place].tolist()
      tokens = [token for token in row if token != steps.NOT_COMPUTED]
      live = self.live.get(span.sequence)
      if live is None:  # it ended while this dispatch ran
        if -1 in tokens:
          self._manager.discard(span.sequence)
        continue
      if live.is_stuck:
        tokens = [-1]
      if self._accounts.is_beyond(live, span, place < num_decodes, len(tokens)):
        updates.append(live.cut(now))
        self.close(live, 'length')
        continue
      if place >= num_decodes:
        self._accounts.charge_chunk(live, span)
        num_prefilled += span.length
        at = (place - num_decodes) * self._config.chunk_tokens
        if not live.take_prompt_logprobs(outputs.prompt, span, at):
          tokens = [-1]
        live.take_hidden(outputs.hidden_MD, span, at)
        if not span.samples and tokens[0] >= 0:
          continue
      update, num_taken = self._push(live, span, tokens, outputs, place, now)
      updates.append(update)
      if place < num_decodes:
        self._accounts.charge_decodes(live, span, num_taken)
        num_decoded += num_taken
      if flight.step.is_verified and place < num_decodes:
        self._speculator.landed(span, tokens[:num_taken], live)
    num_steps = steps.num_computed(outputs)
    if flight.step.is_verified:
      num_steps = 1
    self._speculator.timed(flight, num_steps * is_timed, now)
    self._accounts.count(
      flight.step,
      num_steps=num_steps,
      num_decoded=num_decoded,
      num_prefilled=num_prefilled,
      rows=flight.num_rows(self._config.chunk_tokens),
      sent_at=flight.sent_at,
      now=now,
      is_timed=is_timed,
    )
    return updates

  def _push(
    self,
    live: answer.Live,
    span: spans.Span,
    tokens: list[int],
    outputs: steps.Outputs,
    place: int,
    now: float,
  ) -> tuple[requests.Update, int]:
    """Gives an answer its next tokens; returns how many it took."""
    is_first = live.last_at is None
    since = live.submitted_at if live.last_at is None else live.last_at
    update, num_taken = live.push(tokens, outputs.logprobs, place, now)
    taken = [token for token in tokens[:num_taken] if token >= 0]
    for token in taken:
      self._manager.append(span.sequence, token)
    if taken:
      self._metrics.observe_tokens(len(taken), now - since, is_first=is_first)
    if live.transcript.finish_reason:
      self.close(live, live.transcript.finish_reason)
    return update, num_taken
