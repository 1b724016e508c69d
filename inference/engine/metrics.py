"""Figures of one engine, as Prometheus collects them.

Counters only grow, so that any two readings give the rate between them. Each
engine has a registry of its own: tests and benchmarks have several engines in a
process.
"""

import prometheus_client

# Seconds. From a step of a small model to a prompt that waits for its turn.
_SECONDS = tuple(
  base * 10.0**power for power in range(-4, 3) for base in (1, 1.5, 2, 3, 5, 7)
)


class Metrics:
  """The counters and histograms that the engine keeps."""

  def __init__(self):
    self.registry = prometheus_client.CollectorRegistry()

    def counter(name: str, text: str, labels=()):
      return prometheus_client.Counter(
        name, text, labels, registry=self.registry
      )

    def gauge(name: str, text: str):
      return prometheus_client.Gauge(name, text, registry=self.registry)

    def histogram(name: str, text: str):
      return prometheus_client.Histogram(
        name, text, registry=self.registry, buckets=_SECONDS
      )

    self.steps = counter('engine_steps', 'Steps dispatched.')
    self.step_seconds = counter('engine_step_seconds', 'Wall time of steps.')
    self.host_seconds = counter(
      'engine_host_seconds',
      'Of that, planning, preparing, and taking tokens in.',
    )
    self.rows = counter('engine_rows', 'Rows computed.', ['kind'])
    self.prefill_tokens = counter('prefill_tokens', 'Computed in chunks.')
    self.decode_tokens = counter('decode_tokens', 'Computed one at a time.')
    self.cached_tokens = counter('cached_tokens', 'Of prompts, not computed.')
    self.sampled_tokens = counter('sampled_tokens', 'Tokens given to requests.')
    self.preemptions = counter(
      'preemptions', 'Sequences that lost their pages.'
    )
    self.flops = counter('flops', 'Of matrix products, padding left out.')
    self.finished = counter('finished', 'Sequences that ended.', ['reason'])
    self.refused = counter('refused', 'Requests not taken in.', ['reason'])
    self.compilations = counter(
      'compilations_after_ready', 'Programs compiled since; 0 by contract.'
    )
    self.running = gauge('running', 'Sequences that have a slot.')
    self.waiting = gauge('waiting', 'Sequences that wait for one.')
    self.pages_used = gauge('kv_pages_used', 'Pages of sequences.')
    self.pages_idle = gauge('kv_pages_idle', 'Pages of the prefix cache alone.')
    self.pages_free = gauge('kv_pages_free', 'Pages that hold nothing.')
    self.kv_waste = gauge(
      'kv_waste', 'Share of the slots in used pages that holds no token.'
    )
    self.prefix_hit_rate = gauge(
      'prefix_hit_rate', 'Share of the tokens looked up that were found.'
    )
    self.first_token = histogram(
      'time_to_first_token_seconds', 'From submission to the first token.'
    )
    self.inter_token = histogram(
      'inter_token_seconds', 'Between tokens of a sequence.'
    )
    self.queue = histogram(
      'queue_seconds', 'From submission to the first step.'
    )

  def value(self, name: str, **labels: str) -> float:
    """Returns a sample by the name that it is exported with."""
    return self.registry.get_sample_value(name, labels) or 0.0

  @property
  def padding_waste(self) -> float:
    """Share of the rows computed that were padding."""
    real = self.value('engine_rows_total', kind='real')
    padding = self.value('engine_rows_total', kind='padding')
    return padding / (real + padding) if padding else 0.0

  def text(self) -> bytes:
    """Returns everything in Prometheus' text format."""
    return prometheus_client.generate_latest(self.registry)
