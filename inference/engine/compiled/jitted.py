"""The steps as programs: the host's arrays of a step reach them as one array.

A program of decodes also samples. After a prefill another program does, since
the filters of the sampler take longer to compile than a layer of the model.
`programs` compiles these functions.
"""

import functools
from typing import Any

import jax

from inference.engine import adapter_table, inputs as inputs_lib, steps

put_adapter = jax.jit(adapter_table.put, donate_argnames=('table',))


@functools.partial(
  jax.jit,
  donate_argnames=('state',),
  static_argnames=('layout', 'model', 'vocab_size', 'most'),
)
def decode_steps(params, state, flat_I, *, layout, **static):
  """Returns the results of `steps.decode_steps`."""
  inputs = inputs_lib.split(flat_I, layout)
  return steps.decode_steps(params, state, inputs, **static)


@functools.partial(
  jax.jit,
  donate_argnames=('kv_cache',),
  static_argnames=('layout', 'model', 'vocab_size'),
)
def prefill(params, kv_cache, last_B, flat_I, *, layout, **static):
  """Returns the results of `prefill`, and the arguments of `sample`."""
  inputs = inputs_lib.split(flat_I, layout)
  results = steps.prefill(params, kv_cache, last_B, inputs, **static)
  return *results, sampled(inputs)


@functools.partial(
  jax.jit,
  donate_argnames=('kv_cache',),
  static_argnames=('layout', 'model', 'vocab_size'),
)
def forward(params, kv_cache, last_B, flat_I, *, layout, **static):
  """Returns the results of `decode_step`, and the arguments of `sample`."""
  inputs = inputs_lib.split(flat_I, layout)
  results = steps.decode_step(params, kv_cache, last_B, inputs, **static)
  return *results, sampled(inputs)


def sampled(inputs: steps.Inputs) -> tuple[Any, Any, Any]:
  """Returns slots, positions and forced tokens of the tokens to sample."""
  positions_R = inputs.positions_T[inputs.rows_R] + 1
  return inputs.slots_R, positions_R, inputs.forced_R


@functools.partial(jax.jit, donate_argnames=('slots',))
def sample(slots, logits_RV, *where):
  """Returns the results of `sample` as those of one decode step."""
  slots, *found = steps.sample(slots, logits_RV, *where)
  tokens_SR, logprobs = jax.tree.map(lambda leaf: leaf[None], found)
  return slots, steps.Outputs(tokens_SR, logprobs, None)
