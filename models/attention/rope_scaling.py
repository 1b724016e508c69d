"""Scaling of rotary frequencies for texts longer than the trained length.

The frequencies are plain numbers, computed once when a model is traced. Pair i
of channels has the frequency 1 / base^(2i / width), divided by a divisor:

    linear    the factor, for all pairs (arXiv:2306.15595)
    llama3    1 for short wavelengths, the factor for long ones (Llama 3.1,
              arXiv:2407.21783; as in its published code)
    yarn      1 for pairs that turn often within the trained length, the factor
              for pairs that do not turn once (arXiv:2309.00071)
    dynamic   no divisor: the base grows with the length of the text (NTK-aware)
    longrope  one of two tables found by search; the second is for models of
              texts longer than the trained length (arXiv:2402.13753)

Serving must not depend on later tokens, nor on the chunks in which a text
arrives, and training computes the function that is served:

- `longrope` takes the table of `ModelConfig.max_length`, for every text. The
  tables differ for short texts, too: other implementations change the table
  when a text grows past the trained length.
- `dynamic` uses the position of each token plus one in a pass with a cache. In
  a pass without a cache, it uses the length of the token's document, as other
  implementations do. The two differ only past the original length, and
  `training.execution` refuses longer rows.
"""

import dataclasses
import math

import numpy as np

from checks import expect

KINDS = ('none', 'linear', 'llama3', 'yarn', 'dynamic', 'longrope')


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class RopeScaling:
  """The kind of scaling; fields that a kind does not read stay 0 or empty."""

  kind: str = 'none'  # one of KINDS
  factor: float = 0.0  # of the stretching; not for longrope
  original_length: int = 0  # trained length in tokens; not for linear
  low_frequency: float = 0.0  # llama3: wavelengths above original / low: factor
  high_frequency: float = 0.0  # llama3: wavelengths below original / high: 1
  beta_fast: float = 0.0  # yarn: pairs with more turns have divisor 1
  beta_slow: float = 0.0  # yarn: pairs with fewer turns have the factor
  is_truncated: bool = True  # yarn: rounds the bounds to whole pairs
  amplitude: float = 1.0  # multiplies rotated queries and keys; yarn, longrope
  short_divisors: tuple[float, ...] = ()  # longrope, one per pair
  long_divisors: tuple[float, ...] = ()  # longrope, past the original length

  def validate(self, pairs: int) -> None:
    """Raises ValueError, naming the field, if the kind cannot be computed."""
    expect.one_of('model.rope_scaling.kind', self.kind, KINDS)
    for name in _READ[self.kind]:
      value = getattr(self, name)
      if not 0 < value < math.inf:
        raise ValueError(
          f'model.rope_scaling.{name}: got {value} with kind {self.kind},'
          ' expected a positive number'
        )
    if self.kind == 'llama3' and self.high_frequency <= self.low_frequency:
      raise ValueError(
        f'model.rope_scaling.high_frequency: got {self.high_frequency},'
        f' expected more than low_frequency = {self.low_frequency}'
      )
    for name in ('short_divisors', 'long_divisors'):
      num, expected = len(getattr(self, name)), pairs
      if self.kind != 'longrope':
        expected = 0
      if num != expected:
        raise ValueError(
          f'model.rope_scaling.{name}: got {num} numbers with kind {self.kind},'
          f' expected {expected}'
        )


_READ = {
  'none': (),
  'linear': ('factor',),
  'llama3': ('factor', 'original_length', 'low_frequency', 'high_frequency'),
  'yarn': ('factor', 'original_length', 'beta_fast', 'beta_slow', 'amplitude'),
  'dynamic': ('factor', 'original_length'),
  'longrope': ('original_length', 'amplitude'),
}


def frequencies(base: float, width: int) -> np.ndarray:
  """Returns the unstretched frequency of each pair, radians per token."""
  exponents = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
  return (1.0 / np.float32(base) ** exponents).astype(np.float32)


def stretched(
  base: float, width: int, scaling: RopeScaling, max_length: int = 0
) -> np.ndarray:
  """Returns the frequency of each pair, of `dynamic` up to the original length.

  Args:
    base: base of the wavelengths.
    width: channels that are rotated.
    scaling: scaling of the frequencies.
    max_length: `ModelConfig.max_length`; chooses the table of `longrope`.
  """
  plain = frequencies(base, width)
  if scaling.kind == 'linear':
    return plain / np.float32(scaling.factor)
  if scaling.kind == 'llama3':
    return _llama3(plain, scaling)
  if scaling.kind == 'yarn':
    return _yarn(plain, base, width, scaling)
  if scaling.kind == 'longrope':
    is_long = max_length > scaling.original_length
    divisors = scaling.long_divisors if is_long else scaling.short_divisors
    return plain / np.asarray(divisors, np.float32)
  return plain


def _llama3(plain, scaling):
  original = scaling.original_length
  wavelengths = 2 * np.pi / plain
  share = (original / wavelengths - scaling.low_frequency) / (
    scaling.high_frequency - scaling.low_frequency
  )
  share = np.clip(share, 0.0, 1.0)  # of the unscaled frequency
  both = (1 - share) * plain / scaling.factor + share * plain
  return both.astype(np.float32)


def _yarn(plain, base, width, scaling):
  def pair_that_turns(times):
    turns = scaling.original_length / (times * 2 * math.pi)
    return width * math.log(turns) / (2 * math.log(base))

  low = pair_that_turns(scaling.beta_fast)
  high = pair_that_turns(scaling.beta_slow)
  if scaling.is_truncated:
    low, high = math.floor(low), math.ceil(high)
  # In every implementation the upper bound counts channels, not pairs.
  low, high = max(low, 0), min(high, width - 1)
  if low == high:
    high += 0.001  # avoids a division by zero, as other implementations do
  pairs = np.arange(width // 2, dtype=np.float32)
  stretch = np.clip((pairs - low) / (high - low), 0.0, 1.0)
  both = plain / scaling.factor * stretch + plain * (1 - stretch)
  return both.astype(np.float32)
