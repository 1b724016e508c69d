"""A planned step as arrays, laid out for the device."""

from collections.abc import Callable, Hashable, Sequence

import numpy as np

from inference.engine import steps
from inference.scheduling import sequence_manager

# (id) -> (prompt, wanted): a sequence whose prompt is to be scored, with how
# many alternatives; None: not to be scored.
PromptOf = Callable[[Hashable], tuple[Sequence[int], int] | None]
# (id, position) -> the token that it takes there instead of a sampled one, if
# any.
ForcedOf = Callable[[Hashable, int], int | None]


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
  scored_prompt: PromptOf,
  forced_token: ForcedOf,
) -> None:
  """Writes a step's rows into empty inputs of a shape that holds them."""
  num_decodes = inputs.decode_table_DL.shape[0]
  for row, decode in enumerate(step.decodes):
    inputs.tokens_T[row] = -1 if decode.tokens is None else decode.tokens[0]
    inputs.positions_T[row] = decode.start
    inputs.decode_table_DL[row, : len(decode.pages)] = decode.pages
    inputs.rows_R[row] = row
    inputs.slots_R[row] = decode.slot if decode.samples else inputs.slots_R[row]
  for index, chunk in enumerate(step.chunks):
    at = num_decodes + index * chunk_tokens
    part = slice(at, at + chunk.length)
    inputs.tokens_T[part] = chunk.tokens
    inputs.positions_T[part] = np.arange(
      chunk.start, chunk.start + chunk.length
    )
    inputs.chunk_table_XL[index, : len(chunk.pages)] = chunk.pages
    row = num_decodes + index
    inputs.rows_R[row] = at + chunk.length - 1
    if chunk.samples:
      inputs.slots_R[row] = chunk.slot
    if scored := scored_prompt(chunk.id):
      prompt, inputs.prompt_logprobs_X[index] = scored
      targets = prompt[chunk.start + 1 : chunk.start + chunk.length + 1]
      at = index * chunk_tokens
      inputs.targets_M[at : at + len(targets)] = targets
  for row, each in sampling_rows(step, num_decodes):
    token = forced_token(each.id, each.start + each.length)
    if token is not None:
      inputs.forced_R[row] = token


def sampling_rows(
  step: sequence_manager.Step, num_decodes: int
) -> list[tuple[int, sequence_manager.Row]]:
  """Returns the rows that yield a token, each with its place in the outputs.

  Args:
    step: what was planned.
    num_decodes: D of the shape that it was computed in.
  """
  rows = [*enumerate(step.decodes), *enumerate(step.chunks, num_decodes)]
  return [(place, row) for place, row in rows if row.samples]
