"""The places of the assistant's turns in a rendered conversation.

Generation marks in a template give the places. In another template, a turn
begins at the end of the prompt with which a server asks for it, and ends with a
stop token. Both are found by rendering the start of the conversation, and
checked. A template that writes the start of a conversation differently when
more messages follow is refused: no prompt of a server would be like its text.

The stop token is the special token that the template writes after an answer. If
a template writes none (as with all tokenizers without strings for special
tokens), EOS ends the last answer. In the plain transcript of `text.chat`, a
server's stop string ends the answers before it.
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
# Words that no template writes itself.
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
  """The text that a template writes after an answer."""

  stop: str  # a special token; '' for none
  after: str  # all text after the last answer


@dataclasses.dataclass(frozen=True)
class Template:
  """A chat template, rendered as a server renders it."""

  source: str
  names: tuple[tuple[str, str], ...]
  specials: frozenset[str]  # strings that are special where the template writes
  eos: frozenset[str]  # the specials that end an answer anywhere

  @functools.cached_property
  def style(self) -> detection.TemplateStyle:
    """Returns the formats and kinds of messages of the template."""
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
  """Checks that the answer to a question can be found, with its stop token.

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
  """Returns a rendered conversation, and the spans of its trained turns.

  Args:
    messages: a conversation that the template takes.
    untrained: places of the assistant's messages that are not trained.

  Raises:
    ValueError: the template refuses the conversation, or its turns cannot be
      found.
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
    # A template may mark a turn in several parts: count the starts of parts.
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
      following = _start_of(template, whole, messages, tools, i + 1)
      stops = list(_stops(template, whole, start, following))[:1]
      if not stops:
        raise ValueError(_no_end(i))
    spans.append((start, stops[-1][1]))
  return spans


def _start_of(
  template: Template,
  whole: chat.Prompt,
  messages: Messages,
  tools: Tools,
  place: int,
) -> int:
  """Returns the place of a message's content in the whole text."""
  content = messages[place]['content'].lstrip()
  other = {**messages[place], 'content': 'y' if content[:1] == 'x' else 'x'}
  changed = [*messages[:place], other, *messages[place + 1 :]]
  text = template.render(changed, tools).text
  return len(os.path.commonprefix([text, whole.text]))


def _no_end(place: int) -> str:
  return (
    f'chat template: got one in which the end of the answer in message {place}'
    f' cannot be found, expected a stop token behind it; {_FIX}'
  )


def _with_stops(
  template: Template, whole: chat.Prompt, spans: Sequence[spans_lib.Span]
) -> list[spans_lib.Span]:
  """Returns the spans, each up to its stop token and no further."""
  every = list(_stops(template, whole, 0, len(whole.text)))
  ends = {end for _, end in every}
  result: list[spans_lib.Span] = []
  for i, (start, end) in enumerate(spans):
    following = spans[i + 1][0] if i + 1 < len(spans) else len(whole.text)
    stops = [stop for stop in every if stop[0] >= start]
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
    ended = result[-1][1] if result else -1
    is_stop_alone = bool(inside) and inside[0][0] == start
    is_next = ended in ends and not whole.text[ended:start].strip()
    if is_next and is_stop_alone:
      continue  # a second stop token, which no model reaches
    result.append((start, end))
  return result


def _with_strings(
  template: Template,
  text: str,
  spans: Sequence[spans_lib.Span],
  needs_eos: bool,
) -> list[spans_lib.Span]:
  """Returns the spans; a span without EOS after it ends at a stop string."""
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


def encode(
  tokenizer: tokenizer_lib.Tokenizer,
  template: Template,
  found: Turns,
  *,
  has_bos: bool | None = None,
) -> tuple[list[int], list[bool]]:
  """Returns the ids of turns, and whether each is trained.

  Args:
    has_bos: whether a text begins with BOS, as `has_bos` of a frozen directory
      says. Templates with special tokens write BOS themselves. None: as the
      tokenizer.
  """
  ids, offsets = _encode(tokenizer, found)
  trained = _begin_in(offsets, found.trained)
  if has_bos is None:
    is_foreign = tokenizer.kind == 'huggingface'
    has_bos = not is_foreign or getattr(tokenizer, 'adds_bos', False)
  if not template.specials and has_bos:
    ids, trained = [tokenizer.bos_id, *ids], [False, *trained]
  if found.needs_eos:
    ids, trained = [*ids, tokenizer.eos_id], [*trained, True]
  return ids, trained


def _begin_in(
  offsets: Sequence[spans_lib.Span], spans: Sequence[spans_lib.Span]
) -> list[bool]:
  """Returns for each offset whether it begins in one of the ascending spans.

  A special token may include the white space after it, and so the start of an
  answer. That token belongs to the prompt.
  """
  firsts = [(start, start + 1) for start, _ in offsets]
  return spans_lib.overlaps(firsts, spans)


def _encode(
  tokenizer: tokenizer_lib.Tokenizer, found: Turns
) -> spans_lib.Encoded:
  """Returns the ids; none has characters of a prompt and of its answer.

  A model is asked with the ids of the prompt alone, so an id that joins the end
  of the prompt and the start of the answer is never said. The text is cut there
  and encoded in parts, if the tokenizer can encode parts: some would put a
  space in front of each.
  """
  whole = tokenizer.encode_marked(found.text, found.specials)
  cuts = [
    start
    for start, _ in found.trained
    if any(a < start < b for a, b in whole.offsets)
  ]
  if not cuts:
    return whole
  ids: list[int] = []
  offsets: list[spans_lib.Span] = []
  for first, end in zip((0, *cuts), (*cuts, len(found.text)), strict=True):
    specials = [
      (a - first, b - first) for a, b in found.specials if first <= a < end
    ]
    part = tokenizer.encode_marked(found.text[first:end], specials)
    ids += part.ids
    offsets += [(a + first, b + first) for a, b in part.offsets]
  is_same = tokenizer.decode(ids) == tokenizer.decode(whole.ids)
  return spans_lib.Encoded(ids, offsets) if is_same else whole
