"""A dispatch that is on its way, and the tokens that grammars allow in it.

A step with a sequence that a grammar constrains is sent up to its logits. While
the device computes them, the host reads the tokens of the step before, and
finds the tokens that may come next. Then the sampling is sent. So such a step
waits for the host only if that takes longer than the step. All sequences of the
batch take part in every step, constrained or not. A dispatch has one step while
one of its sequences is constrained.

Tokens that a grammar forces are sampled, too. Its bytes may be forced, but the
tokens that spell them are seldom: a model has probabilities for all ways to
spell them, and taking one without sampling would change the distribution. The
metric `constraint_forced_tokens` counts masks of one token.
"""

from collections.abc import Mapping
import dataclasses
import time
from typing import NamedTuple

import jax
import numpy as np

from inference.constraints import grammars, thinking
from inference.engine import (
  device_state,
  inputs as inputs_lib,
  metrics as metrics_lib,
  steps,
)
from inference.engine.compiled import programs as programs_lib
from inference.requests import answer, requests
from inference.sampling import settings as settings_lib
from inference.scheduling import page_tables, spans

Lives = Mapping[page_tables.Sequence, answer.Live]


class Flight(NamedTuple):
  """A step that is dispatched, and whose outputs are not read yet."""

  step: spans.Step
  shape: steps.Shape
  outputs: steps.Outputs | None  # None: it is not sampled yet
  pending: programs_lib.Pending | None
  sent_at: float  # seconds of `time.perf_counter`
  width: int = 1  # tokens of the shape for each decode


def with_grammar(
  request: requests.Request,
  found: grammars.Grammars,
  programs: programs_lib.Programs,
) -> requests.Request:
  """Returns a request with the grammar of its constraint, or of its cap.

  The first one compiles the programs of such steps; from any thread.

  Raises:
    SettingError: no text is sampled, or the engine is to have no grammars.
    ConstraintError: the constraint cannot be kept.
  """
  constraint, cap = request.settings.constraint, request.thinking
  if (constraint is None and cap is None) or request.grammar is not None:
    return request
  kind = constraint.kind if constraint else 'a cap on reasoning'
  if not programs.has_grammars:
    raise settings_lib.SettingError(
      'constraint',
      kind,
      'none: this engine answers without grammars',
      'start it with --engine.constraints',
    )
  if request.target is not None or request.pooling:
    raise settings_lib.SettingError(
      'constraint', kind, 'none where no text is sampled'
    )
  grammar = found.compile(constraint) if constraint else None
  if cap:
    grammar = thinking.Capped(cap, grammar, found.tokenizer)
  programs.masks.compile()
  return dataclasses.replace(request, grammar=grammar)


def sent(
  step: spans.Step,
  programs: programs_lib.Programs,
  params: device_state.Params,
  state: device_state.State,
  *,
  lives: Lives,
  chunk_tokens: int,
) -> tuple[device_state.State, Flight]:
  """Sends a step; with a token within a grammar, up to its logits.

  Args:
    step: with at least one span.
    programs: of the engine.
    params: that they compute with.
    state: of the engine; donated.
    lives: of all sequences of the step.
    chunk_tokens: tokens per chunk.
  """
  now = time.perf_counter()
  if step.is_verified:
    return _verified(step, programs, params, state, lives)
  is_split = any(
    span.samples and lives[span.sequence].matcher for span in step.spans
  )
  shape = programs.shape_for(
    len(step.decodes), len(step.chunks), is_split=is_split
  )
  flat_I, inputs = programs.empty_inputs(shape, is_split=is_split)
  inputs_lib.fill(inputs, step, chunk_tokens=chunk_tokens, answers=lives)
  if is_split:
    state, pending = programs.forward(shape, params, state, flat_I)
    return state, Flight(step, shape, None, pending, now)
  state, outputs = programs.step(shape, params, state, flat_I)
  return state, Flight(step, shape, outputs, None, now)


def _verified(
  step: spans.Step,
  programs: programs_lib.Programs,
  params: device_state.Params,
  state: device_state.State,
  lives: Lives,
) -> tuple[device_state.State, Flight]:
  """Sends a step that verifies drafts."""
  now = time.perf_counter()
  longest = max(span.length for span in step.decodes)
  shape = programs.verified_for(len(step.decodes), longest)
  assert shape is not None  # drafts are as long as a shape allows
  flat_I, inputs = programs.empty_verified(shape)
  inputs_lib.fill_verified(inputs, step, width=shape.width, answers=lives)
  state, outputs = programs.verify(shape, params, state, flat_I)
  rows = steps.Shape(shape.num_spans, 0)
  return state, Flight(step, rows, outputs, None, now, shape.width)


def seat(
  live: answer.Live,
  programs: programs_lib.Programs,
  state: device_state.State,
) -> device_state.State:
  """Writes the settings of a sequence to its slot. Donates `state`."""
  sequence = live.sequence
  assert sequence.slot is not None
  state = programs.seat(state, sequence.slot, live.sampler_row())
  if live.has_penalties:
    state = programs.recount(
      state, sequence.slot, sequence.tokens, sequence.num_prompt
    )
  return state


def read(flight: Flight, lives: Lives) -> tuple[steps.Outputs, float]:
  """Returns what answers want of a dispatch, and the seconds waited for it."""
  assert flight.outputs is not None
  start = time.perf_counter()
  asking = [lives.get(span.sequence) for span in flight.step.spans]
  outputs = jax.device_get(answer.wanted(asking, flight.outputs))
  return outputs, time.perf_counter() - start


def sampled(
  flight: Flight,
  programs: programs_lib.Programs,
  state: device_state.State,
  lives: Lives,
  metrics: metrics_lib.Metrics,
) -> tuple[device_state.State, Flight]:
  """Sends the sampling of a step, once the tokens before it are known."""
  pending = flight.pending
  assert pending is not None
  bits_RW = programs.all_allowed(pending.size)
  _allow(flight, lives, bits_RW, metrics)
  state, outputs = programs.sample(state, pending, bits_RW)
  return state, flight._replace(outputs=outputs, pending=None)


def _allow(
  flight: Flight,
  lives: Lives,
  bits_RW: np.ndarray,
  metrics: metrics_lib.Metrics,
) -> None:
  """Clears the bits of tokens that grammars do not allow, uint32 [R, V / 32].

  Sequences that have ended, or have no grammar, keep all of theirs.
  """
  for place, span in inputs_lib.placed_spans(
    flight.step, flight.shape.num_decodes
  ):
    live = lives.get(span.sequence)
    if not span.samples or live is None or live.matcher is None:
      continue
    start = time.perf_counter()
    live.matcher.fill(bits_RW[place])
    metrics.mask_seconds.observe(time.perf_counter() - start)
    metrics.constrained_rows.inc()
    if int(np.bitwise_count(bits_RW[place]).sum()) == 1:
      metrics.forced_tokens.inc()
