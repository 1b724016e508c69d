"""Chat templates: a conversation becomes a prompt, through a Jinja template.

Templates come with weights from untrusted sources, so they run in Jinja's
immutable sandbox. It has the features that templates of open models expect:
trimmed blocks, loop controls, the `generation` block, `tojson`,
`raise_exception` and `strftime_now`. The text equals the text of
`apply_chat_template` of `transformers`.

`encode` returns ids. A special token that the template writes is a special
token, and the same string in a message is text, so no message can forge a turn.
`text.chat_inputs` describes how this works and where it cannot. `render`
returns text alone, in which both look the same; `Tokenizer.encode` then encodes
all of it as text.
"""

from collections.abc import Collection, Mapping, Sequence
import dataclasses
import datetime
import functools
import json
import re
from typing import Any, NamedTuple

import jinja2
from jinja2 import ext, nodes, sandbox, utils

from text import chat_inputs, spans as spans_lib, tokenizer as tokenizer_lib

# A plain transcript, for base models: ordinary text has this form, too.
DEFAULT_TEMPLATE = """\
{% for message in messages %}
{{ message.role | capitalize }}: {{ message.content }}

{% endfor %}
{% if add_generation_prompt %}Assistant:{% endif %}"""

# Stop strings: the start of the next turn, which a base model would write next.
DEFAULT_STOP = ('\nUser:', '\nSystem:', '\nAssistant:')

_ARGUMENTS = ('messages', 'tools', 'documents', 'add_generation_prompt')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conversation:
  """The input of a template: JSON values, which are not trusted."""

  # Turns with 'role', and with 'content', a string or a list of parts. Other
  # keys, such as 'tool_calls', are for the template.
  messages: Sequence[Mapping[str, Any]]
  tools: Sequence[Mapping[str, Any]] | None = None  # JSON schemas
  documents: Sequence[Mapping[str, Any]] | None = None
  # Further variables of the template, such as 'enable_thinking'.
  variables: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  add_generation_prompt: bool = False  # ends with the start of an answer
  continue_final_message: bool = False  # ends inside the last message


class Prompt(NamedTuple):
  """A rendered conversation."""

  text: str
  specials: list[spans_lib.Span]  # special tokens that the template wrote
  # Text of the assistant, which training learns. None if the template has no
  # `generation` block.
  answers: list[spans_lib.Span] | None


class Encoded(NamedTuple):
  """An encoded conversation."""

  text: str
  ids: list[int]
  is_answer: list[bool] | None  # for each id; None as in `Prompt`


def encode(
  tokenizer: tokenizer_lib.Tokenizer, template: str, conversation: Conversation
) -> Encoded:
  """Returns the ids of a conversation; BOS only if the template writes it.

  Raises:
    ValueError: a message or the template is malformed, or the template raises
      an error.
  """
  found = prompt(
    template,
    conversation,
    names=tokenizer.names,
    special_tokens=tokenizer.special_tokens,
  )
  ids, offsets = tokenizer.encode_marked(found.text, found.specials)
  is_answer = None
  if found.answers is not None:
    is_answer = spans_lib.overlaps(offsets, found.answers)
  return Encoded(found.text, ids, is_answer)


def render(
  template: str,
  messages: Sequence[Mapping[str, Any]],
  *,
  add_generation_prompt: bool,
  bos_token: str = '',
  eos_token: str = '',
) -> str:
  """Returns the prompt text of `messages`.

  Args:
    template: Jinja source.
    add_generation_prompt: whether to end with the start of an answer.

  Raises:
    ValueError: a message or the template is malformed, or the template raises
      an error.
  """
  conversation = Conversation(
    messages=messages, add_generation_prompt=add_generation_prompt
  )
  names = {'bos_token': bos_token, 'eos_token': eos_token}
  return prompt(template, conversation, names=names, special_tokens=()).text


def prompt(
  template: str,
  conversation: Conversation,
  *,
  names: Mapping[str, str],
  special_tokens: Collection[str],
) -> Prompt:
  """Returns the rendered conversation, with spans of tokens and answers.

  Args:
    names: variables of the tokenizer, such as 'bos_token'.
    special_tokens: strings that are special tokens if the template writes them.

  Raises:
    ValueError: a message or the template is malformed, or the template raises
      an error.
  """
  given = _given(conversation)
  texts = (template, *names.values(), *chat_inputs.strings(given))
  mark, end, *brackets = chat_inputs.unused_characters(texts, 4)
  guard = chat_inputs.Guard(special_tokens, mark)
  given = guard.cut(given)
  if conversation.continue_final_message:
    _append(given['messages'][-1], f'{end} ')
  try:
    compiled = _compiled(template, mark, *brackets)
    # A variable of the client replaces a name of the tokenizer, as text.
    raw = compiled.template.render(**{**names, **given})
  except jinja2.TemplateSyntaxError as error:
    raise ValueError(
      f'chat template line {error.lineno}: {error.message}'
    ) from error
  except Exception as error:  # a template is a program that can raise anything
    raise ValueError(f'chat template: {error}') from error
  if conversation.continue_final_message:
    raw = _up_to(raw, end)
  text, answers = _unbracketed(raw, *brackets)
  marks = [match.start() for match in re.finditer(mark, text)]
  return Prompt(
    text.replace(mark, ''),
    _without(marks, guard.whole(text)),
    _without(marks, answers) if compiled.has_answers else None,
  )


def _given(conversation: Conversation) -> dict[str, Any]:
  """Returns the variables of the template, checked."""
  variables = chat_inputs.plain(conversation.variables, 'template variables')
  if reserved := sorted(set(variables) & set(_ARGUMENTS)):
    raise ValueError(
      f'template variables: got {", ".join(reserved)}, expected other names'
      ' than the names of the conversation itself'
    )
  if conversation.add_generation_prompt and conversation.continue_final_message:
    raise ValueError(
      'got both add_generation_prompt and continue_final_message, expected one:'
      ' either a new answer or a continuation of the last message'
    )
  given = {
    'messages': chat_inputs.plain_messages(conversation.messages),
    'add_generation_prompt': conversation.add_generation_prompt,
  }
  for name in ('tools', 'documents'):
    # Always defined: `tools is not none` is true of an undefined name.
    given[name] = chat_inputs.plain(getattr(conversation, name), name)
    for item in given[name] or ():
      if not isinstance(item, dict):
        raise ValueError(f'{name}: got {item!r}, expected objects')
  return variables | given


def _append(message: dict[str, Any], ending: str) -> None:
  """Appends `ending` to the text of a message, in place."""
  content = message.get('content')
  if isinstance(content, str):
    message['content'] = content + ending
    return
  for part in reversed(content or []):
    if isinstance(part.get('text'), str):
      part['text'] += ending
      return
  raise ValueError(
    f'continue_final_message: got a last message with content {content!r},'
    ' expected some text to continue'
  )


def _up_to(raw: str, end: str) -> str:
  """Returns the rendered text before `end`, the end of the last message."""
  place = raw.rfind(end)
  if place < 0:
    raise ValueError(
      'continue_final_message: got a chat template that does not render the'
      ' last message to its end, expected one that does'
    )
  # If the space after it is gone, the template trims messages, so we do, too.
  is_kept = raw.startswith(f'{end} ', place)
  return raw[:place] if is_kept else raw[:place].rstrip()


def _unbracketed(
  raw: str, opening: str, closing: str
) -> tuple[str, list[spans_lib.Span]]:
  """Returns the text without brackets, and the spans between them."""
  parts: list[str] = []
  spans: list[spans_lib.Span] = []
  length = start = 0
  for part in re.split(f'([{opening}{closing}])', raw):
    if part == opening:
      start = length
    elif part == closing:
      spans.append((start, length))
    else:
      parts.append(part)
      length += len(part)
  if raw.count(opening) > len(spans):  # cut inside the last message
    spans.append((start, length))
  return ''.join(parts), spans


def _without(
  marks: Sequence[int], spans: Sequence[spans_lib.Span]
) -> list[spans_lib.Span]:
  """Returns the spans in the text without its marks.

  Args:
    marks: positions of marks in the text, ascending.
    spans: ranges of the text with marks, ascending.
  """
  result = []
  passed = 0
  for start, end in spans:
    while passed < len(marks) and marks[passed] < start:
      passed += 1
    inside = sum(mark < end for mark in marks[passed:])
    result.append((start - passed, end - passed - inside))
  return result


class _Compiled(NamedTuple):
  template: jinja2.Template
  has_answers: bool  # the template has a generation block


@functools.lru_cache(maxsize=64)
def _compiled(
  template: str, mark: str, opening: str, closing: str
) -> _Compiled:
  """Compiles a template in the sandbox that chat templates expect."""
  environment = sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True,
    lstrip_blocks=True,
    extensions=[_GenerationBlock, ext.loopcontrols],
  )
  block: Any = environment.extensions[_GenerationBlock.identifier]
  block.brackets = (opening, closing)
  environment.filters['tojson'] = functools.partial(_to_json, mark=mark)
  environment.globals['raise_exception'] = _raise_exception
  environment.globals['strftime_now'] = _strftime_now
  environment.globals['dict'] = _Dict()
  environment.globals['namespace'] = _Namespace
  return _Compiled(environment.from_string(template), block.is_used)


class _GenerationBlock(ext.Extension):
  """`{% generation %}...{% endgeneration %}` renders as its contents.

  The contents are put between two brackets, unused characters that are found in
  the result and removed. A block may be in a macro or a loop, so its place is
  known only in the result.
  """

  tags = {'generation'}

  def __init__(self, environment: jinja2.Environment):
    super().__init__(environment)
    self.brackets = ('', '')
    self.is_used = False

  def parse(self, parser):
    self.is_used = True
    lineno = next(parser.stream).lineno
    body = parser.parse_statements(('name:endgeneration',), drop_needle=True)
    opening, closing = (
      nodes.Output([nodes.TemplateData(bracket)]) for bracket in self.brackets
    )
    return nodes.Scope([opening, *body, closing], lineno=lineno)


class _Dict:
  """Python's dict for templates, without other attributes of the class."""

  def __call__(self, *args: Any, **kwargs: Any) -> dict:
    return dict(*args, **kwargs)

  def fromkeys(self, *args: Any) -> dict:
    """Returns a dict with these keys."""
    return dict.fromkeys(*args)


class _Namespace(utils.Namespace):
  """Jinja's namespace, without access to attributes with underscores."""

  def __init__(*args: Any, **kwargs: Any):  # so that 'self' can be a name
    self, args = args[0], args[1:]
    for name in (names := dict(*args, **kwargs)):
      _check_name(name)
    utils.Namespace.__init__(self, names)

  def __setitem__(self, name: str, value: Any) -> None:
    _check_name(name)
    super().__setitem__(name, value)


def _check_name(name: Any) -> None:
  if isinstance(name, str) and name.startswith('_'):
    raise jinja2.exceptions.SecurityError(
      f'namespace: got the unsafe name {name!r}, expected no leading underscore'
    )


def _to_json(
  value: Any, ensure_ascii: bool = False, *, mark: str, **options: Any
) -> str:
  # Jinja's own filter escapes HTML characters, which would change the prompt.
  text = json.dumps(value, ensure_ascii=ensure_ascii, **options)
  if ensure_ascii:
    # An escaped mark would no longer cut the special token around it.
    escaped = json.dumps(mark)[1:-1].replace('\\', r'\\')
    text = re.sub(rf'(?<!\\)((?:\\\\)*){escaped}', rf'\1{mark}', text)
  return text


def _raise_exception(message: str) -> None:
  raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
  return datetime.datetime.now().strftime(form)
