"""The arrays of a planned step, filled on the host."""

from collections.abc import Mapping

import numpy as np

from inference.engine import answer, steps
from inference.scheduling import page_tables, sequence_manager


def empty(
  shape: steps.Shape,
  *,
  chunk_tokens: int,
  table_width: int,
  num_sampled: int,
  padding_slot: int,
) -> steps.Inputs:
  """Returns inputs of padding only.

  Args:
    shape: of the step.
    chunk_tokens: tokens per chunk.
    table_width: L, pages of a sequence that fills the context.
    num_sampled: R, tokens to sample; at least one per decode and chunk.
    padding_slot: the slot that belongs to no sequence.
  """
  num_decodes, num_chunks = shape
  num_prompt = num_chunks * chunk_tokens

  def full(*size: int, value: int = 0) -> np.ndarray:
    return np.full(size, value, np.int32)

  return steps.Inputs(
    tokens_T=full(num_decodes + num_prompt),
    positions_T=full(num_decodes + num_prompt, value=-1),
    decode_table_DL=full(num_decodes, table_width),
    chunk_table_XL=full(num_chunks, table_width),
    rows_R=full(num_sampled),
    slots_R=full(num_sampled, value=padding_slot),
    forced_R=full(num_sampled, value=-1),
    targets_M=full(num_prompt, value=-1),
    prompt_logprobs_X=full(num_chunks, value=-1),
  )


def fill(
  inputs: steps.Inputs,
  step: sequence_manager.Step,
  *,
  chunk_tokens: int,
  answers: Mapping[page_tables.Sequence, answer.Live],
) -> None:
  """Writes a step into empty inputs of a shape that holds it.

  Args:
    inputs: of `empty`; changed.
    step: the planned step.
    chunk_tokens: tokens per chunk.
    answers: of every sequence of the step.
  """
  num_decodes = inputs.decode_table_DL.shape[0]
  for index, decode in enumerate(step.decodes):
    inputs.tokens_T[index] = -1 if decode.tokens is None else decode.tokens[0]
    inputs.positions_T[index] = decode.start
    inputs.decode_table_DL[index, : len(decode.pages)] = decode.pages
    inputs.rows_R[index] = index
    if decode.samples:
      inputs.slots_R[index] = decode.slot
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
    if chunk.samples:
      inputs.slots_R[place] = chunk.slot
    if scored := answers[chunk.sequence].scored_prompt():
      prompt, inputs.prompt_logprobs_X[index] = scored
      targets = prompt[chunk.start + 1 : chunk.start + chunk.length + 1]
      at = index * chunk_tokens
      inputs.targets_M[at : at + len(targets)] = targets
  for place, span in sampling_spans(step, num_decodes):
    live = answers[span.sequence]
    token = live.forced_token(span.start + span.length)
    if token is not None:
      inputs.forced_R[place] = token


def sampling_spans(
  step: sequence_manager.Step, num_decodes: int
) -> list[tuple[int, sequence_manager.Span]]:
  """Returns the spans that sample, each with its index in the outputs.

  Args:
    step: the planned step.
    num_decodes: D of the shape that it was computed in.
  """
  spans = placed_spans(step, num_decodes)
  return [(place, span) for place, span in spans if span.samples]


def placed_spans(
  step: sequence_manager.Step, num_decodes: int
) -> list[tuple[int, sequence_manager.Span]]:
  """Returns all spans, each with its index in the outputs."""
  return [*enumerate(step.decodes), *enumerate(step.chunks, num_decodes)]
