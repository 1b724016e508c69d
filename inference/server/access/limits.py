"""Limits of a key: rates as token buckets, requests at once, a budget.

A bucket holds the allowance of a minute, is full at first, and fills evenly. So
the wait in a refusal is exact: after it, the same request passes, unless the
same key has sent another request meanwhile. Buckets are in memory, and full
again after a restart. The money that a key has spent is in the ledger.

Reference: the headers x-ratelimit-* and the codes of OpenAI's API.
"""

import math

from inference.server.access import keys
from inference.server.api import errors
from inference.server.records import ledger


class Bucket:
  """A token bucket: the requests, or tokens, that a key has left."""

  def __init__(self, per_minute: int, now: float):
    self.size = per_minute
    self._left, self._at = float(per_minute), now

  def left(self, now: float) -> float:
    """Returns the content of the bucket, at a time in seconds."""
    filled = (now - self._at) * self.size / 60
    return min(self._left + filled, float(self.size))

  def wait(self, num: int, now: float) -> float:
    """Returns the seconds until it holds `num`; infinity: never."""
    if num > self.size:
      return math.inf
    return max((num - self.left(now)) * 60 / self.size, 0.0)

  def take(self, num: float, now: float) -> None:
    """Takes `num` out of the bucket; a negative number is put back."""
    self._left, self._at = self.left(now) - num, now

  def resize(self, per_minute: int, now: float) -> None:
    """Gives the bucket another size; the tokens in use stay taken."""
    self.take(self.size - per_minute, now)
    self.size = per_minute


class Limits:
  """The state of one key within its limits."""

  def __init__(self, key: keys.Key, *, spent: int, now: float):
    """Starts with full buckets.

    Args:
      key: has the limits.
      spent: nanos that the ledger has settled for it.
      now: time in seconds; only differences count.
    """
    self.key = key
    self.spent, self.reserved, self.num_open = spent, 0, 0
    self._buckets = {
      kind: Bucket(most, now) for kind, most in _rates(key).items()
    }

  def follow(self, key: keys.Key, now: float) -> None:
    """Takes the limits of a key that was changed; what is used stays used."""
    if key == self.key:
      return
    self.key, before = key, self._buckets
    self._buckets = {}
    for kind, most in _rates(key).items():
      self._buckets[kind] = before.get(kind) or Bucket(most, now)
      self._buckets[kind].resize(most, now)

  def refusal(self, *, tokens: int, nanos: int, now: float) -> 'Refusal | None':
    """Returns why a request is refused, or None.

    Args:
      tokens: tokens of the prompts, and the most of the completions.
      nanos: the most that these tokens can cost.
      now: time in seconds.
    """
    key = self.key
    if key.budget is not None:
      budget = round(key.budget * ledger.NANOS)
      if self.spent + nanos > budget:
        return self._over_budget(nanos, budget)
      if self.spent + self.reserved + nanos > budget:
        return Refusal(
          'budget',
          'got a request while others of this key have reserved the rest of its'
          ' budget, expected fewer at once; wait until they end',
          wait=1.0,
        )
    if key.max_concurrent is not None and self.num_open >= key.max_concurrent:
      return Refusal(
        'concurrency',
        f'got a request while {self.num_open} of this key are open, expected at'
        f' most {key.max_concurrent} at once; wait until one ends',
        wait=1.0,
      )
    waits = [
      (bucket.wait(num, now), kind, num, bucket.size)
      for kind, num in (('requests', 1), ('tokens', tokens))
      if (bucket := self._buckets.get(kind))
    ]
    wait, kind, num, size = max(waits, default=(0.0, '', 0, 0))
    if not wait:
      return None
    fix = f'wait {wait:.3f} s'
    if math.isinf(wait):
      fix = 'this request can never pass: lower max_tokens or its prompt'
    return Refusal(
      kind,
      f'got {num} more {kind} than this key has left, expected at most {size}'
      f' per minute; {fix}',
      wait=wait,
    )

  def take(self, *, tokens: int, nanos: int, now: float) -> None:
    """Reserves tokens and nanos for a request that was not refused."""
    self.num_open += 1
    self.reserved += nanos
    for kind, num in (('requests', 1), ('tokens', tokens)):
      if bucket := self._buckets.get(kind):
        bucket.take(num, now)

  def settle(
    self, *, reserved: int, spent: int, unused_tokens: int, now: float
  ) -> None:
    """Ends a reservation with the nanos spent and the tokens not used."""
    self.num_open -= 1
    self.reserved -= reserved
    self.spent += spent
    if bucket := self._buckets.get('tokens'):
      bucket.take(-unused_tokens, now)

  def release(self, *, tokens: int, reserved: int, now: float) -> None:
    """Ends a reservation without any use."""
    self.settle(reserved=reserved, spent=0, unused_tokens=tokens, now=now)
    if bucket := self._buckets.get('requests'):
      bucket.take(-1, now)

  def headers(self, now: float) -> dict[str, str]:
    """Returns OpenAI's headers about the rates of the key."""
    found = {}
    for kind, bucket in self._buckets.items():
      full = bucket.wait(bucket.size, now)
      found[f'x-ratelimit-limit-{kind}'] = str(bucket.size)
      found[f'x-ratelimit-remaining-{kind}'] = str(
        max(int(bucket.left(now)), 0)
      )
      found[f'x-ratelimit-reset-{kind}'] = duration(full)
    return found

  def _over_budget(self, nanos: int, budget: int) -> 'Refusal':
    left = max(budget - self.spent, 0)
    return Refusal(
      'budget',
      f'got a request that may cost {nanos / ledger.NANOS:g}, expected at most'
      f' {left / ledger.NANOS:g}, which the budget of this key has left; lower'
      ' max_tokens, or ask for another key',
      wait=math.inf,
      code='insufficient_quota',
    )


def _rates(key: keys.Key) -> dict[str, int]:
  """Returns the limits per minute that a key has, by kind."""
  rates = {
    'requests': key.requests_per_minute,
    'tokens': key.tokens_per_minute,
  }
  return {kind: most for kind, most in rates.items() if most is not None}


class Refusal(errors.ApiError):
  """A 429 of one kind; its headers say when to try again."""

  def __init__(
    self,
    kind: str,
    message: str,
    *,
    wait: float,
    code: str = 'rate_limit_exceeded',
  ):
    """Describes the refusal.

    Args:
      kind: requests, tokens, concurrency or budget.
      message: got, expected, fix.
      wait: seconds until the same request may pass; infinity: never.
      code: the error code of OpenAI.
    """
    super().__init__(429, message, param=None, code=code)
    self.kind = kind
    if code == 'insufficient_quota':
      self.type = code
    self.headers = {}
    if math.isinf(wait):
      self.headers['x-should-retry'] = 'false'  # OpenAI's clients obey
    else:
      self.headers['retry-after'] = str(max(math.ceil(wait), 1))
      self.headers['retry-after-ms'] = str(max(math.ceil(wait * 1000), 1))


def duration(seconds: float) -> str:
  """Returns seconds as OpenAI writes them: 20ms, 1.5s, 6m0s."""
  millis = math.ceil(seconds * 1000)
  if millis < 1000:
    return f'{millis}ms'
  if millis < 60_000:
    return f'{millis / 1000:g}s'
  minutes, millis = divmod(millis, 60_000)
  return f'{minutes}m{millis / 1000:g}s'
