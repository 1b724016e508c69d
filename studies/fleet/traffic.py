"""Traffic for a simulated fleet: bursts, heavy tails and shared prefixes.

Arrivals come in bursts: the rate of a Poisson process changes every 10 seconds.
In each cycle of twelve intervals the rates are twelve quantiles of a gamma
distribution, in a random order that is the same for all loads: fleets of any
size meet the same bursts, and none is judged by a burst that others were
spared. Lengths of prompts and answers are
log-normal, so that a few are very long. A share of the requests begins with one
of a few prefixes (system prompts, documents), which have Zipf's frequencies.

Published traces look so: Azure's LLM inference trace (Patel et al., Splitwise,
arXiv:2311.18677, section 3) has medians of 1,020 and 1,500 prompt tokens and of
129 and 13 answer tokens for conversations and code, with long tails; BurstGPT
(Wang et al., arXiv:2401.17644) fits gamma distributions to the bursts. The
defaults are of this kind and are no fit to any of them.
"""

from collections.abc import Iterator, Sequence
import dataclasses

import numpy as np
from scipy import special

from checks import expect

_CYCLE = 12  # intervals whose rates together are those of the distribution


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traffic:
  """How requests look."""

  rate: float  # requests per second, on average
  prompt_tokens: float = 500.0  # median, without a shared prefix
  answer_tokens: float = 130.0  # median
  spread: float = 1.0  # standard deviation of the logarithm of both lengths
  most_tokens: int = 4096  # of a prompt and its answer
  most_answer: int = 1024  # as `max_tokens` of a request
  burstiness: float = (
    1.0  # squared coefficient of variation of the rate; 0: none
  )
  burst_seconds: float = 10.0  # of one rate
  num_prefixes: int = 50
  prefix_tokens: int = 800
  prefix_share: float = 0.7  # of the requests that begin with a prefix

  def __post_init__(self):
    for name in ('rate', 'prompt_tokens', 'answer_tokens', 'burst_seconds'):
      if not getattr(self, name) > 0:
        raise ValueError(
          f'--{name}: got {getattr(self, name)}, expected a number above 0'
        )
    if self.spread < 0 or self.burstiness < 0:
      raise ValueError(
        f'--burstiness, spread: got {self.burstiness} and {self.spread},'
        ' expected numbers of at least 0'
      )
    if not 0 <= self.prefix_share <= 1:
      raise ValueError(
        f'--prefix_share: got {self.prefix_share}, expected a share, 0 to 1'
      )
    expect.at_least('--num_prefixes', self.num_prefixes, 1)
    if self.prefix_tokens + self.most_answer >= self.most_tokens:
      raise ValueError(
        f'--prefix_tokens: got {self.prefix_tokens} with answers of up to'
        f' {self.most_answer}, expected both below the context of'
        f' {self.most_tokens} tokens; lower one of them'
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
  """One request; `num_new` is known to nobody before the answer ends."""

  arrival: float  # seconds
  prompt: tuple[int, ...]  # token ids; equal beginnings are shared prefixes
  num_new: int  # tokens of its answer
  most_new: int  # tokens that it asks for


def requests(traffic: Traffic, num: int, seed: int = 0) -> list[Request]:
  """Returns requests in the order of their arrival."""
  rng = np.random.default_rng(seed)
  popularity = 1 / np.arange(1, traffic.num_prefixes + 1)
  popularity /= popularity.sum()
  found = []
  rates = _rates(traffic, np.random.default_rng([seed, 1]))
  for place, arrival in enumerate(_arrivals(traffic, num, rates, rng)):
    prefix: Sequence[int] = ()
    if rng.random() < traffic.prefix_share:
      which = int(rng.choice(traffic.num_prefixes, p=popularity))
      start = which * traffic.prefix_tokens
      prefix = range(start, start + traffic.prefix_tokens)
    num_new = min(
      _length(traffic.answer_tokens, traffic, rng), traffic.most_answer
    )
    room = traffic.most_tokens - traffic.most_answer - len(prefix)
    own = min(_length(traffic.prompt_tokens, traffic, rng), room)
    # Ids that no other prompt has: negative, and never of a prefix.
    first = -(place + 1) * traffic.most_tokens
    prompt = (*prefix, *range(first, first + own))
    found.append(
      Request(
        arrival=arrival,
        prompt=prompt,
        num_new=num_new,
        most_new=traffic.most_answer,
      )
    )
  return found


def _arrivals(
  traffic: Traffic, num: int, rates: Iterator[float], rng
) -> list[float]:
  found: list[float] = []
  start = 0.0
  while len(found) < num:
    count = rng.poisson(next(rates) * traffic.burst_seconds)
    found += (
      start + np.sort(rng.uniform(0, traffic.burst_seconds, count))
    ).tolist()
    start += traffic.burst_seconds
  return found[:num]


def _rates(traffic: Traffic, rng) -> Iterator[float]:
  """Yields the rate of each interval, in requests per second."""
  rates = np.full(_CYCLE, traffic.rate)
  if traffic.burstiness:
    shape = 1 / traffic.burstiness
    places = (np.arange(_CYCLE) + 0.5) / _CYCLE
    quantiles = special.gammaincinv(shape, places)
    rates *= quantiles / quantiles.mean()
  while True:
    yield from rng.permutation(rates).tolist()


def _length(median: float, traffic: Traffic, rng) -> int:
  return max(1, round(median * float(np.exp(traffic.spread * rng.normal()))))
