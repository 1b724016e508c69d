"""Answers one prompt with a strategy, for serve.py --prompt."""

from collections.abc import Sequence
import dataclasses
import pathlib

from frozen import manifest as manifest_lib
from inference import chat_prompts, generate, rewards
from inference.constraints import thinking
from inference.requests import requests as requests_lib
from inference.sampling import settings as settings_lib
from inference.search import (
  budget as budget_lib,
  drive,
  options as options_lib,
  reading,
  receipt as receipt_lib,
  samples as samples_lib,
  scorers,
  search as search_lib,
)
from models import model_config
from text.replies import detection, parser


@dataclasses.dataclass(frozen=True, kw_only=True)
class Thought:
  """The reasoning of a model, and how a prompt begins it."""

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


def thought(generator: generate.Generator, ids: Sequence[int]) -> Thought:
  """Returns how a prompt of a model begins its reasoning."""
  style = chat_prompts.style_of(generator, detection.AUTO).replies
  if style.reasoning is None:
    return Thought(style=style, is_open=False)
  opening, _ = style.reasoning
  special = generator.tokenizer.special_tokens.get(opening)
  end = generator.tokenizer.decode(list(ids[-len(opening) - 2 :])).rstrip()
  is_open = ids[-1] == special or end.endswith(opening)
  return Thought(style=style, is_open=is_open)


def check(options: options_lib.Options, num: int | None) -> options_lib.Spec:
  """Returns the strategy of flags, before weights are read.

  Raises:
    ValueError: a flag is wrong, or would be ignored.
  """
  if num is not None and num > 1:
    raise ValueError(
      f'--n: got {num} with --strategy, expected it alone; the strategy has the'
      ' number of samples'
    )
  spec = options_lib.parsed(options.strategy or 'once')
  is_scored = spec.name in ('best_of_n', 'beam', 'dvts', 'revision')
  if options.reward_model and not is_scored:
    raise ValueError(
      f'--reward_model: got one with the strategy {spec.name}, which scores'
      ' nothing; leave it out'
    )
  if options.budget and budget_lib.parsed(options.budget).money is not None:
    raise ValueError(
      'budget: got money, expected tokens, flops or seconds: only a server has'
      ' prices'
    )
  return spec


def search(
  generator: generate.Generator,
  text: str,
  ids: Sequence[int],
  settings: settings_lib.Settings,
  options: options_lib.Options,
) -> search_lib.Outcome:
  """Returns the outcome of a search for an answer to a prompt.

  Raises:
    ValueError: an option is wrong, or does not fit the model.
  """
  spec = check(options, settings.n)
  spec.check_temperature(settings.temperature)
  spec.check_whole(
    has_constraint=settings.constraint is not None,
    has_cap=options.reasoning_budget is not None,
  )
  begun = thought(generator, ids)
  cap = None
  if options.reasoning_budget is not None:
    cap = begun.cap(options.reasoning_budget)
  scorer = None
  if options.reward_model:
    scorer = _rewarded(options.reward_model)
  strategy = options_lib.made(
    spec,
    tokenizer=generator.tokenizer,
    scorer=scorer,
    markers=begun.style.reasoning,
    is_open=begun.is_open,
    most_reasoning=options.reasoning_budget,
  )
  request = requests_lib.Request(
    prompt_ids=tuple(ids),
    settings=dataclasses.replace(settings, n=1),
    adapter=generator.adapter_digest,
    # Budget forcing ends the reasoning itself.
    thinking=None if spec.name == 'wait' else cap,
  )
  (found,) = drive.run(
    generator.engine,
    strategy,
    [samples_lib.Question(request=request, prompt=text)],
    costs=budget_lib.of_engine(generator.engine, generator.adapter_digest),
    budget=budget_lib.parsed(options.budget)
    if options.budget
    else budget_lib.Budget(),
    read=reading.reader(
      generator.tokenizer, begun.style, is_reasoning=begun.is_open
    ),
  )
  return found


def _rewarded(directory: str) -> scorers.Rewarded:
  manifest = manifest_lib.read(pathlib.Path(directory))
  config = model_config.ModelConfig.from_dict(manifest.model)
  score = rewards.open_scorer(directory)
  return scorers.Rewarded(score, budget_lib.Costs(config))


def told(found: search_lib.Outcome) -> str:
  """Returns the receipt of a search as lines."""
  receipt: receipt_lib.Receipt = found.receipt
  flops = f'{receipt.flops:.4g}'
  if receipt.score_flops:
    flops += f', {receipt.score_flops:.4g} of them of scores'
  times = receipt.flops / receipt.single_flops
  lines = [
    f'search          {receipt.num_samples} samples, ended by'
    f' {found.ended_by}, {receipt.seconds:.2f} s',
    f'tokens          {receipt.prompt_tokens} of the prompt,'
    f' {receipt.reasoning_tokens} of reasoning, {receipt.answer_tokens} of the'
    f' answer, {receipt.discarded_tokens} discarded,'
    f' {receipt.forced_tokens} put in',
    f'FLOPs           {flops}; {times:.1f} times those of the answer at once,'
    f' {receipt.single_flops:.4g}',
    f'KV cache        {receipt.kv_byte_seconds:.4g} byte seconds',
  ]
  for name, values in found.details.items():
    lines.append(f'{name:<16}{_listed(values)}')
  return '\n'.join(lines)


def _listed(values) -> str:
  if not isinstance(values, dict):
    return str(values)
  pairs = list(values.items())
  shown = [
    f'{key}: {value:.4g}' if isinstance(value, float) else f'{key}: {value}'
    for key, value in pairs[:8]
  ]
  return ', '.join(shown) + (', ...' if len(pairs) > 8 else '')
