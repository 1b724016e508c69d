"""How rotary frequencies are stretched for texts longer than were trained on.

Plain numbers, computed once when a model is traced. Frequencies are those of
pairs of channels, 1 / base^(2i / width), divided by a divisor of each pair:

    linear    the factor, for all (arXiv:2306.15595)
    llama3    1 for short wavelengths, the factor for long ones (Llama 3.1,
              arXiv:2407.21783; as in its published code)
    yarn      1 for pairs that turn often within the trained length, the factor
              for those that never turn once (arXiv:2309.00071)
    dynamic   a base that grows with the length of the text (NTK-aware)
    longrope  two tables found by search, one for texts longer than the trained
              length (arXiv:2402.13753)

The last two depend on the length of the text. A pass without a cache knows it:
it is a row's largest position, and one. A pass with a cache must not depend on
what comes later, or in which pieces a text comes. There `dynamic` takes for the
length of a token its own position, and one, `longrope` the length that the
model is configured for (`ModelConfig.max_length`).
"""

import dataclasses
import math

import numpy as np

KINDS = ('none', 'linear', 'llama3', 'yarn', 'dynamic', 'longrope')


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class RopeScaling:
  """Which stretching; fields that a kind does not read stay 0 or empty."""

  kind: str = 'none'  # one of KINDS
  factor: float = 0.0  # by how much; not of longrope
  original_length: int = 0  # trained length in tokens; not of linear
  low_frequency: float = 0.0  # llama3: wavelengths above original / low stretch
  high_frequency: float = 0.0  # llama3: those below original / high do not
  beta_fast: float = 0.0  # yarn: pairs that turn more often do not stretch
  beta_slow: float = 0.0  # yarn: those that turn less often stretch wholly
  is_truncated: bool = True  # yarn: the bounds are whole pairs
  amplitude: float = 1.0  # of rotated queries and keys, each; yarn, longrope
  short_divisors: tuple[float, ...] = ()  # longrope, one per pair
  long_divisors: tuple[float, ...] = ()  # longrope, past the original length

  def validate(self, pairs: int) -> None:
    """Raises ValueError, naming the value, for what cannot be computed."""
    if self.kind not in KINDS:
      raise ValueError(
        f'model.rope_scaling.kind: got {self.kind!r}, expected one of'
        f' {", ".join(KINDS)}'
      )
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


def stretched(base: float, width: int, scaling: RopeScaling) -> np.ndarray:
  """Returns the frequency of each pair where it depends on no length.

  Of `dynamic` those of texts up to the original length, of `longrope` the
  short ones.
  """
  plain = frequencies(base, width)
  if scaling.kind == 'linear':
    return plain / np.float32(scaling.factor)
  if scaling.kind == 'llama3':
    return _llama3(plain, scaling)
  if scaling.kind == 'yarn':
    return _yarn(plain, base, width, scaling)
  if scaling.kind == 'longrope':
    return plain / np.asarray(scaling.short_divisors, np.float32)
  return plain


def _llama3(plain, scaling):
  original = scaling.original_length
  wavelengths = 2 * np.pi / plain
  share = (original / wavelengths - scaling.low_frequency) / (
    scaling.high_frequency - scaling.low_frequency
  )
  share = np.clip(share, 0.0, 1.0)  # 1: not stretched
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
  # The upper bound is one of channels, not pairs, in every implementation.
  low, high = max(low, 0), min(high, width - 1)
  if low == high:
    high += 0.001  # as others do, to divide by something
  pairs = np.arange(width // 2, dtype=np.float32)
  stretch = np.clip((pairs - low) / (high - low), 0.0, 1.0)
  both = plain / scaling.factor * stretch + plain * (1 - stretch)
  return both.astype(np.float32)
