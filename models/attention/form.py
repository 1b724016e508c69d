"""The form of attention scores: window, soft-cap and scale.

Every implementation of attention takes a `Form`. Which fields each of them
accepts is in `models/attention/supports.py`.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from models import model_config


@dataclasses.dataclass(frozen=True)
class Form:
  """How scores are computed from queries and keys; static under jit."""

  window: int = 0  # keys that a query sees, its own included; 0: all before it
  softcap: float = 0.0  # scores become cap tanh(scores / cap); 0: no cap
  scale: float | None = None  # multiplies the scores; None: 1 / sqrt(C)

  def scale_of(self, channels: int) -> float:
    """Returns the multiplier of the scores for heads of `channels` channels."""
    return 1 / math.sqrt(channels) if self.scale is None else self.scale


def of_layer(config: model_config.ModelConfig, *, is_local: bool) -> Form:
  """Returns the form of a layer; a local layer has the model's window."""
  scale = config.query_scale or None
  if config.latent_width and scale is None:
    # Over a cache, heads are as wide as a latent, which is not their C.
    scale = config.head_width**-0.5
  return Form(
    window=config.window if is_local else 0,
    softcap=config.attention_softcap,
    scale=scale,
  )


def sees(slot: jax.Array, position: jax.Array, form: Form) -> jax.Array:
  """Returns whether the query at `position` sees the key in `slot`."""
  is_seen = slot <= position
  if form.window:
    is_seen &= slot > position - form.window
  return is_seen


def capped_scores(scores: jax.Array, form: Form) -> jax.Array:
  """Returns the float32 scores under the soft-cap (Gemma 2, section 2)."""
  if not form.softcap:
    return scores
  return form.softcap * jnp.tanh(scores / form.softcap)
