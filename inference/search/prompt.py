"""Answers one prompt with a strategy, for serve.py --prompt."""

from collections.abc import Sequence
import dataclasses
import json
import pathlib
from typing import Any

from checks import expect
from evals.verifiers import kinds
from frozen import effort_predictor, manifest as manifest_lib
from inference import generate, model_port, rewards
from inference.requests import requests as requests_lib
from inference.sampling import settings as settings_lib
from inference.search import (
  budget as budget_lib,
  drive,
  judging,
  options as options_lib,
  reading,
  receipt as receipt_lib,
  samples as samples_lib,
  scorers,
  search as search_lib,
  thought as thought_lib,
)
from inference.search.routing import (
  efforts as efforts_lib,
  router as router_lib,
)
from models import model_config


def check(
  options: options_lib.Options, num: int | None
) -> list[options_lib.Spec]:
  """Returns the strategies of flags, before weights are read.

  Several, if a predictor chooses among them.

  Raises:
    ValueError: a flag is wrong, or would be ignored.
    OSError: the file of a predictor cannot be read.
  """
  if num is not None and num > 1:
    raise ValueError(
      f'--n: got {num} with --strategy, expected it alone; the strategy has the'
      ' number of samples'
    )
  if options.budget and budget_lib.parsed(options.budget).money is not None:
    raise ValueError(
      'budget: got money, expected tokens, flops or seconds: only a server has'
      ' prices'
    )
  is_auto = options.strategy == efforts_lib.AUTO
  if is_auto != (options.effort_predictor is not None):
    raise ValueError(
      f'--strategy: got {options.strategy} and --effort_predictor='
      f'{options.effort_predictor}, expected auto and the file of a predictor'
      ' together; python -m training.effort makes one'
    )
  if is_auto and options.reasoning_budget is not None:
    raise ValueError(
      f'--reasoning_budget: got {options.reasoning_budget} with'
      ' --strategy=auto, expected none: the chosen effort has it; leave it out'
    )
  if options.effort_predictor:
    predictor = effort_predictor.read(options.effort_predictor)
    specs = [efforts_lib.parsed(name).spec for name in predictor.efforts]
  else:
    specs = [options_lib.parsed(options.strategy or 'once')]
  _check_given(options, specs)
  specs = [_scored(options, spec) for spec in specs]
  _check_scorers(options, specs)
  return specs


def _check_given(
  options: options_lib.Options, specs: Sequence[options_lib.Spec]
) -> None:
  """Refuses a scorer that would be ignored, or that another one replaces."""
  names = 'reward_model', 'scorer'
  flags = [f'--{x}' for x in names if getattr(options, x) is not None]
  own = sorted({spec.scorer for spec in specs if spec.scorer})
  given = [*(f'the strategy with the scorer {x}' for x in own[:1]), *flags]
  if flags and len(given) > 1:
    raise ValueError(
      f'{given[-1]}: got it and {given[0]}, expected one of them'
    )
  if flags and not any(each.is_scored for each in specs):
    raise ValueError(
      f'{flags[0]}: got one with the strategy {options.strategy}, which'
      ' scores nothing; leave it out'
    )
  if options.scorer is not None:
    known = *options_lib.OF_MODEL, *kinds.KINDS
    expect.one_of('--scorer', options.scorer, known)


def _scored(
  options: options_lib.Options, spec: options_lib.Spec
) -> options_lib.Spec:
  """Returns a strategy with the scorer of --scorer, if it scores."""
  if not options.scorer or not spec.is_scored:
    return spec
  return dataclasses.replace(spec, scorer=options.scorer)


def _check_scorers(
  options: options_lib.Options, specs: Sequence[options_lib.Spec]
) -> None:
  """Refuses unknown scorers of strategies, and records that do not suit."""
  known = '', *options_lib.OF_MODEL, *kinds.KINDS
  for spec in specs:
    if spec.scorer not in known:
      raise ValueError(
        f'strategy: got {spec.name} with the scorer'
        f' {expect.shown(spec.scorer)}, expected one of {", ".join(known[1:])}'
      )
  verifiers = [
    kinds.named(spec.scorer) for spec in specs if spec.scorer in kinds.KINDS
  ]
  reading = [each for each in verifiers if each.NEEDS_RECORD]
  if bool(reading) != (options.record is not None):
    names = sorted({spec.scorer for spec in specs if spec.scorer})
    raise ValueError(
      f'--record: got {options.record} with the scorer'
      f' {", ".join(names) or None}, expected a record with a verifier that'
      ' reads one, and none without'
    )
  for each in reading:
    each.check(_record(options))


def _record(options: options_lib.Options) -> dict[str, Any]:
  try:
    found = json.loads(options.record or '{}')
  except ValueError as error:
    raise ValueError(
      f'--record: got {options.record}, expected JSON ({error})'
    ) from None
  if not isinstance(found, dict):
    raise ValueError(f'--record: got {options.record}, expected an object')
  return found


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
  spec, *others = check(options, settings.n)
  budget = budget_lib.Budget()
  if options.budget:
    budget = budget_lib.parsed(options.budget)
  most, chosen = options.reasoning_budget, None
  if options.effort_predictor:
    for each in (spec, *others):
      each.check_temperature(settings.temperature)
    chosen = _chosen(generator, ids, options.effort_predictor, budget)
    spec = _scored(options, chosen.effort.spec)
    most = chosen.effort.most_reasoning
  spec.check_temperature(settings.temperature)
  spec.check_whole(
    has_constraint=settings.constraint is not None, has_cap=most is not None
  )
  begun = thought_lib.begun(generator, ids)
  cap = None if most is None else begun.cap(most)
  scorer = _scorer(generator, options, spec)
  strategy = options_lib.made(
    spec,
    tokenizer=generator.tokenizer,
    scorer=scorer,
    markers=begun.style.reasoning,
    is_open=begun.is_open,
    most_reasoning=most,
  )
  request = requests_lib.Request(
    prompt_ids=tuple(ids),
    settings=dataclasses.replace(settings, n=1),
    adapter=generator.adapter_digest,
    # Budget forcing ends the reasoning itself.
    thinking=None if spec.name == 'wait' else cap,
  )
  question = samples_lib.Question(
    request=request,
    prompt=text,
    record=_record(options),
    before=(chosen.prefill,) if chosen else (),
  )
  (found,) = drive.run(
    generator.engine,
    strategy,
    [question],
    costs=budget_lib.of_engine(generator.engine, generator.adapter_digest),
    budget=budget,
    read=reading.reader(
      generator.tokenizer, begun.style, is_reasoning=begun.is_open
    ),
  )
  if chosen is None:
    return found
  return dataclasses.replace(found, details=chosen.told() | {**found.details})


def _chosen(
  generator: generate.Generator,
  ids: Sequence[int],
  path: str,
  budget: budget_lib.Budget,
) -> router_lib.Decision:
  """Returns the effort that a predictor of this model expects to be right."""
  digest = generator.adapter_digest or generator.frozen.manifest.weights_digest
  router = router_lib.Router.open(path, digest)
  request = router.request(ids, adapter=generator.adapter_digest)
  ((prefill,),) = model_port.answer_all(generator.engine, [request])
  left = None
  if budget.flops is not None:
    left = max(budget.flops - prefill.usage.flops, 0.0)
  return router.decide(prefill, most=left)


def _scorer(
  generator: generate.Generator,
  options: options_lib.Options,
  spec: options_lib.Spec,
) -> samples_lib.Scorer | None:
  """Returns the scorer of a strategy; None: its default."""
  is_vote = spec.name == 'self_consistency'
  if directory := options.reward_model:
    manifest = manifest_lib.read(pathlib.Path(directory))
    config = model_config.ModelConfig.from_dict(manifest.model)
    score = rewards.open_scorer(directory)
    link = judging.sigmoid if is_vote else float
    return scorers.Rewarded(score, budget_lib.Costs(config), link)
  if spec.scorer == options_lib.SELF:
    costs = budget_lib.of_engine(generator.engine, generator.adapter_digest)
    return judging.self_verified(generator, costs=costs)
  if spec.scorer == options_lib.LIKELIHOOD:
    return scorers.MeanLogprob()
  if spec.scorer:
    return scorers.Verified(kinds.named(spec.scorer))
  return None


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
