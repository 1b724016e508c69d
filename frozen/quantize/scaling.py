"""Scales of inputs that are folded into the weights before them.

The input of a kernel is divided by a scale per channel, and the kernel's rows
are multiplied by it: the function is the same, and rounding costs less. The
division is part of the layer that makes the input: the scale of a norm, or `up`
of a gated MLP. So the model computes nothing more.

    awq          channels that are large on the text get finer steps; the power
                 of the scale is searched (arXiv:2306.00978, section 3.2)
    smoothquant  the largest activations and the largest weights are balanced
                 (arXiv:2211.10438, equation 4, with its alpha of 0.5)

The output of attention is not scaled: with grouped queries, several of its
channels are made by one column of `value`.

All experts of a mixture read the output of one norm, and so does the router,
which stays in floats: its rows are multiplied by the same scale. `experts.py`
multiplies the rows of the experts.
"""

from collections.abc import Iterable, Mapping
import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from frozen.quantize import activations
from models import model_config
from models.layers import mlp
from models.linear.stored import round as rounding

_POWERS = 20  # powers that AWQ tries, from 0 to 1, as in its code
_ALPHA = 0.5  # alpha of SmoothQuant
# All kernels that a layer may have, so that no reader of an input is missed.
_KERNELS = {
  *(f'attention/{name}/kernel' for name in ('query', 'key', 'value', 'out')),
  *(
    f'{owner}/{name}/kernel'
    for owner in ('mlp', 'moe/shared')
    for name in ('up', 'gate', 'down')
  ),
}
_ROUTER = 'moe/router/kernel'

Layer = Mapping[str, Any]  # params of a layer by path, 'mlp/up/kernel'
Moments = Mapping[str, activations.Moments]


class Reader(NamedTuple):
  """Kernels that read an input, with its moments over their own tokens."""

  kernels: tuple[Any, ...]  # float32 [I, O]
  second_II: Any
  share: float  # of all tokens


class Place(NamedTuple):
  """Kernels that read one input, and the part that makes the input."""

  maker: str  # the norm, or 'up' of an MLP
  kernels: tuple[str, ...]
  has_experts: bool = False  # whether experts and a router read it, too


class Experts(NamedTuple):
  """The experts of a layer, as far as the scale of their input needs them."""

  moments: activations.Moments  # over all tokens; without `second_II`
  readers: Iterable[Reader]


def places(
  config: model_config.ModelConfig, moments: Moments, has_experts: bool = False
) -> list[Place]:
  """Returns the places of a layer whose input can be scaled.

  Args:
    config: config of the model.
    moments: moments of the layer's kernels.
    has_experts: whether the layer is a mixture of experts.

  Raises:
    ValueError: there are kernels with other makers, as in latent attention.
  """
  if others := sorted(set(moments) - _KERNELS):
    raise ValueError(
      f'--method: got awq or smoothquant for {others[0]}, expected a layer'
      ' whose inputs are made by its two norms and its gated MLP alone; take'
      ' rtn or gptq'
    )
  found = []
  owner = 'moe/shared' if has_experts else 'mlp'
  down = f'{owner}/down/kernel'
  if config.norm_place != 'after':  # else the input is the residual stream
    for maker, start, output in (
      ('attention_norm', 'attention/', 'attention/out/kernel'),
      ('mlp_norm', f'{owner}/', down),
    ):
      kernels = [x for x in moments if x.startswith(start) and x != output]
      of_experts = has_experts and maker == 'mlp_norm'
      if kernels or of_experts:  # layers of attention alone have no MLP
        found.append(Place(maker, tuple(kernels), of_experts))
  if mlp.is_gated(config.mlp) and down in moments:
    found.append(Place(f'{owner}/up', (down,)))
  return found


def scaled(
  layer: Layer,
  moments: Moments,
  config: model_config.ModelConfig,
  *,
  method: str,
  scheme: str,
  experts: Experts | None = None,
) -> tuple[dict[str, Any], dict[str, activations.Moments], Any]:
  """Returns a layer of the same function, and the moments of its inputs.

  Args:
    layer: params of a layer by path; the kernels that are scaled come back in
      float32.
    moments: moments of the layer's kernels.
    config: config of the model.
    method: awq or smoothquant.
    scheme: scheme in which the kernels will be stored.
    experts: the experts of the layer; None: there are none.

  Returns:
    The layer, the moments, and the scale by which the rows of the experts are
    yet to be multiplied, and by which their input is divided; None: 1.
  """
  layer, moments = dict(layer), dict(moments)
  of_experts_I = None
  for place in places(config, moments, experts is not None):
    kernels = tuple(
      jnp.asarray(layer[path], jnp.float32) for path in place.kernels
    )
    readers, of_input = [], None
    if kernels:
      of_input = moments[place.kernels[0]]
      readers = [Reader(kernels, of_input.second_II, 1.0)]
    if place.has_experts:
      assert experts is not None
      readers = itertools.chain(readers, experts.readers)
      of_input = experts.moments
    assert of_input is not None, 'a place has readers'
    scale_I = scale_of(readers, of_input, method=method, scheme=scheme)
    scale_I = _divide(layer, place.maker, scale_I, config)
    for path, w_IO in zip(place.kernels, kernels, strict=True):
      layer[path] = w_IO * scale_I[:, None]
      moments[path] = moments[path].scaled(1 / scale_I)
    if place.has_experts:
      router_IE, of_experts_I = layer[_ROUTER], scale_I
      scaled_IE = router_IE.astype(jnp.float32) * scale_I[:, None]
      layer[_ROUTER] = scaled_IE.astype(router_IE.dtype)
  return layer, moments, of_experts_I


def scale_of(
  readers: Iterable[Reader],
  moments: activations.Moments,
  *,
  method: str,
  scheme: str,
) -> jax.Array:
  """Returns the scale of an input, [I], by a method.

  Args:
    readers: kernels that read the input; taken one after the other.
    moments: `mean_I` and `largest_I` of the input.
    method: awq or smoothquant.
    scheme: scheme in which the kernels will be stored.
  """
  if method == 'awq':
    return awq_scale(readers, moments.mean_I, scheme=scheme)
  return smoothquant_scale(readers, moments.largest_I)


def awq_scale(
  readers: Iterable[Reader], mean_I: jax.Array, *, scheme: str
) -> jax.Array:
  """Returns the scale of an input with the smallest error of the outputs."""
  scales_PI = _awq_scales(mean_I)
  errors_P = jnp.zeros(_POWERS)
  for reader in readers:
    errors_P += reader.share * _awq_errors(
      reader.kernels, reader.second_II, scales_PI, scheme=scheme
    )
  return scales_PI[jnp.argmin(errors_P)]


@jax.jit
def _awq_scales(mean_I):
  """Returns the scales that are tried, a row each."""
  # A channel that is always 0 would have a scale of 0.
  largest = jnp.max(mean_I)
  mean_I = jnp.maximum(mean_I, 1e-4 * largest)
  mean_I = jnp.where(largest > 0, mean_I, 1)
  powers_P = jnp.arange(_POWERS) / _POWERS
  scales_PI = mean_I[None] ** powers_P[:, None]
  middle_P = jnp.sqrt(jnp.max(scales_PI, axis=1) * jnp.min(scales_PI, axis=1))
  return scales_PI / middle_P[:, None]


@functools.partial(jax.jit, static_argnames=('scheme',))
def _awq_errors(kernels, second_II, scales_PI, *, scheme: str):
  """Returns the error of the outputs with each scale, [P]."""

  def error(scale_I):
    scale_I1 = scale_I[:, None]
    return sum(
      output_error(
        rounding.by_scheme(w_IO * scale_I1, scheme).whole(jnp.float32)
        / scale_I1
        - w_IO,
        second_II,
      )
      for w_IO in kernels
    )

  return jax.lax.map(error, scales_PI)


def smoothquant_scale(
  readers: Iterable[Reader], largest_I: jax.Array
) -> jax.Array:
  """Returns the scale of an input that evens out activations and weights."""
  least = jnp.float32(1e-5)  # as in the code of the paper
  weight_I = least
  for reader in readers:
    for w_IO in reader.kernels:
      weight_I = jnp.maximum(weight_I, jnp.max(jnp.abs(w_IO), axis=1))
  largest_I = jnp.maximum(largest_I, least)
  return jnp.maximum(largest_I**_ALPHA / weight_I ** (1 - _ALPHA), least)


def output_error(delta_IO: jax.Array, second_II: jax.Array) -> jax.Array:
  """Returns the mean square of x @ delta, summed over the outputs."""
  return jnp.sum(delta_IO * (second_II @ delta_IO))


def _divide(layer, maker: str, scale_I, config) -> jax.Array:
  """Divides the maker of an input, in place; returns the scale it really got.

  A norm keeps its dtype, so its divisor is rounded: the kernels are multiplied
  by the rounded divisor.
  """
  if maker.endswith('/up'):
    path = f'{maker}/kernel'
    layer[path] = jnp.asarray(layer[path], jnp.float32) / scale_I[None]
  else:
    path, start = f'{maker}/scale', float(config.norm_from_one)
    stored_I = layer[path]
    old_I = stored_I.astype(jnp.float32) + start
    layer[path] = (old_I / scale_I - start).astype(stored_I.dtype)
    new_I = layer[path].astype(jnp.float32) + start
    scale_I = jnp.where(new_I * old_I > 0, old_I / new_I, 1)
    # A channel whose scale was rounded to 0 stays as it was.
    layer[path] = jnp.where(new_I * old_I > 0, layer[path], stored_I)
  if (bias := layer.get(f'{maker}/bias')) is not None:
    layer[f'{maker}/bias'] = (bias / scale_I).astype(bias.dtype)
  return scale_I
