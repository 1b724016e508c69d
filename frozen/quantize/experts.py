"""The experts of a layer in fewer bits, each calibrated on its own tokens.

An expert sees the tokens that were routed to it alone, so its statistics are
made of these. They are made of one expert at a time, since the second moments
of all of them would be larger than the layer.

Methods that calibrate need tokens. An expert with fewer than `LEAST_TOKENS` per
input of a kernel is rounded to nearest there, and the report counts such
experts. AWQ and SmoothQuant scale the common input of all experts by all
tokens (`scaling.py`), and the input of `down` by the tokens of the expert.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from frozen.quantize import activations, gptq, scaling
from models.linear.stored import kernel as kernel_lib, round as rounding

# Tokens per input of a kernel that an expert needs. The error of GPTQ on fresh
# tokens, over that of rounding to nearest, for random kernels of 128 and 512
# inputs in int4: if the spectrum of the inputs decays, 0.87 to 0.94 with 1/4
# and 0.60 to 0.63 with 1; if it is flat, 1.5 with both and 1.1 with 2. Spectra
# of activations decay. So fewer tokens gain little, and may lose much.
LEAST_TOKENS = 0.25
_PATH = 'moe/expert_{}/kernel'
_SCALED = ('awq', 'smoothquant')


class Quantised(NamedTuple):
  """The kernels of all experts, and their errors, by path."""

  kernels: dict[str, kernel_lib.Kernel]
  errors: dict[str, dict[str, float]]


class _Expert(NamedTuple):
  """An expert in floats, and its own tokens."""

  kernels: Mapping[str, Any]  # float32, by 'up', 'gate' and 'down'
  x_NI: Any  # rows of zeros at the end make the number a power of two
  num_tokens: int


def inputs(layer: Mapping[str, Any], routed: activations.Routed) -> Any:
  """Returns the common input of all experts, for `scaling.scaled`."""
  size_ND = np.abs(routed.x_ND)
  moments = activations.Moments(
    None, jnp.asarray(size_ND.mean(0)), jnp.asarray(size_ND.max(0))
  )
  return scaling.Experts(moments, _readers(layer, routed))


def _readers(layer, routed) -> Iterator[scaling.Reader]:
  for expert in _experts(layer, routed, None):
    kernels = tuple(
      expert.kernels[name] for name in ('up', 'gate') if name in expert.kernels
    )
    moments = _moments(expert.x_NI, expert.num_tokens)
    share = expert.num_tokens / len(routed.x_ND)
    yield scaling.Reader(kernels, moments.second_II, share)


def quantise(
  layer: Mapping[str, Any],
  routed: activations.Routed,
  scale_I: Any,
  *,
  scheme: str,
  method: str,
) -> Quantised:
  """Returns the kernels of the experts of a layer.

  Args:
    layer: params of the layer by path, with the kernels of experts in floats.
    routed: the input of the experts.
    scale_I: multiplies rows of `up` and `gate`, and divides their input; None:
      1.
    scheme: one of `models.linear.stored.round.SCHEMES`.
    method: one of `quantizing.METHODS`.

  Raises:
    ValueError: a kernel cannot be stored in the scheme; the error begins with
      its path.
  """
  found: dict[str, list[_Rounded]] = {}
  tokens = []
  for expert in _experts(layer, routed, scale_I):
    tokens.append(expert.num_tokens)
    for name, rounded in _rounded(expert, scheme, method).items():
      found.setdefault(_PATH.format(name), []).append(rounded)
  return Quantised(
    {
      path: jax.tree.map(lambda *x: jnp.stack(x), *(r.kernel for r in each))
      for path, each in found.items()
    },
    {path: _errors(each, tokens) for path, each in found.items()},
  )


def _experts(layer, routed, scale_I) -> Iterator[_Expert]:
  """Yields the experts, one after the other."""
  names = [n for n in ('up', 'gate', 'down') if _PATH.format(n) in layer]
  num_experts = layer[_PATH.format('down')].shape[0]
  for e in range(num_experts):
    kernels = {
      name: jnp.asarray(layer[_PATH.format(name)][e], jnp.float32)
      for name in names
    }
    x_NI = routed.x_ND[(routed.ids_NA == e).any(axis=1)]
    num_tokens = len(x_NI)
    if scale_I is not None:
      x_NI = x_NI / np.asarray(scale_I)
      for name in ('up', 'gate'):
        if name in kernels:
          kernels[name] *= scale_I[:, None]
    # Powers of two: a program is compiled for each of few sizes.
    spare = (1 << max(num_tokens - 1, 0).bit_length()) - num_tokens
    x_NI = jnp.asarray(np.pad(x_NI, ((0, spare), (0, 0))), jnp.float32)
    yield _Expert(kernels, x_NI, num_tokens)


class _Rounded(NamedTuple):
  """A kernel of an expert in fewer bits."""

  kernel: kernel_lib.Kernel
  # Sums of squares: of the weights' errors, of the weights, of the outputs'
  # errors and of the outputs, over the tokens of the expert.
  sums: Mapping[str, float]
  is_fallback: bool  # rounded to nearest, by a method that calibrates


def _rounded(expert: _Expert, scheme: str, method: str) -> dict[str, _Rounded]:
  """Returns the kernels of an expert by name."""
  kernels, num_tokens = dict(expert.kernels), expert.num_tokens
  hidden_NF = _hidden(kernels.get('gate'), kernels['up'], expert.x_NI)
  moments = {'down': _moments(hidden_NF, num_tokens)}
  moments |= dict.fromkeys(
    kernels.keys() - {'down'}, _moments(expert.x_NI, num_tokens)
  )

  def has_few(name: str) -> bool:
    return num_tokens < LEAST_TOKENS * kernels[name].shape[0]

  if method in _SCALED and 'gate' in kernels and not has_few('down'):
    reader = scaling.Reader((kernels['down'],), moments['down'].second_II, 1.0)
    scale_F = scaling.scale_of(
      [reader], moments['down'], method=method, scheme=scheme
    )
    kernels['up'] /= scale_F[None]
    kernels['down'] *= scale_F[:, None]
    moments['down'] = moments['down'].scaled(1 / scale_F)
  found = {}
  for name, w_IO in kernels.items():
    is_calibrated = method == 'gptq' or (method in _SCALED and name == 'down')
    is_fallback = is_calibrated and has_few(name)
    try:
      if method == 'gptq' and not is_fallback:
        kernel = gptq.quantise(w_IO, moments[name].second_II, scheme)
      else:
        kernel = rounding.by_scheme(w_IO, scheme)
    except ValueError as error:
      raise ValueError(f'{_PATH.format(name)}: {error}') from None
    sums = _sums(kernel, w_IO, moments[name].second_II, num_tokens)
    sums = {key: float(value) for key, value in sums.items()}
    found[name] = _Rounded(kernel, sums, is_fallback)
  return found


@jax.jit
def _hidden(gate_IF, up_IF, x_NI):
  """Returns the input of `down`; 0 for rows of zeros."""
  up_NF = x_NI @ up_IF
  if gate_IF is None:
    return nn.gelu(up_NF, approximate=True)
  return nn.silu(x_NI @ gate_IF) * up_NF


@jax.jit
def _moments(x_NI, num_tokens) -> activations.Moments:
  """Returns moments over the tokens; rows of zeros are added for none."""
  second_II = jnp.matmul(x_NI.T, x_NI, precision=jax.lax.Precision.HIGHEST)
  num_tokens = jnp.maximum(num_tokens, 1)
  size_NI = jnp.abs(x_NI)
  return activations.Moments(
    second_II / num_tokens, size_NI.sum(0) / num_tokens, size_NI.max(0)
  )


@jax.jit
def _sums(kernel, w_IO, second_II, num_tokens):
  delta_IO = kernel.whole(jnp.float32) - w_IO
  return {
    'weight_error': jnp.sum(delta_IO**2),
    'weight': jnp.sum(w_IO**2),
    'output_error': num_tokens * scaling.output_error(delta_IO, second_II),
    'output': num_tokens * scaling.output_error(w_IO, second_II),
  }


def _errors(each: list[_Rounded], tokens: list[int]) -> dict[str, float]:
  """Returns RMS errors over all experts, the largest, and their counts."""

  def total(key: str) -> float:
    return sum(rounded.sums[key] for rounded in each)

  def relative(error: float, whole: float) -> float:
    return float(np.sqrt(max(error, 0) / (whole if whole > 0 else 1)))

  return {
    'weight_error': relative(total('weight_error'), total('weight')),
    'output_error': relative(total('output_error'), total('output')),
    'largest_output_error': max(
      relative(r.sums['output_error'], r.sums['output']) for r in each
    ),
    'experts': len(each),
    'rounded_experts': sum(rounded.is_fallback for rounded in each),
    'fewest_tokens': min(tokens),
  }
