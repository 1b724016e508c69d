"""The work of the device in one step: spans of tokens, and pages to copy."""

from collections.abc import Sequence
import dataclasses

from inference.scheduling import limits as limits_lib, page_tables


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Span:
  """Consecutive tokens of one sequence that a step computes."""

  sequence: page_tables.Sequence
  slot: int  # of the sequence in this step; it may have another one later
  start: int  # position of the first token
  # Of a decode: its successive decode steps, or 1 and the length of its draft.
  length: int
  # Token ids; of a decode: the first token, and the tokens of its draft. None:
  # the token is in flight; it is the token sampled last in this slot. A new
  # owner of a slot never reads the token of the owner before, since its first
  # tokens are known.
  tokens: tuple[int, ...] | None
  pages: tuple[int, ...]  # page table up to position start + length
  samples: bool  # whether a token is sampled after the last position


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
  """The work of the device in one step.

  The copies come first, and all sources are read before any page is written: a
  source may belong to another sequence of the same step. Spans write only to
  pages of their own sequence.
  """

  copies: tuple[tuple[int, int], ...]  # pages (source, destination)
  # In ascending order of context. One token each, or several if there are no
  # chunks: then each token is sampled before the next one is computed.
  decodes: tuple[Span, ...]
  chunks: tuple[Span, ...]  # at most `chunk_tokens` tokens each
  # Sequences that got a slot in this step; each has a span.
  seated: tuple[page_tables.Sequence, ...]
  preempted: tuple[page_tables.Sequence, ...]  # lost their slot before it
  # Whether the decodes carry drafts: all their tokens are known, and a token is
  # sampled after each of them as long as the draft is right.
  is_verified: bool = False

  @property
  def spans(self) -> tuple[Span, ...]:
    """Decodes, then chunks."""
    return (*self.decodes, *self.chunks)


def decode(
  sequence: page_tables.Sequence,
  length: int,
  limits: limits_lib.Limits,
  draft: Sequence[int] = (),
) -> Span:
  """Returns the span of `length` decode steps of a sequence, or of a draft."""
  stop = sequence.num_computed + length
  known = sequence.tokens[sequence.num_computed :][:1]
  assert sequence.slot is not None
  return Span(
    sequence=sequence,
    slot=sequence.slot,
    start=sequence.num_computed,
    length=length,
    tokens=(*known, *draft) or None,
    pages=sequence.pages[: limits.num_pages(stop)],
    samples=True,
  )


def chunks(
  sequence: page_tables.Sequence, length: int, limits: limits_lib.Limits
) -> list[Span]:
  """Cuts `length` known tokens of a sequence into chunks."""
  first, end = sequence.num_computed, sequence.num_computed + length
  assert sequence.slot is not None
  found = []
  for start in range(first, end, limits.chunk_tokens):
    stop = min(start + limits.chunk_tokens, end)
    found.append(
      Span(
        sequence=sequence,
        slot=sequence.slot,
        start=start,
        length=stop - start,
        tokens=tuple(sequence.tokens[start:stop]),
        pages=sequence.pages[: limits.num_pages(stop)],
        samples=stop == sequence.num_known,
      )
    )
  return found
