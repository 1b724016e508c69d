"""The parser of a model's answer: pieces of text in, events out.

    parser = Parser(style, special_tokens, tools=tools)
    for piece in pieces: events += parser.push(piece)
    events += parser.finish('stop')

The events do not depend on how the text was cut into pieces, except for where
Text and Reasoning are divided. The rules:

- Text that may be part of a marker waits for the text that decides. A marker
  that the end cuts off belongs to the text or reasoning around it.
- Line ends beside a marker belong to the marker. They are left out with it.
- A call waits for its end: then it is a call, or all of it is text, markers
  included. So the arguments of a call are always whole, a JSON object.
- The first closing marker ends a call, wherever it stands.
- An end in the middle of a call makes it text. A call that lacks only its
  closing marker is a call.
- Several calls are numbered in their order. With `is_single`, all calls after
  the first are left out. Text may stand before, between and after calls.
- Reasoning begins in the prompt, or with a marker. A marker that is a special
  token counts anywhere, another marker only at the start of the answer. All
  text up to the closing marker, or to the end without one, is reasoning. A
  closing marker without an opening one is text.
- A call inside reasoning is part of it: the model only considers it. But if the
  answer ends with the call, the model forgot to close its reasoning, and the
  call counts.
- A bare call, without a marker, counts only if the whole answer is calls.
- Without tools in the request nothing is a call.
"""

import collections
from collections.abc import Callable, Mapping
import dataclasses
from typing import NamedTuple

from text.replies import events, formats, markers as markers_lib

_TEXT, _REASONING, _CALL, _BARE = 'text', 'reasoning', 'call', 'bare'
_KINDS = {_TEXT: events.Text, _REASONING: events.Reasoning}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Style:
  """The parts of a model's answers besides text: calls and reasoning."""

  calls: formats.CallFormat | None = None
  reasoning: tuple[str, str] | None = None  # the markers around it

  def markers(self, special_tokens: Mapping[str, int]) -> markers_lib.Markers:
    """Returns the markers, for a tokenizer with these special tokens."""
    found = (*(self.calls.markers if self.calls else ()),)
    return markers_lib.Markers(
      (*found, *(self.reasoning or ())), special_tokens
    )


class _Piece(NamedTuple):
  start: int  # characters of the answer before it
  end: int
  number: int


class Parser:
  """Parses one answer."""

  def __init__(
    self,
    style: Style,
    markers: markers_lib.Markers,
    *,
    tools: formats.Tools | None = None,
    is_reasoning: bool = False,
    is_single: bool = False,
  ):
    """Starts an answer.

    Args:
      style: style of the model.
      markers: markers of the style, see `Style.markers`.
      tools: tools that may be called; None or empty: nothing is a call.
      is_reasoning: whether the prompt ends inside of reasoning.
      is_single: whether only the first call counts.
    """
    self._markers, self._tools = markers, tools or {}
    self._form = markers.form
    self._is_single = is_single
    self._format = style.calls if self._tools else None
    self._begin = markers.form(self._format.begin) if self._format else ''
    self._end = markers.form(self._format.end) if self._format else ''
    opening, closing = style.reasoning or ('', '')
    self._opening, self._closing = markers.form(opening), markers.form(closing)
    self._opens_anywhere = self._opening != opening
    self._state = _REASONING if is_reasoning else _TEXT
    self._is_start = True  # only white space and reasoning have come
    self._skips = is_reasoning  # line ends after a marker
    self._is_told = False  # whether it is decided if calls are bare
    self._resumed = _TEXT  # the state around a call
    self._body_at = 0  # where the body of a call begins in the buffer
    self._searched = 0  # position up to which its end was not found
    # Calls at the end of reasoning so far, up to `_waiting_at` of the buffer.
    self._waiting: list[events.Call] = []
    self._waiting_at = 0
    self._num_calls = 0
    self._buffer = ''  # not decided yet
    self._at = 0  # characters of the answer before the buffer
    self._pieces: collections.deque[_Piece] = collections.deque()
    self._num_pieces = 0
    self._events: list[events.Event] = []

  def push(self, piece: str) -> list[events.Event]:
    """Returns the events that a piece of the answer decides; maybe none."""
    start = self._at + len(self._buffer)
    self._pieces.append(_Piece(start, start + len(piece), self._num_pieces))
    self._num_pieces += 1
    self._buffer += piece
    self._run()
    return self._taken()

  def finish(self, finish_reason: str) -> list[events.Event]:
    """Returns the last events: the answer ends here.

    Args:
      finish_reason: reason why generation ended, such as 'stop' or 'length'.
    """
    while self._buffer or self._waiting:
      self._finish_state()
    if self._num_calls and finish_reason == 'stop':
      finish_reason = 'tool_calls'
    self._events.append(events.End(finish_reason))
    return self._taken()

  def _taken(self) -> list[events.Event]:
    taken, self._events = self._events, []
    return taken

  # ----------------------------------------------------------------------------
  # The states

  def _run(self) -> None:
    """Decides as much of the buffer as its text allows."""
    steps: dict[str, Callable[[], bool]] = {
      _TEXT: self._step_text,
      _REASONING: self._step_reasoning,
      _CALL: self._step_call,
      _BARE: self._step_bare,
    }
    while steps[self._state]():
      pass

  def _step_text(self) -> bool:
    """Passes text up to a marker; returns whether a marker was found."""
    self._skip_line_ends()
    if self._is_start and self._format and self._format.has_bare:
      stripped = self._buffer.lstrip()
      if not stripped:
        return False
      if formats.may_be_bare(stripped, self._tools):
        self._state = _BARE
        return True
    may_open = self._is_start or self._opens_anywhere
    opening = self._opening if may_open else ''
    place, marker = self._first(opening, self._begin)
    is_late = bool(self._buffer[:place].strip()) and not self._opens_anywhere
    if marker and marker == opening and is_late:
      self._pass(place + len(marker), _TEXT)
      return True
    if not marker:
      num_safe = self._num_safe(opening, self._begin)
      # White space at the start of the answer belongs to a marker after it.
      if not self._is_start or self._buffer[:num_safe].strip():
        self._pass(num_safe, _TEXT)
      return False
    self._open(place, marker, _TEXT)
    return True

  def _step_reasoning(self) -> bool:
    """Passes reasoning up to a marker; returns whether one was found."""
    self._skip_line_ends()
    place, marker = self._first(self._closing, self._begin)
    if not marker:
      self._pass(self._num_safe(self._closing, self._begin), _REASONING)
      return False
    self._open(place, marker, _REASONING)
    return True

  def _step_call(self) -> bool:
    """Reads a call when its end has come; returns whether it has."""
    if self._waiting and not self._continues():
      return self._state == _REASONING
    close = self._end or self._begin
    # A long call is not searched again from its start with every piece.
    start = max(self._body_at, self._searched - len(close))
    place = self._buffer.find(close, start)
    self._searched = len(self._buffer)
    if place < 0:
      return False
    self._searched = 0
    after = place + len(self._end)
    if not self._read(self._buffer[self._body_at : place], after):
      self._give_up(after)
    return True

  def _step_bare(self) -> bool:
    """Waits while all of the answer may be calls."""
    if self._is_told:
      return False
    stripped = self._buffer.lstrip()
    if formats.may_be_bare(stripped, self._tools):
      self._is_told = len(stripped) >= formats.MOST_BARE
      return False
    self._state, self._is_start = _TEXT, False
    return True

  def _finish_state(self) -> None:
    """Decides the rest of a state at the end of the answer."""
    if self._waiting:
      self._finish_waiting()
      self._run()
    elif self._state == _CALL:
      if not self._read_rest():
        self._give_up(len(self._buffer))
      self._run()
    elif self._state == _BARE:
      found = self._found(self._buffer)
      if found:
        self._emit_calls(found.calls)
        self._drop(len(self._buffer))
      self._pass(len(self._buffer), _TEXT)
    else:
      self._pass(len(self._buffer), self._state)

  # ----------------------------------------------------------------------------
  # Calls

  def _found(self, body: str) -> formats.Found | None:
    assert self._format
    return self._format.read(body, self._tools, self._form)

  def _read(self, body: str, after: int) -> bool:
    """Takes the calls of a body, which end at `after`; False: it has none."""
    found = self._found(body)
    if not found:
      return False
    after -= len(found.rest)
    if self._resumed == _REASONING:
      self._waiting += found.calls
      self._waiting_at = after
      return True
    self._emit_calls(found.calls)
    self._drop(after)
    self._state, self._skips = _TEXT, True
    return True

  def _read_rest(self) -> bool:
    """Takes a call whose closing marker is cut off or missing."""
    body, size = self._buffer[self._body_at :], len(self._buffer)
    cut = markers_lib.pending(body, [self._end])
    return self._read(body, size) or (cut > 0 and self._read(body[:-cut], size))

  def _give_up(self, after: int) -> None:
    """Turns a call into text, up to the next marker that opens one."""
    if self._waiting:
      after = self._body_at - len(self._begin)
      self._waiting = []
    else:
      place = self._buffer.find(self._begin, self._body_at, after)
      after = after if place < 0 else place
    self._pass(after, self._resumed)
    self._state = self._resumed

  def _continues(self) -> bool:
    """Returns whether a call follows the calls at the end of reasoning.

    If other text follows, they are reasoning. If none follows yet, they wait.
    """
    rest = self._buffer[self._waiting_at :]
    stripped = rest.lstrip()
    if stripped.startswith(self._begin):
      place = self._waiting_at + len(rest) - len(stripped)
      self._body_at = place + len(self._begin)
      return True
    if stripped and not self._begin.startswith(stripped):
      self._waiting = []
      self._pass(self._waiting_at, _REASONING)
      self._state = _REASONING
    return False

  def _finish_waiting(self) -> None:
    if self._continues():
      if not self._read_rest():
        self._give_up(len(self._buffer))
    elif self._waiting:
      is_end = not self._buffer[self._waiting_at :].strip()
      calls, self._waiting = self._waiting, []
      self._state = _REASONING
      if is_end:
        self._emit_calls(calls)
        self._drop(len(self._buffer))
      else:  # a part of a marker
        self._pass(len(self._buffer), _REASONING)

  def _emit_calls(self, calls: list[events.Call]) -> None:
    for call in calls:
      if self._is_single and self._num_calls:
        return
      self._is_start = False
      index = self._num_calls
      self._num_calls += 1
      self._events += [
        events.ToolCall(index, call.name),
        events.Arguments(index, call.arguments),
      ]

  # ----------------------------------------------------------------------------
  # The buffer

  def _first(self, *markers: str) -> tuple[int, str]:
    """Returns the first marker in the buffer, and its place; '' for none."""
    found = [(self._buffer.find(m), m) for m in markers if m]
    return min((each for each in found if each[0] >= 0), default=(0, ''))

  def _open(self, place: int, marker: str, state: str) -> None:
    """Passes the text before a marker; enters the state that it begins."""
    before = self._buffer[:place]
    if state == _REASONING or not self._is_start or before.strip():
      self._pass(len(before.rstrip('\n')), state)
    if marker == self._begin:
      self._body_at = self._buffer.find(marker) + len(marker)
      self._state, self._resumed = _CALL, state
      self._searched = 0
      return
    self._drop(self._buffer.find(marker) + len(marker))
    self._state = _REASONING if state == _TEXT else _TEXT
    self._skips = self._is_start = True

  def _num_safe(self, *markers: str) -> int:
    """Returns the characters of the buffer that belong to no marker."""
    markers = tuple(filter(None, markers))
    if not markers:
      return len(self._buffer)
    safe = len(self._buffer) - markers_lib.pending(self._buffer, markers)
    return len(self._buffer[:safe].rstrip('\n'))

  def _skip_line_ends(self) -> None:
    if self._skips and self._buffer:
      self._drop(len(self._buffer) - len(self._buffer.lstrip('\n')))
      self._skips = not self._buffer

  def _pass(self, size: int, kind: str) -> None:
    """Makes an event of the first characters of the buffer."""
    if not size:
      return
    text = self._markers.spelled(self._buffer[:size])
    if kind == _TEXT and text.strip():
      self._is_start = False
    tokens = self._move(size, is_kept=True)
    self._events.append(_KINDS[kind](text, tokens))

  def _drop(self, size: int) -> None:
    self._move(size, is_kept=False)

  def _move(self, size: int, *, is_kept: bool) -> tuple[int, ...]:
    """Takes characters off the buffer; returns the pieces that they touch."""
    self._buffer, self._at = self._buffer[size:], self._at + size
    numbers = []
    while self._pieces and self._pieces[0].start < self._at:
      piece = self._pieces.popleft()
      if is_kept:
        numbers.append(piece.number)
      elif piece.end > self._at:  # the rest of it may be kept
        self._pieces.appendleft(piece._replace(start=self._at))
        break
    return tuple(numbers)
