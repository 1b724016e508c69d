"""Sequences that a SequenceManager does not take."""

from collections.abc import Container, Hashable, Sequence

from inference.scheduling import limits as limits_lib, page_tables


class Refused(ValueError):
  """The sequence could never run, or contradicts its parent."""


def check_new(id: Hashable, taken: Container[Hashable]) -> None:
  """Refuses an id that another sequence has.

  Raises:
    Refused: the id is taken.
  """
  if id in taken:
    raise Refused(
      f'sequence {id!r}: got an id that is taken; expected a new one'
    )


def check_parent(
  id: Hashable,
  prompt: Sequence[int],
  scope: Hashable,
  parent: page_tables.Sequence | None,
) -> None:
  """Refuses a sequence that differs from the parent whose pages it shares.

  Raises:
    Refused: they have other prompts or scopes.
  """
  if parent and (
    parent.tokens[: parent.num_prompt] != prompt or parent.scope != scope
  ):
    raise Refused(
      f'sequence {id!r}: got another prompt or scope than its parent'
      f' {parent.id!r}, expected the same; submit it without a parent'
    )


def check_fits(
  id: Hashable,
  num_prompt: int,
  max_new_tokens: int,
  *,
  limits: limits_lib.Limits,
  num_usable: int,
) -> None:
  """Refuses a sequence that could not run even alone.

  Raises:
    Refused: it has no tokens, or more than `num_usable` pages hold.
  """
  if num_prompt < 1 or max_new_tokens < 1:
    raise Refused(
      f'sequence {id!r}: got a prompt of {num_prompt} tokens and'
      f' {max_new_tokens} new ones, expected at least one of each; begin with'
      ' a token that starts a text, and ignore a token that is not wanted'
    )
  # The last token is sampled and never computed.
  needed = limits.num_pages(num_prompt + max_new_tokens - 1)
  if needed > num_usable:
    raise Refused(
      f'sequence {id!r}: got {num_prompt} prompt tokens and up to'
      f' {max_new_tokens} new ones, {needed} pages, expected at most'
      f' {num_usable * limits.page_size} tokens, {num_usable} pages; shorten it'
      ' or give the cache more pages'
    )
