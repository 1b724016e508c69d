"""The completion of one prompt in the terminal, with its report.

    terminal_prompt.complete(generator, 'def add(', chosen, write=print)

`search` answers with a strategy, and prints its receipt.
"""

from collections.abc import Callable, Sequence
from typing import Any

from frozen import format as frozen_format
from frozen.quantize import quality
from inference import chat_prompts, generate, terminal_chat
from inference.output import speed
from inference.requests import requests
from inference.sampling import settings as settings_lib
from inference.search import options as search_options, prompt as prompt_search

Write = Callable[[str], None]


def complete(
  generator: generate.Generator,
  prompt: str,
  chosen: dict[str, Any],
  *,
  write: Write,
  warn: Write,
  system: str | None = None,
  adapter: str | None = None,
) -> None:
  """Streams the completion of a prompt, then reports speed and digests.

  Args:
    generator: answers the prompt.
    prompt: the text.
    chosen: settings that differ from the model's recommendation.
    write: shows text, without adding a line end.
    warn: shows a warning.
    system: the system prompt of a chat that the prompt begins; None: no chat.
    adapter: name of the adapter that answers, if one does.

  Raises:
    ValueError: the prompt cannot be answered, or the weights have changed.
  """
  before = generator.frozen.manifest.weights_digest  # verified by `load`
  ids, settings = asked(generator, prompt, chosen, system=system, warn=warn)
  updates = generator.updates([ids], settings)
  if system is None:
    write(prompt)
  done = {}
  for _, update in updates:
    if settings.n == 1:
      write(update.text)
    if update.completion:
      done[update.index] = update.completion
  after = generator.weights_digest()
  completions = [done[index] for index in sorted(done)]
  write('\n\n')
  for completion in completions:
    completion.check()
  for line in _report(generator, completions, settings):
    write(f'{line}\n')
  if generator.adapter:
    write(f'adapter         {generator.adapter_digest} ({adapter})\n')
  is_same = before == after
  write(f'weights before  {before}\n')
  write(f'weights after   {after}  {"unchanged" if is_same else "CHANGED"}\n')
  if not is_same:
    raise ValueError(
      'the weights changed while they were used; report this as a bug'
    )


def _report(
  generator: generate.Generator,
  completions: Sequence[requests.Completion],
  settings: settings_lib.Settings,
) -> list[str]:
  """Returns the lines about several completions, speed, memory and storage."""
  lines = []
  if settings.n > 1:
    lines += [f'--- seed {each.seed}\n{each.text}\n' for each in completions]
  lines.append(speed.text(completions, generator.engine.compile_seconds))
  lines.append(f'memory          {generator.memory_text()}')
  manifest = generator.frozen.manifest
  if storage := frozen_format.storage_text(manifest):
    lines.append(f'stored          {storage}')
  if products := generator.products_text():
    lines.append(f'products        {products}')
  if measured := quality.told(manifest):
    lines.append(f'quality         {measured}')
  return lines


def search(
  generator: generate.Generator,
  prompt: str,
  chosen: dict[str, Any],
  options: search_options.Options,
  *,
  write: Write,
  warn: Write,
  system: str | None = None,
) -> None:
  """Answers a prompt with a strategy, then prints the receipt.

  Arguments are those of `complete`, and the options of the search.
  """
  ids, settings = asked(generator, prompt, chosen, system=system, warn=warn)
  found = prompt_search.search(generator, prompt, ids, settings, options)
  if system is None:
    write(prompt)
  write(found.chosen.text if found.chosen else '')
  write(f'\n\n{prompt_search.told(found)}\n')


def asked(
  generator: generate.Generator,
  prompt: str,
  chosen: dict[str, Any],
  *,
  system: str | None = None,
  warn: Write = lambda _: None,
) -> tuple[Sequence[int], settings_lib.Settings]:
  """Returns the ids of a prompt, or of a chat that it begins; and settings."""
  if system is not None:
    ids = terminal_chat.Talk(generator, system).ask(prompt).ids
    return ids, chat_prompts.settings_for(generator, ids, chosen)
  if warning := generator.warning(prompt):
    warn(f'warning: {warning}')
  ids = generator.prompt_ids(prompt)
  return ids, generator.settings_for(ids, **chosen)
