"""The metrics of one engine, for Prometheus.

Counters only grow, so that any two readings give the rate between them. Each
engine has its own registry, since tests and benchmarks run several engines in
one process.
"""

import bisect
from collections.abc import Callable, Iterator
import itertools
import math
import threading

import prometheus_client
from prometheus_client import metrics_core, utils

from inference.scheduling import gauges as gauges_lib

# Bucket bounds in seconds, from a step of a small model to a long wait.
_SECONDS = tuple(
  base * 10.0**power for power in range(-4, 3) for base in (1, 1.5, 2, 3, 5, 7)
)


class Histogram:
  """A histogram that takes many equal values at once.

  That of prometheus_client takes 20 us per value, and the engine has one per
  token.
  """

  def __init__(
    self,
    name: str,
    text: str,
    registry: prometheus_client.CollectorRegistry,
    seconds: tuple[float, ...] = _SECONDS,
  ):
    """Starts empty, as a collector of the registry."""
    self._name, self._text, self._seconds = name, text, seconds
    self._counts = [0] * (len(seconds) + 1)
    self._sum = 0.0
    self._lock = threading.Lock()  # the server reads in its own thread
    registry.register(self)

  def observe(self, value: float, num: int = 1) -> None:
    """Adds a value `num` times."""
    with self._lock:
      self._counts[bisect.bisect_left(self._seconds, value)] += num
      self._sum += value * num

  def collect(self) -> Iterator[metrics_core.Metric]:
    """Yields the buckets, as a registry asks for them."""
    with self._lock:
      counts, total = list(itertools.accumulate(self._counts)), self._sum
    bounds = [*map(utils.floatToGoString, (*self._seconds, math.inf))]
    yield metrics_core.HistogramMetricFamily(
      self._name,
      self._text,
      buckets=list(zip(bounds, counts, strict=True)),
      sum_value=total,
    )


class Metrics:
  """The counters, gauges and histograms of one engine."""

  def __init__(self):
    self.registry = prometheus_client.CollectorRegistry()

    def counter(name: str, text: str, labels=()):
      return prometheus_client.Counter(
        name, text, labels, registry=self.registry
      )

    def gauge(name: str, text: str):
      return prometheus_client.Gauge(name, text, registry=self.registry)

    def histogram(name: str, text: str):
      return Histogram(name, text, self.registry)

    self.steps = counter('engine_steps', 'Steps computed.')
    self.dispatches = counter(
      'engine_dispatches',
      'Programs with one or more steps that were sent to the device.',
    )
    self.step_seconds = counter('engine_step_seconds', 'Wall time of steps.')
    self.host_seconds = counter(
      'engine_host_seconds',
      'Part of it in which the host did not wait for the device.',
    )
    self.rows = counter(
      'engine_rows', 'Tokens computed, real or padding.', ['kind']
    )
    self.prefill_tokens = counter(
      'prefill_tokens', 'Tokens computed in chunks.'
    )
    self.decode_tokens = counter(
      'decode_tokens', 'Tokens computed one at a time.'
    )
    self.cached_tokens = counter(
      'cached_tokens', 'Prompt tokens found computed.'
    )
    self.sampled_tokens = counter('sampled_tokens', 'Tokens of completions.')
    self.preemptions = counter(
      'preemptions', 'Sequences that gave their pages back.'
    )
    self.flops = counter('flops', 'FLOPs of matrix products, without padding.')
    self.finished = counter('finished', 'Sequences that ended.', ['reason'])
    self.refused = counter('refused', 'Submissions refused.', ['reason'])
    self.compilations = counter(
      'compilations_after_ready',
      'Programs compiled after the engine was ready; 0 by contract.',
    )
    self.running = gauge('running', 'Sequences that have a slot.')
    self.waiting = gauge('waiting', 'Sequences that wait for a slot.')
    self.pages_used = gauge('kv_pages_used', 'Pages held by sequences.')
    self.pages_idle = gauge(
      'kv_pages_idle', 'Pages held by the prefix cache only.'
    )
    self.pages_free = gauge('kv_pages_free', 'Pages that hold nothing.')
    self.kv_waste = gauge(
      'kv_waste', 'Share of the places in used pages that hold no token.'
    )
    self.prefix_hit_rate = gauge(
      'prefix_hit_rate', 'Share of looked-up tokens found in the prefix cache.'
    )
    self.first_token = histogram(
      'time_to_first_token_seconds', 'From submission to the first token.'
    )
    self.inter_token = histogram(
      'inter_token_seconds', 'Between two tokens of a sequence.'
    )
    self.queue = histogram(
      'queue_seconds', 'From submission to the first step.'
    )
    self._add_constraints(counter)
    self._add_speculation(counter, gauge)

  def _add_constraints(self, counter: Callable) -> None:
    self.mask_seconds = Histogram(
      'constraint_mask_seconds',
      'To find the tokens that a grammar allows, of one sequence.',
      self.registry,
      tuple(each / 100 for each in _SECONDS),
    )
    self.constrained_rows = counter(
      'constraint_rows', 'Tokens that were sampled within a grammar.'
    )
    self.forced_tokens = counter(
      'constraint_forced_tokens', 'Those of them that a grammar left no choice.'
    )

  def _add_speculation(self, counter: Callable, gauge: Callable) -> None:
    self.acceptance = gauge(
      'speculation_acceptance',
      'Share of late drafted tokens that were right, as all before them.',
    )
    self.speculation_gain = gauge(
      'speculation_gain',
      'Expected tokens per second of the last choice, beside decode steps; 1:'
      ' drafts are not worth their time.',
    )
    self.verified_spans = counter(
      'speculation_verified_spans', 'Drafts that were verified.'
    )
    self.drafted_tokens = counter(
      'speculation_tokens',
      'Tokens of drafts, by what became of them.',
      ['kind'],
    )

  def count_draft(self, *, drafted: int, accepted: int) -> None:
    """Counts a draft, and those of its tokens that an answer has taken."""
    if drafted:
      self.verified_spans.inc()
      self.drafted_tokens.labels('accepted').inc(accepted)
      self.drafted_tokens.labels('rejected').inc(drafted - accepted)

  def count(
    self, *, steps: int, decoded: int, prefilled: int, rows: int
  ) -> None:
    """Counts the steps of a dispatch.

    Args:
      steps: that the device computed.
      decoded: tokens that were decoded, and belong to an answer.
      prefilled: tokens that were computed in chunks, likewise.
      rows: tokens of the shape, in all steps; the others are padding.
    """
    self.steps.inc(steps)
    self.decode_tokens.inc(decoded)
    self.prefill_tokens.inc(prefilled)
    self.rows.labels('real').inc(decoded + prefilled)
    self.rows.labels('padding').inc(rows - decoded - prefilled)

  def observe_tokens(self, num: int, since: float, *, is_first: bool) -> None:
    """Notes that tokens of a sequence arrived together.

    Args:
      num: of tokens.
      since: seconds from the token before, or from the submission.
      is_first: whether the first token of the sequence is among them.
    """
    self.sampled_tokens.inc(num)
    if is_first:
      self.first_token.observe(since)
      num, since = num - 1, 0.0
    if num:
      self.inter_token.observe(since / num, num)

  def set_gauges(self, gauges: gauges_lib.Gauges, page_tokens: int) -> None:
    """Sets the gauges to the state of the sequences and their pages."""
    self.running.set(gauges.num_running)
    self.waiting.set(gauges.num_waiting)
    self.pages_used.set(gauges.pages_used)
    self.pages_idle.set(gauges.pages_idle)
    self.pages_free.set(gauges.pages_free)
    slots = gauges.pages_used * page_tokens
    self.kv_waste.set(1 - gauges.tokens_held / slots if slots else 0.0)
    looked_up = gauges.prefix_tokens_looked_up
    found = gauges.prefix_tokens_found
    self.prefix_hit_rate.set(found / looked_up if looked_up else 0.0)

  def value(self, name: str, **labels: str) -> float:
    """Returns a value by its exported name; 0 if it is missing."""
    return self.registry.get_sample_value(name, labels) or 0.0

  @property
  def padding_waste(self) -> float:
    """Share of the computed tokens that were padding."""
    real = self.value('engine_rows_total', kind='real')
    padding = self.value('engine_rows_total', kind='padding')
    return padding / (real + padding) if padding else 0.0

  def text(self) -> bytes:
    """Returns all metrics in the text format of Prometheus."""
    return prometheus_client.generate_latest(self.registry)
