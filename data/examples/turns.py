"""Where the turns of the assistant are in a rendered conversation.

A template with generation marks says it itself. For another one, a turn begins
where the prompt ends with which a server asks for it, and it ends with a stop
token. Both are found by rendering the start of the conversation, and checked: a
template that writes the start of a conversation differently when more messages
follow is refused, because no prompt of a server would be like that text.

The stop token is the special token that the template writes behind an answer. A
template that writes none (all those of tokenizers without strings for special
tokens) gets EOS behind the last answer. In the plain transcript of `text.chat`,
the stop string of a server ends the answers before.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
import dataclasses
import functools
import os
from typing import Any, NamedTuple

from text import chat, spans as spans_lib, tokenizer as tokenizer_lib
from text.replies import detection

_FIX = (
  'mark the answers in the template with {% generation %} and'
  ' {% endgeneration %}, the stop token included'
)
# Words that no template writes by itself.
_ANSWER = 'probed answer'
_PROBE = (
  {'role': 'user', 'content': 'probed question'},
  {'role': 'assistant', 'content': _ANSWER},
)

Messages = Sequence[Mapping[str, Any]]
Tools = Sequence[Mapping[str, Any]] | None


class Turns(NamedTuple):
  """A rendered conversation up to the end of its last trained turn."""

  text: str
  specials: list[spans_lib.Span]
  trained: list[spans_lib.Span]  # turns, each with its stop token or string
  needs_eos: bool  # the last turn ends without a stop token of the template


class Ending(NamedTuple):
  """The end of an answer, as a template writes it."""

  stop: str  # a special token; '' for none
  after: str  # all text behind the last answer


@dataclasses.dataclass(frozen=True)
class Template:
  """A chat template, rendered as a server renders it."""

  source: str
  names: tuple[tuple[str, str], ...]
  specials: frozenset[str]  # strings that are special where it writes them
  eos: frozenset[str]  # those of them that end an answer anywhere

  @functools.cached_property
  def style(self) -> detection.TemplateStyle:
    """Returns what the template reads and writes."""
    return detection.style_of(
      self.source, names=self.names, special_tokens=self.specials
    )

  @functools.cached_property
  def ending(self) -> Ending:
    """Returns the end of an answer.

    Raises:
      ValueError: the template does not render a question and an answer.
    """
    found = self.render(_PROBE)
    end = found.text.rfind(_ANSWER) + len(_ANSWER)
    if end < len(_ANSWER):
      raise ValueError(
        'chat template: got one that leaves out the text of an answer, expected'
        ' one that writes it'
      )
    stop = next(_specials(found, end), (end, end))
    is_next = not found.text[end : stop[0]].strip()
    return Ending(found.text[slice(*stop)] if is_next else '', found.text[end:])

  def render(
    self,
    messages: Messages,
    tools: Tools = None,
    *,
    add_generation_prompt: bool = False,
  ) -> chat.Prompt:
    """Returns the text of a conversation.

    Raises:
      ValueError: the template refuses the conversation.
    """
    return chat.prompt(
      self.source,
      chat.Conversation(
        messages=messages,
        tools=tools,
        add_generation_prompt=add_generation_prompt,
      ),
      names=dict(self.names),
      special_tokens=self.specials,
    )


@functools.lru_cache(maxsize=8)
def of(tokenizer: tokenizer_lib.Tokenizer, source: str) -> Template:
  """Returns the template as a server uses it with this tokenizer.

  Args:
    source: Jinja source; '' for the plain transcript.
  """
  # The same rule as in `inference/chat_prompts.py`.
  if not source or tokenizer.kind != 'huggingface':
    names = ('bos_token', ''), ('eos_token', '')
    source = source or chat.DEFAULT_TEMPLATE
    return Template(source, names, frozenset(), frozenset())
  ids = getattr(tokenizer, 'eos_ids', (tokenizer.eos_id,))
  return Template(
    source,
    tuple(tokenizer.names.items()),
    frozenset(tokenizer.special_tokens),
    frozenset(t for t, i in tokenizer.special_tokens.items() if i in ids),
  )


def check(template: Template) -> None:
  """Checks that the answer to a question can be told, with its stop token.

  Raises:
    ValueError: it cannot, or it has no stop token.
  """
  if template.specials and not template.ending.stop:
    raise ValueError(
      f'chat template: got {template.ending.after!r} behind an answer, expected'
      ' a special token, without which a model does not learn to end its turn;'
      ' write {{ eos_token }} behind each answer, or make the token special in'
      ' tokenizer_config.json'
    )
  turns = find(template, _PROBE)
  texts = [turns.text[slice(*span)] for span in turns.trained]
  if _ANSWER not in ''.join(texts):
    raise ValueError(
      f'chat template: got {texts} as the trained parts of an example, expected'
      f' the answer {_ANSWER!r} among them; {_FIX}'
    )


def find(
  template: Template,
  messages: Messages,
  tools: Tools = None,
  untrained: Collection[int] = (),
) -> Turns:
  """Returns a rendered conversation, and where its trained turns are.

  Args:
    messages: a conversation that the template takes.
    untrained: places of the assistant's messages that are not trained.

  Raises:
    ValueError: the template refuses the conversation, or its turns cannot be
      told.
  """
  places = [
    i
    for i, message in enumerate(messages)
    if message['role'] == 'assistant' and i not in untrained
  ]
  whole = template.render(messages, tools)
  if whole.answers is None:
    spans = _unmarked(template, whole, messages, tools, places)
  else:
    spans = _marked(template, whole, messages, tools, places)
  if template.ending.stop:
    spans, needs_eos = _with_stops(template, whole, spans), False
  else:
    needs_eos = places[-1] == len(messages) - 1
    spans = _with_strings(template, whole.text, spans, needs_eos)
  end = spans[-1][1]
  specials = [span for span in whole.specials if span[1] <= end]
  return Turns(whole.text[:end], specials, spans, needs_eos)


def _marked(
  template: Template,
  whole: chat.Prompt,
  messages: Messages,
  tools: Tools,
  places: Sequence[int],
) -> list[spans_lib.Span]:
  """Returns the marks of the trained turns."""
  marks = [span for span in whole.answers or () if span[0] < span[1]]
  all_places = [i for i, m in enumerate(messages) if m['role'] == 'assistant']
  if len(marks) == len(all_places):
    by_place = dict(zip(all_places, marks, strict=True))
    return [by_place[i] for i in places]
  skipped = 0
  if all_places != list(places):
    # A template may mark a turn in several parts: count those of the start.
    if all_places[-len(places) :] != list(places):
      raise ValueError(
        f'chat template: got {len(marks)} marks of {len(all_places)} answers,'
        f' expected one of each, of which some have weight 0; {_FIX}'
      )
    before = template.render(messages[: places[0]], tools).answers or ()
    skipped = sum(start < end for start, end in before)
  if skipped >= len(marks):
    raise ValueError(
      f'chat template: got no mark of the answer in message {places[0]},'
      f' expected one; {_FIX}'
    )
  return marks[skipped:]


def _unmarked(
  template: Template,
  whole: chat.Prompt,
  messages: Messages,
  tools: Tools,
  places: Sequence[int],
) -> list[spans_lib.Span]:
  """Returns the trained turns, found by rendering the start of the whole."""
  spans = []
  for i in places:
    prompt = template.render(messages[:i], tools, add_generation_prompt=True)
    start = len(prompt.text)
    if not whole.text.startswith(prompt.text):
      raise ValueError(
        f'chat template: got one whose prompt for the answer in message {i} is'
        ' not the start of the whole conversation, expected the same start;'
        f' {_FIX}, or give this answer weight 0'
      )
    turn = template.render(messages[: i + 1], tools)
    common = len(os.path.commonprefix([turn.text, whole.text]))
    if not template.ending.stop:
      end = common - len(template.ending.after)
      if whole.text[end:common] != template.ending.after or end <= start:
        raise ValueError(_no_end(i))
      spans.append((start, end))
      continue
    stops = list(_stops(template, whole, start, common))
    if not stops:
      # The text of the turn changes when messages follow, as where reasoning of
      # earlier turns is left out. If it has one stop token, so has the other.
      if len(list(_stops(template, turn, start, len(turn.text)))) != 1:
        raise ValueError(_no_end(i))
      stops = list(_stops(template, whole, start, len(whole.text)))[:1]
    spans.append((start, stops[-1][1]))
  return spans


def _no_end(place: int) -> str:
  return (
    f'chat template: got one in which the end of the answer in message {place}'
    f' cannot be found, expected a stop token behind it; {_FIX}'
  )


def _with_stops(
  template: Template, whole: chat.Prompt, spans: Sequence[spans_lib.Span]
) -> list[spans_lib.Span]:
  """Returns the spans, each up to its stop token and no further."""
  result: list[spans_lib.Span] = []
  for i, (start, end) in enumerate(spans):
    following = spans[i + 1][0] if i + 1 < len(spans) else len(whole.text)
    stops = list(_stops(template, whole, start, len(whole.text)))
    inside = [stop for stop in stops if stop[1] <= end]
    # Only white space may be between the stop token and the end.
    if inside and not whole.text[inside[-1][1] : end].strip():
      while (
        len(inside) > 1
        and not whole.text[inside[-2][1] : inside[-1][0]].strip()
      ):
        inside.pop()
      end = inside[-1][1]
    else:
      stop = next((stop for stop in stops if stop[0] >= end), None)
      if (
        stop and stop[1] <= following and not whole.text[end : stop[0]].strip()
      ):
        end = stop[1]
      elif stop is None or stop[0] < following:
        raise ValueError(
          f'chat template: got {whole.text[start:end][-40:]!r} as the end of a'
          f' trained turn, expected a stop token; {_FIX}'
        )
    is_stop_alone = inside and inside[0][0] == start
    if (
      result and is_stop_alone and not whole.text[result[-1][1] : start].strip()
    ):
      continue  # a second stop token, which no model reaches
    result.append((start, end))
  return result


def _with_strings(
  template: Template,
  text: str,
  spans: Sequence[spans_lib.Span],
  needs_eos: bool,
) -> list[spans_lib.Span]:
  """Returns the spans; those without EOS behind them up to a stop string."""
  without = len(spans) - needs_eos
  result = []
  for start, end in spans[:without]:
    is_default = template.source == chat.DEFAULT_TEMPLATE
    found = [
      place + len(stop)
      for stop in (chat.DEFAULT_STOP if is_default else ())
      if 0 <= (place := text.find(stop, end)) < end + len(template.ending.after)
    ]
    if not found:
      raise ValueError(
        'chat template: got an answer with messages behind it, and no special'
        ' token to end it, expected one answer, at the end of the conversation;'
        ' give earlier answers weight 0, or use a tokenizer with special tokens'
      )
    result.append((start, min(found)))
  return [*result, *spans[without:]]


def _specials(whole: chat.Prompt, start: int) -> Iterator[spans_lib.Span]:
  return (span for span in whole.specials if span[0] >= start)


def _stops(
  template: Template, whole: chat.Prompt, start: int, end: int
) -> Iterator[spans_lib.Span]:
  """Yields the stop tokens between two places of the text."""
  names = template.eos | {template.ending.stop}
  for span in _specials(whole, start):
    if span[1] <= end and whole.text[slice(*span)] in names:
      yield span
