"""The reasoning of a model, and how a prompt begins it."""

from collections.abc import Sequence
import dataclasses

from inference import chat_prompts, generate
from inference.constraints import thinking
from text.replies import detection, parser


@dataclasses.dataclass(frozen=True, kw_only=True)
class Thought:
  """The style of the replies, and whether a prompt begins reasoning."""

  style: parser.Style
  is_open: bool  # the prompt ends inside of it

  def cap(self, most_tokens: int) -> thinking.Cap:
    """Returns the cap of so many tokens.

    Raises:
      ValueError: the model marks no reasoning, or the number is negative.
    """
    if self.style.reasoning is None:
      raise ValueError(
        f'reasoning budget: got {most_tokens}, expected none: the chat template'
        ' of this model marks no reasoning'
      )
    opening, closing = self.style.reasoning
    return thinking.Cap(
      most_tokens=most_tokens,
      opening=opening,
      closing=closing,
      is_open=self.is_open,
    )


def begun(generator: generate.Generator, ids: Sequence[int]) -> Thought:
  """Returns how a prompt of a model begins its reasoning."""
  style = chat_prompts.style_of(generator, detection.AUTO).replies
  if style.reasoning is None:
    return Thought(style=style, is_open=False)
  opening, _ = style.reasoning
  special = generator.tokenizer.special_tokens.get(opening)
  end = generator.tokenizer.decode(list(ids[-len(opening) - 2 :])).rstrip()
  is_open = ids[-1] == special or end.endswith(opening)
  return Thought(style=style, is_open=is_open)
