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
"""

from collections.abc import Mapping
import functools
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
  *(f'mlp/{name}/kernel' for name in ('up', 'gate', 'down')),
}

Layer = Mapping[str, Any]  # params of a layer by path, 'mlp/up/kernel'
Moments = Mapping[str, activations.Moments]


class Place(NamedTuple):
  """Kernels that read one input, and the part that makes the input."""

  maker: str  # the norm, or 'mlp/up'
  kernels: tuple[str, ...]


def places(config: model_config.ModelConfig, moments: Moments) -> list[Place]:
  """Returns the places of a layer whose input can be scaled.

  Args:
    config: config of the model.
    moments: moments of the layer's kernels.

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
  if config.norm_place != 'after':  # else the input is the residual stream
    for maker, owner, output in (
      ('attention_norm', 'attention/', 'attention/out/kernel'),
      ('mlp_norm', 'mlp/', 'mlp/down/kernel'),
    ):
      kernels = [x for x in moments if x.startswith(owner) and x != output]
      if kernels:  # layers of attention alone have no MLP
        found.append(Place(maker, tuple(kernels)))
  if mlp.is_gated(config.mlp):
    found.append(Place('mlp/up', ('mlp/down/kernel',)))
  return found


def scaled(
  layer: Layer,
  moments: Moments,
  config: model_config.ModelConfig,
  *,
  method: str,
  scheme: str,
) -> tuple[dict[str, Any], dict[str, activations.Moments]]:
  """Returns a layer of the same function, and the moments of its inputs.

  Args:
    layer: params of a layer by path; the kernels that are scaled come back in
      float32.
    moments: moments of the layer's kernels.
    config: config of the model.
    method: awq or smoothquant.
    scheme: scheme in which the kernels will be stored.
  """
  layer, moments = dict(layer), dict(moments)
  for place in places(config, moments):
    kernels = tuple(
      jnp.asarray(layer[path], jnp.float32) for path in place.kernels
    )
    of_input = moments[place.kernels[0]]
    if method == 'awq':
      scale_I = awq_scale(kernels, of_input, scheme=scheme)
    else:
      scale_I = smoothquant_scale(kernels, of_input)
    scale_I = _divide(layer, place.maker, scale_I, config)
    for path, w_IO in zip(place.kernels, kernels, strict=True):
      layer[path] = w_IO * scale_I[:, None]
      moments[path] = moments[path].scaled(1 / scale_I)
  return layer, moments


@functools.partial(jax.jit, static_argnames=('scheme',))
def awq_scale(
  kernels: tuple[jax.Array, ...], moments: activations.Moments, *, scheme: str
) -> jax.Array:
  """Returns the scale of an input with the smallest error of the outputs."""
  # A channel that is always 0 would have a scale of 0.
  largest = jnp.max(moments.mean_I)
  mean_I = jnp.maximum(moments.mean_I, 1e-4 * largest)
  mean_I = jnp.where(largest > 0, mean_I, 1)

  def scale(power):
    scale_I = mean_I**power
    return scale_I / jnp.sqrt(jnp.max(scale_I) * jnp.min(scale_I))

  def error(power):
    scale_I = scale(power)[:, None]
    return sum(
      output_error(
        rounding.by_scheme(w_IO * scale_I, scheme).whole(jnp.float32) / scale_I
        - w_IO,
        moments.second_II,
      )
      for w_IO in kernels
    )

  powers = jnp.arange(_POWERS) / _POWERS
  return scale(powers[jnp.argmin(jax.lax.map(error, powers))])


@jax.jit
def smoothquant_scale(
  kernels: tuple[jax.Array, ...], moments: activations.Moments
) -> jax.Array:
  """Returns the scale of an input that evens out activations and weights."""
  weight_I = functools.reduce(
    jnp.maximum, [jnp.max(jnp.abs(w_IO), axis=1) for w_IO in kernels]
  )
  least = jnp.float32(1e-5)  # as in the code of the paper
  largest_I = jnp.maximum(moments.largest_I, least)
  weight_I = jnp.maximum(weight_I, least)
  return jnp.maximum(largest_I**_ALPHA / weight_I ** (1 - _ALPHA), least)


def output_error(delta_IO: jax.Array, second_II: jax.Array) -> jax.Array:
  """Returns the mean square of x @ delta, summed over the outputs."""
  return jnp.sum(delta_IO * (second_II @ delta_IO))


def _divide(layer, maker: str, scale_I, config) -> jax.Array:
  """Divides the maker of an input, in place; returns the scale it really got.

  A norm keeps its dtype, so its divisor is rounded: the kernels are multiplied
  by the rounded divisor.
  """
  if maker == 'mlp/up':
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
