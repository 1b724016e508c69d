"""A conversation to the text of a prompt, through a Jinja chat template.

Templates come with weights from anywhere, so they run in Jinja's immutable
sandbox, set up as the ecosystem's templates expect: trimmed blocks, loop
controls, the `generation` block, `tojson`, `raise_exception`, `strftime_now`.

The result is text: `Tokenizer.encode` treats special-token strings in it as
ordinary text, so that no message can forge a turn.
"""

import datetime
import json
from typing import Any

import jinja2
from jinja2 import ext, nodes, sandbox

# A plain transcript, for base models: they know this form from ordinary text.
DEFAULT_TEMPLATE = """\
{% for message in messages %}
{{ message.role | capitalize }}: {{ message.content }}

{% endfor %}
{% if add_generation_prompt %}Assistant:{% endif %}"""

# Where a base model that continues the transcript starts the next turn.
DEFAULT_STOP = ('\nUser:', '\nSystem:', '\nAssistant:')


class _GenerationBlock(ext.Extension):
  """`{% generation %}...{% endgeneration %}` renders as its contents."""

  tags = {'generation'}

  def parse(self, parser):
    lineno = next(parser.stream).lineno
    body = parser.parse_statements(('name:endgeneration',), drop_needle=True)
    return nodes.Scope(body, lineno=lineno)


def render(
  template: str,
  messages: list[dict[str, Any]],
  *,
  add_generation_prompt: bool,
  bos_token: str,
  eos_token: str,
) -> str:
  """Returns the prompt text for `messages`.

  Args:
    template: Jinja source.
    messages: turns, each with a string 'role' and a string 'content'.
    add_generation_prompt: end with the opening of the assistant's turn.
    bos_token: what `{{ bos_token }}` becomes.
    eos_token: what `{{ eos_token }}` becomes.

  Raises:
    ValueError: a message is malformed, or the template is, or refuses them.
  """
  for i, message in enumerate(messages):
    for key in ('role', 'content'):
      if not isinstance(message.get(key), str):
        raise ValueError(
          f'message {i} has {key} {message.get(key)!r}, expected a string'
        )
  try:
    return (
      _environment()
      .from_string(template)
      .render(
        messages=messages,
        add_generation_prompt=add_generation_prompt,
        bos_token=bos_token,
        eos_token=eos_token,
        # Templates ask `tools is not none`, which an undefined name passes.
        tools=None,
        documents=None,
      )
    )
  except jinja2.TemplateSyntaxError as error:
    raise ValueError(
      f'chat template line {error.lineno}: {error.message}'
    ) from error
  except Exception as error:  # a template is a program: it can raise anything
    raise ValueError(f'chat template: {error}') from error


def _environment() -> sandbox.ImmutableSandboxedEnvironment:
  """Returns the sandbox that chat templates of the ecosystem expect."""
  environment = sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True,
    lstrip_blocks=True,
    extensions=[_GenerationBlock, ext.loopcontrols],
  )
  environment.filters['tojson'] = _to_json
  environment.globals['raise_exception'] = _raise_exception
  environment.globals['strftime_now'] = _strftime_now
  return environment


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
  # Jinja's own filter escapes HTML characters, which would change the prompt.
  return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _raise_exception(message: str) -> None:
  raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
  return datetime.datetime.now().strftime(form)
