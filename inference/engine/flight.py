"""A dispatch that is on its way, and the tokens that grammars allow in it.

A step with a sequence that a grammar constrains is sent up to its logits. While
the device computes them, the host reads the tokens of the step before, and
finds the tokens that may come next, on several cores if there are many. Then
the sampling is sent. So such a step waits for the host only if that takes
longer than the step. All sequences of the batch take part in every step,
constrained or not. A dispatch has one step while one of its sequences is
constrained, or verifies drafts: then the host finds the tokens after each one
of a draft, with a copy of the grammar's state.

Tokens that a grammar forces are sampled, too. Its bytes may be forced, but the
tokens that spell them are seldom: a model has probabilities for all ways to
spell them, and taking one without sampling would change the distribution. The
metric `constraint_forced_tokens` counts masks of one token.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import time
from typing import NamedTuple

import jax
import numpy as np

from inference.constraints import grammars, side_by_side, thinking
from inference.engine import (
  device_state,
  inputs as inputs_lib,
  metrics as metrics_lib,
  steps,
)
from inference.engine.compiled import (
  pending as pending_lib,
  programs as programs_lib,
)
from inference.requests import answer, requests
from inference.sampling import settings as settings_lib
from inference.scheduling import page_tables, spans

Lives = Mapping[page_tables.Sequence, answer.Live]
# Words of 32 bits. A mask of a smaller vocabulary takes some microseconds, less
# than handing it to another thread.
_LARGE_WORDS = 256


class Flight(NamedTuple):
  """A step that is dispatched, and whose outputs are not read yet."""

  step: spans.Step
  shape: steps.Shape
  outputs: steps.Outputs | None  # None: it is not sampled yet
  pending: pending_lib.Pending | pending_lib.Drafted | pending_lib.Beside | None
  sent_at: float  # seconds of `time.perf_counter`
  width: int = 1  # tokens of the shape for each decode
  # Of a step with drafts beside chunks: the shape of its program. `shape` is
  # that of its outputs.
  beside: steps.Shape | None = None

  def num_rows(self, chunk_tokens: int) -> int:
    """Returns the tokens in the shape of its program, padding included."""
    num_decodes, num_chunks = self.beside or self.shape
    width = 1 if self.beside else self.width
    return num_decodes * width + num_chunks * chunk_tokens


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
  if step.is_verified and step.chunks:
    return _beside(
      step, programs, params, state, lives=lives, chunk_tokens=chunk_tokens
    )
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
  state, pending = programs.verify(shape, params, state, flat_I)
  rows = steps.Shape(shape.num_spans, 0)
  flight = Flight(step, rows, None, pending, now, shape.width)
  if any(lives[span.sequence].matcher for span in step.decodes):
    return state, flight
  state, outputs = programs.accept(state, pending)
  return state, flight._replace(outputs=outputs, pending=None)


def _beside(
  step: spans.Step,
  programs: programs_lib.Programs,
  params: device_state.Params,
  state: device_state.State,
  *,
  lives: Lives,
  chunk_tokens: int,
) -> tuple[device_state.State, Flight]:
  """Sends a step that verifies drafts beside chunks."""
  now = time.perf_counter()
  num_rows = sum(span.length for span in step.decodes)
  shape = next(  # drafts are as long as a shape allows
    shape
    for shape in programs.beside_shapes(len(step.decodes), len(step.chunks))
    if shape.num_decodes >= num_rows
  )
  flat_I, inputs = programs.empty_inputs(shape)
  inputs_lib.fill(inputs, step, chunk_tokens=chunk_tokens, answers=lives)
  key = programs.keys_beside[shape]
  spans_2XW = inputs_lib.drafted_rows(step, key, shape.num_decodes)
  state, found = programs.forward(shape, params, state, flat_I)
  pending = pending_lib.Beside(key, found, spans_2XW)
  outputs = steps.Shape(key.num_decodes, shape.num_chunks)
  flight = Flight(step, outputs, None, pending, now, key.width, shape)
  if any(span.samples and lives[span.sequence].matcher for span in step.spans):
    return state, flight
  state, sampled = programs.accept_beside(state, pending)
  return state, flight._replace(outputs=sampled, pending=None)


def seat(
  seated: Sequence[answer.Live],
  programs: programs_lib.Programs,
  state: device_state.State,
) -> device_state.State:
  """Writes the settings of sequences to their slots. Donates `state`."""
  rows, counted = [], []
  for live in seated:
    sequence = live.sequence
    assert sequence.slot is not None
    rows.append((sequence.slot, live.sampler_row()))
    if live.has_penalties:
      counted.append((sequence.slot, sequence))
  state = programs.seat(state, rows)
  for slot, sequence in counted:
    state = programs.recount(state, slot, sequence.tokens, sequence.num_prompt)
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
  if isinstance(pending, pending_lib.Beside):
    rows_XW, _ = pending.spans_2XW
    bits_XWW = programs.all_allowed(*rows_XW.shape)
    _allow_drafts(flight, rows_XW, lives, bits_XWW, metrics)
    state, outputs = programs.accept_beside(state, pending, bits_XWW)
    return state, flight._replace(outputs=outputs, pending=None)
  if isinstance(pending, pending_lib.Drafted):
    shape = pending.shape
    bits_XRW = programs.all_allowed(shape.num_spans, shape.width)
    # A copy: the device may still read the other one.
    pending = pending._replace(flat_I=pending.flat_I.copy())
    positions_T = programs.inputs_of(pending).positions_T
    positions_XR = positions_T.reshape(bits_XRW.shape[:2])
    _allow_drafts(flight, positions_XR, lives, bits_XRW, metrics)
    state, outputs = programs.accept(state, pending, bits_XRW)
    return state, flight._replace(outputs=outputs, pending=None)
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
  tasks = []
  for place, span in inputs_lib.placed_spans(
    flight.step, flight.shape.num_decodes
  ):
    live = lives.get(span.sequence)
    if not span.samples or live is None or live.matcher is None:
      continue
    tasks.append(
      functools.partial(_fill, live.matcher, bits_RW[place], metrics)
    )
  _run(tasks, bits_RW)


def _allow_drafts(
  flight: Flight,
  positions_XR: np.ndarray,
  lives: Lives,
  bits_XRW: np.ndarray,
  metrics: metrics_lib.Metrics,
) -> None:
  """Clears the bits of tokens that grammars do not allow after each token.

  The tokens of a draft count as sampled, which they are where it is right. A
  span ends for now where no masks are known: its next positions become -1.

  Args:
    flight: that verifies drafts.
    positions_XR: positions or rows of each span, -1 behind its end; changed.
    lives: of all sequences of the step.
    bits_XRW: changed.
    metrics: of the engine.
  """
  tasks = []
  placed = inputs_lib.placed_spans(flight.step, flight.shape.num_decodes)
  for place, span in placed:
    live = lives.get(span.sequence)
    if not span.samples or live is None or live.matcher is None:
      continue
    if place >= flight.shape.num_decodes:  # a chunk: it has one token
      bits_W = bits_XRW[place, 0]
      tasks.append(functools.partial(_fill, live.matcher, bits_W, metrics))
      continue
    bits_RW, positions_R = bits_XRW[place], positions_XR[place]
    tasks.append(
      functools.partial(_allow_draft, span, live, bits_RW, positions_R, metrics)
    )
  _run(tasks, bits_XRW)


def _allow_draft(
  span: spans.Span,
  live: answer.Live,
  bits_RW: np.ndarray,
  positions_R: np.ndarray,
  metrics: metrics_lib.Metrics,
) -> None:
  """Clears the bits of a draft and ends its positions, as `_allow_drafts`."""
  assert span.tokens is not None
  assert live.matcher is not None
  _fill(live.matcher, bits_RW[0], metrics)
  ahead = None if live.is_stuck else live.matcher.ahead()
  for index, token in enumerate(span.tokens[1:], 1):
    if not bits_RW[index - 1, token >> 5] >> (token & 31) & 1:
      break  # another token is sampled there
    if ahead is not None:
      ahead.push(token)
      _fill(ahead, bits_RW[index], metrics)
    if ahead is None or ahead.failure:
      # The grammar is asked again when this token is no guess any more.
      positions_R[index:] = -1
      break


def _run(tasks: list[Callable[[], None]], bits: np.ndarray) -> None:
  """Runs the tasks of a batch; those of large vocabularies side by side."""
  is_large = bits.shape[-1] >= _LARGE_WORDS
  side_by_side.run(tasks, None if is_large else 1)


def _fill(
  matcher: grammars.Matcher | thinking.Matcher,
  bits_W: np.ndarray,
  metrics: metrics_lib.Metrics,
) -> None:
  """Clears the bits of the tokens that may not come next."""
  start = time.perf_counter()
  matcher.fill(bits_W)
  metrics.mask_seconds.observe(time.perf_counter() - start)
  metrics.constrained_rows.inc()
  # Most masks have several words: those cost no count of bits.
  if np.count_nonzero(bits_W) == 1 and int(bits_W.max()).bit_count() == 1:
    metrics.forced_tokens.inc()
