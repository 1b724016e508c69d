"""The arrays of a planned step, filled on the host."""

from collections.abc import Mapping
import math
from typing import Any, NamedTuple

import numpy as np

from inference.engine import steps
from inference.engine.compiled import keys as keys_lib
from inference.requests import answer
from inference.scheduling import page_tables, spans


class Layout(NamedTuple):
  """The sizes of the arrays of a step; static where a program is traced."""

  num_decodes: int  # D
  num_chunks: int  # X
  chunk_tokens: int
  table_width: int  # L, pages of a sequence that fills the context
  num_sampled: int  # R, tokens to sample; at least one per decode and chunk
  has_adapters: bool = False

  def shapes(self) -> steps.Inputs:
    """Returns the shape of each array."""
    num_prompt = self.num_chunks * self.chunk_tokens
    num_tokens = self.num_decodes + num_prompt
    shapes = steps.Inputs(
      tokens_T=(num_tokens,),
      positions_T=(num_tokens,),
      lengths_D=(self.num_decodes,),
      decode_table_DL=(self.num_decodes, self.table_width),
      chunk_table_XL=(self.num_chunks, self.table_width),
      rows_R=(self.num_sampled,),
      slots_R=(self.num_sampled,),
      forced_R=(self.num_sampled,),
      targets_M=(num_prompt,),
      prompt_logprobs_X=(self.num_chunks,),
    )
    if self.has_adapters:
      return steps.AdaptedInputs(*shapes, (self.num_decodes + self.num_chunks,))
    return shapes

  @property
  def size(self) -> int:
    """Numbers in all arrays."""
    return sum(math.prod(shape) for shape in self.shapes())


def split(flat_I: Any, layout: Layout) -> steps.Inputs:
  """Returns the arrays of a step, which lie in one array, one after another.

  One array reaches the device in one transfer. NumPy arrays are views.
  """
  arrays, start, shapes = [], 0, layout.shapes()
  for shape in shapes:
    stop = start + math.prod(shape)
    arrays.append(flat_I[start:stop].reshape(shape))
    start = stop
  return type(shapes)(*arrays)


def empty(
  layout: Layout, *, padding_slot: int
) -> tuple[np.ndarray, steps.Inputs]:
  """Returns inputs of padding only: one array, and the views of its parts.

  Args:
    layout: of the step.
    padding_slot: the slot that belongs to no sequence.
  """
  flat_I = np.zeros((layout.size,), np.int32)
  inputs = split(flat_I, layout)
  inputs.slots_R[:] = padding_slot
  for absent in (
    inputs.positions_T,
    inputs.forced_R,
    inputs.targets_M,
    inputs.prompt_logprobs_X,
  ):
    absent[:] = -1
  return flat_I, inputs


def fill(
  inputs: steps.Inputs,
  step: spans.Step,
  *,
  chunk_tokens: int,
  answers: Mapping[page_tables.Sequence, answer.Live],
) -> None:
  """Writes a step into empty inputs of a shape that holds it.

  Each token of a draft beside chunks has a row of its own, as a decode has.

  Args:
    inputs: of `empty`; changed.
    step: the planned step.
    chunk_tokens: tokens per chunk.
    answers: of every sequence of the step.
  """
  num_decodes = inputs.decode_table_DL.shape[0]
  adapters_E = getattr(inputs, 'adapters_E', None)  # of `AdaptedInputs` only
  num_rows = 0
  for decode in step.decodes:
    live = answers[decode.sequence]
    token = live.forced_token(decode.start + 1)
    if token is not None:
      inputs.forced_R[num_rows] = token
    for position, token in enumerate(decode.tokens or (-1,), decode.start):
      inputs.tokens_T[num_rows] = token
      inputs.positions_T[num_rows] = position
      inputs.lengths_D[num_rows] = decode.length
      inputs.decode_table_DL[num_rows, : len(decode.pages)] = decode.pages
      inputs.rows_R[num_rows] = num_rows
      inputs.slots_R[num_rows] = decode.slot
      if adapters_E is not None:
        adapters_E[num_rows] = live.adapter.slot
      num_rows += 1
  for index, chunk in enumerate(step.chunks):
    at = num_decodes + index * chunk_tokens
    part = slice(at, at + chunk.length)
    inputs.tokens_T[part] = chunk.tokens
    inputs.positions_T[part] = np.arange(
      chunk.start, chunk.start + chunk.length
    )
    inputs.chunk_table_XL[index, : len(chunk.pages)] = chunk.pages
    place = num_decodes + index
    inputs.rows_R[place] = at + chunk.length - 1
    live = answers[chunk.sequence]
    if chunk.samples:
      inputs.slots_R[place] = chunk.slot
      token = live.forced_token(chunk.start + chunk.length)
      if token is not None:
        inputs.forced_R[place] = token
    if scored := live.scored_prompt():
      prompt, inputs.prompt_logprobs_X[index] = scored
      targets = prompt[chunk.start + 1 : chunk.start + chunk.length + 1]
      at = index * chunk_tokens
      inputs.targets_M[at : at + len(targets)] = targets
    if adapters_E is not None:
      adapters_E[place] = live.adapter.slot


def drafted_rows(
  step: spans.Step, key: keys_lib.Beside, num_decodes: int
) -> np.ndarray:
  """Returns the rows and tokens of a step with drafts beside chunks.

  Args:
    step: as `fill` has written it.
    key: of the program that samples.
    num_decodes: D of the shape of the step.

  Returns:
    `spans_2XW` of `verification.accept_beside`: decodes, then chunks.
  """
  sizes = key.num_decodes + key.num_chunks, key.width
  spans_2XW = np.full((2, *sizes), -1, np.int32)
  row = 0
  for place, decode in enumerate(step.decodes):
    spans_2XW[0, place, : decode.length] = np.arange(row, row + decode.length)
    assert decode.tokens is not None
    spans_2XW[1, place, : decode.length] = decode.tokens
    row += decode.length
  for index in range(len(step.chunks)):
    spans_2XW[0, key.num_decodes + index, 0] = num_decodes + index
  return spans_2XW


def fill_verified(
  inputs: steps.Inputs,
  step: spans.Step,
  *,
  width: int,
  answers: Mapping[page_tables.Sequence, answer.Live],
) -> None:
  """Writes a step that verifies drafts into empty inputs that hold it.

  Each decode, with its draft, lies where a chunk of another step would.

  Args:
    inputs: of `empty`, without decodes; changed.
    step: the planned step.
    width: R, tokens per chunk.
    answers: of every sequence of the step.
  """
  adapters_E = getattr(inputs, 'adapters_E', None)  # of `AdaptedInputs` only
  for place, span in enumerate(step.decodes):
    part = slice(place * width, place * width + span.length)
    inputs.tokens_T[part] = span.tokens
    inputs.positions_T[part] = np.arange(span.start, span.start + span.length)
    inputs.chunk_table_XL[place, : len(span.pages)] = span.pages
    inputs.slots_R[place] = span.slot
    if adapters_E is not None:
      adapters_E[place] = answers[span.sequence].adapter.slot
    token = answers[span.sequence].forced_token(span.start + 1)
    if token is not None:
      inputs.forced_R[place] = token


def placed_spans(
  step: spans.Step, num_decodes: int
) -> list[tuple[int, spans.Span]]:
  """Returns all spans, each with its index in the outputs.

  Args:
    step: the planned step.
    num_decodes: the outputs that are of decodes.
  """
  return [*enumerate(step.decodes), *enumerate(step.chunks, num_decodes)]
