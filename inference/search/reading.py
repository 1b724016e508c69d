"""Reads the reasoning and the answer of a sample, as the server reads them."""

from collections.abc import Sequence

from inference.search import samples as samples_lib
from text import tokenizer as tokenizer_lib
from text.replies import events, markers as markers_lib, parser


def reader(
  tokenizer: tokenizer_lib.Tokenizer,
  style: parser.Style,
  *,
  is_reasoning: bool = False,
) -> samples_lib.Read:
  """Returns the function that finds the parts of a sampled text.

  Calls of tools stay text: a search answers questions.

  Args:
    tokenizer: of the model.
    style: with the markers of its reasoning.
    is_reasoning: whether the prompt ends inside of reasoning.
  """
  markers = style.markers(tokenizer.special_tokens)

  def read(
    text: str, ids: Sequence[int], num_text_ids: int
  ) -> samples_lib.Reading:
    pieces = markers_lib.Pieces(tokenizer, markers)
    parsing = parser.Parser(style, markers, tools={}, is_reasoning=is_reasoning)
    reply = events.Reply()
    for piece in pieces.cut(text, ids, num_text_ids):
      for event in parsing.push(piece):
        reply.add(event)
    for event in parsing.finish('stop'):
      reply.add(event)
    if not reply.reasoning_tokens and not is_reasoning:
      return samples_lib.Reading(reply.text)
    first = reply.text_tokens[0] if reply.text_tokens else len(ids)
    return samples_lib.Reading(reply.text, reply.reasoning, first)

  return read
