"""The parts of a model's answer, as `text.replies.parser` finds them.

    Reasoning*  (Text | ToolCall Arguments+)*  End

A stream sends the events as they come. A whole answer is their fold. Both have
the same parts, for every division of the text into pieces.

`tokens` numbers the pieces, from 0 for the first pushed piece, that have a part
of the text. So a value of a token, such as its log-probability, is sent with
the text of the token.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Text:
  """A piece of the text that the user reads."""

  text: str
  tokens: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Reasoning:
  """A piece of the model's reasoning before its answer."""

  text: str
  tokens: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class ToolCall:
  """The start of a call."""

  index: int  # index of the call in the answer, from 0
  name: str  # name of a tool of the request


@dataclasses.dataclass(frozen=True)
class Arguments:
  """A piece of a call's arguments; joined, the pieces are a JSON object."""

  index: int  # index of the call
  text: str


@dataclasses.dataclass(frozen=True)
class End:
  """The end of the answer."""

  # As at OpenAI: 'tool_calls' if there are calls and nothing cut the answer
  # short, else the reason why generation ended.
  finish_reason: str


Event = Text | Reasoning | ToolCall | Arguments | End


@dataclasses.dataclass
class Call:
  """A whole call."""

  name: str
  arguments: str


@dataclasses.dataclass
class Reply:
  """The fold of all events of an answer."""

  text: str = ''
  reasoning: str = ''
  calls: list[Call] = dataclasses.field(default_factory=list)
  finish_reason: str | None = None
  text_tokens: list[int] = dataclasses.field(default_factory=list)
  reasoning_tokens: list[int] = dataclasses.field(default_factory=list)

  def add(self, event: Event) -> None:
    """Adds the next event."""
    match event:
      case Text():
        self.text += event.text
        self.text_tokens += event.tokens
      case Reasoning():
        self.reasoning += event.text
        self.reasoning_tokens += event.tokens
      case ToolCall():
        self.calls.append(Call(event.name, ''))
      case Arguments():
        self.calls[event.index].arguments += event.text
      case End():
        self.finish_reason = event.finish_reason
