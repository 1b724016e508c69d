"""The limits of a step, within which the scheduler plans."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
  """The limits of a step, checked when made.

  They bound how long a long prompt delays running sequences. Every running
  sequence that decodes has a token in every step, and a step with decodes
  computes at most `max_mixed_chunks * chunk_tokens` prompt tokens. A chunk
  costs more the more tokens it attends to, so fewer chunks fit: after
  `stall_context` tokens half as many, after twice as many a third, but always
  one.

  Raises:
    ValueError: a limit is below 1, or more chunks are allowed with decodes than
      without.
  """

  max_sequences: int  # sequences that run at once: slots, decodes of a step
  chunk_tokens: int  # tokens per chunk
  max_chunks: int  # chunks of a step without decodes
  max_mixed_chunks: int  # chunks of a step with decodes
  stall_context: int  # earlier tokens after which a chunk counts twice
  page_size: int  # tokens per page
  aging_steps: int  # steps of waiting that lift by one priority level

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(
          f'engine.{field.name}: got {value!r}, expected a whole number of at'
          ' least 1; a limit cannot be switched off'
        )
    if self.max_mixed_chunks > self.max_chunks:
      raise ValueError(
        f'engine.max_mixed_chunks: got {self.max_mixed_chunks}, expected at'
        f' most max_chunks = {self.max_chunks}; raise max_chunks'
      )

  def num_pages(self, num_tokens: int) -> int:
    """Returns the number of pages that hold `num_tokens` tokens."""
    return -(-num_tokens // self.page_size)

  def num_chunks(self, num_tokens: int) -> int:
    """Returns the number of chunks that compute `num_tokens` tokens."""
    return -(-num_tokens // self.chunk_tokens)
