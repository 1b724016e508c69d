"""The cost of requests: their usage, counters of steps, the time of a step."""

from collections.abc import Iterable
import math
import time

from inference.engine import metrics as metrics_lib
from inference.requests import answer
from inference.scheduling import spans
from models import flops, model_config as model_config_lib

# Weight of a step that took longer than the estimate of its duration. A shorter
# step replaces the estimate: a longer time may only mean that the host read the
# result late.
_SLOWER_WEIGHT = 0.1


class Accounts:
  """Charges work to sequences, and counts it in the metrics of an engine."""

  def __init__(
    self,
    metrics: metrics_lib.Metrics,
    model_config: model_config_lib.ModelConfig,
    page_bytes: float,
  ):
    """Starts the clock of memory charges.

    Args:
      metrics: the metrics of the engine.
      model_config: the config of the model.
      page_bytes: bytes of one page, all layers.
    """
    self._metrics, self._page_bytes = metrics, page_bytes
    self._flops = flops.SpanFlops(model_config)
    self._last_charged = self._last_landed = time.perf_counter()
    # Of one decode step, estimated, by the rows of its shape.
    self._step_seconds: dict[int, float] = {}
    self._num_decodes, self._most_steps = 0, 1  # of the latest dispatch

  def charge_memory(self, lives: Iterable[answer.Live], now: float) -> None:
    """Charges running sequences for their pages since the last charge."""
    seconds, self._last_charged = now - self._last_charged, now
    for live in lives:
      held = len(live.sequence.pages) * self._page_bytes
      live.usage.kv_byte_seconds += held * seconds

  def is_beyond(
    self, live: answer.Live, span: spans.Span, is_decode: bool, num_tokens: int
  ) -> bool:
    """Returns whether a span would exceed the FLOPs that a sequence may use.

    If `most_flops` is the cost of the whole sequence, only work that is
    repeated after a preemption can exceed it.

    Args:
      live: the sequence.
      span: a span that the device has computed and that is not yet charged.
      is_decode: whether the span is of decode steps, not a chunk.
      num_tokens: decoded tokens of the span.
    """
    if live.most_flops is None:
      return False
    if is_decode:
      cost = self._cost(live, span.start, num_tokens, num_tokens)
    else:
      cost = self._cost(live, span.start, span.length, _num_logits(live, span))
    return live.usage.flops + cost > live.most_flops

  def charge_chunk(self, live: answer.Live, chunk: spans.Span) -> None:
    """Charges a sequence for a chunk of its prompt."""
    live.usage.prefill_tokens += chunk.length
    self._charge(live, chunk.start, chunk.length, _num_logits(live, chunk))

  def charge_decodes(
    self, live: answer.Live, decode: spans.Span, num_tokens: int
  ) -> None:
    """Charges a sequence for the first decode steps of a dispatch.

    Tokens after the end of the answer are not charged: how many there are
    depends on how many steps a dispatch has.
    """
    live.usage.decode_tokens += num_tokens
    self._charge(live, decode.start, num_tokens, num_tokens)

  def _charge(
    self, live: answer.Live, start: int, length: int, num_logits: int
  ) -> None:
    live.note_computed(start + length)
    cost = self._cost(live, start, length, num_logits)
    live.usage.flops += cost
    self._metrics.flops.inc(cost)

  def _cost(
    self, live: answer.Live, start: int, length: int, num_logits: int
  ) -> float:
    # A multiplication and an addition per number of an adapter's matrices.
    added = 2 * length * live.adapter.num_params
    return self._flops(start, length, num_logits) + added

  def count(
    self,
    step: spans.Step,
    *,
    num_steps: int,
    num_decoded: int,
    num_prefilled: int,
    rows: int,
    sent_at: float,
    now: float,
    is_timed: bool,
  ) -> None:
    """Counts a dispatch that has been read, and estimates a step's duration.

    Args:
      step: the step of the dispatch.
      num_steps: steps that the device computed.
      num_decoded: decoded tokens that belong to an answer.
      num_prefilled: tokens of chunks that belong to an answer.
      rows: tokens in the shape of each step, padding included.
      sent_at: time of the dispatch, in seconds of `time.perf_counter`.
      now: the time.
      is_timed: whether the dispatch was read without a pause before.
    """
    self._metrics.count(
      steps=num_steps,
      decoded=num_decoded,
      prefilled=num_prefilled,
      rows=num_steps * rows,
    )
    is_timed = is_timed and num_steps > 0
    if is_timed and not step.chunks and not step.is_verified:
      seconds = (now - max(sent_at, self._last_landed)) / num_steps
      known = self._step_seconds.get(rows, math.inf)
      if seconds > known:
        seconds = known + _SLOWER_WEIGHT * (seconds - known)
      self._step_seconds[rows] = seconds
    self._last_landed = now

  def most_decode_steps(
    self, most: int, seconds: float, num_decodes: int
  ) -> int:
    """Returns how many decode steps fit into `seconds`, 1 to `most`.

    A step of many sequences takes longer than one of few. The estimate is that
    of the smallest shape with enough rows that has been timed; without one, a
    single step is timed. Requests come in bursts, so the first dispatch after a
    sequence has come has one step, and each next one up to twice as many: the
    rest of a burst does not wait for it.

    Args:
      most: the most steps of one dispatch.
      seconds: duration of the dispatch; 0: no limit.
      num_decodes: sequences that are decoded.
    """
    if not seconds:
      return most
    has_grown = num_decodes > self._num_decodes
    self._num_decodes = num_decodes
    large = [rows for rows in self._step_seconds if rows >= num_decodes]
    if has_grown or not large:
      self._most_steps = 1
    else:
      fit = int(seconds / self._step_seconds[min(large)])
      self._most_steps = max(1, min(most, fit, 2 * self._most_steps))
    return self._most_steps


def _num_logits(live: answer.Live, chunk: spans.Span) -> int:
  return chunk.length if live.scored_prompt() else int(chunk.samples)
