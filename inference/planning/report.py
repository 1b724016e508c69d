"""The text of a plan of serving, one figure per line."""

from collections.abc import Iterator
import dataclasses

from frozen import stored_kernels
from hardware import compile_ahead
from inference import drafts
from inference.planning import plan as plan_lib

_Lines = Iterator[tuple[str, str]]
_APART_SEQUENCES = 64  # answers of a step, beside which prompts are considered
_LONGER = 1.1  # times as long is a delay worth devices of its own


def report(plan: plan_lib.Plan) -> str:
  """Returns the plan as text, one line per figure."""
  lines = [
    *_model_lines(plan),
    *_degree_lines(plan),
    *_device_lines(plan),
    *_speed_lines(plan),
    *_apart_lines(plan),
    *_compiled_lines(plan),
  ]
  return '\n'.join(f'{name:<16} {text}'.rstrip() for name, text in lines)


def _model_lines(plan: plan_lib.Plan) -> _Lines:
  subject, limit = plan.subject, plan.peaks.memory_bytes
  yield (
    'model',
    f'{subject.name}, {subject.num_params:,} parameters, {plan.dtype}',
  )
  yield (
    'device',
    f'{plan.device_kind} ({plan.target}), one of them:'
    f' {compile_ahead.size(limit) if limit else "unknown"} of memory,'
    f' {plan.peaks.bytes_per_s / 1e9:.4g} GB/s ({plan.peaks.source})',
  )
  if plan.saved_bytes:
    yield (
      'stored',
      stored_kernels.summary(subject.quantization, subject.shapes()),
    )


def _degree_lines(plan: plan_lib.Plan) -> _Lines:
  """Yields how many devices may share the model, and what that gives."""
  if plan.target == 'here' or not plan.peaks.memory_bytes:
    return
  length = plan.config.max_length
  if plan.num_devices > 1:
    yield 'shared by', f'of {plan.num_devices} devices, --engine.tensor='
  for each in plan_lib.degrees(plan) if plan.num_devices > 1 else ():
    weights = compile_ahead.size(each.weight_bytes)
    count = each.num_sequences(length)
    rates = (
      f'{count:,} sequences of {length} each, at best'
      f' {each.tokens_per_s(1, length / 2):,.4g} tokens/s alone,'
      f' {each.rate:,.4g} all together'
      if count
      else f'NO: not the weights and a sequence of {length}'
    )
    name = f'  {each.tensor}' + ' *' * (each.tensor == plan.tensor)
    yield name, f'{each.num_replicas} x {weights} per device, {rates}'
  found = plan_lib.smallest(plan)
  if found:
    name, least = found
    yield (
      'smallest',
      f'{name} with --engine.tensor={least.tensor} holds the weights and'
      f' {least.num_sequences(length):,} sequences of {length}, by the formula',
    )
  elif plan.slices:
    yield 'smallest', 'none: no slice of this generation holds the model'


def _device_lines(plan: plan_lib.Plan) -> _Lines:
  limit = plan.peaks.memory_bytes
  share = f', {plan.weight_bytes / limit:.0%} of the memory' if limit else ''
  shared = f'; {plan.tensor} devices share them' if plan.tensor > 1 else ''
  yield 'weights', f'{compile_ahead.size(plan.weight_bytes)}{share}{shared}'
  if plan.num_adapters:
    yield (
      'adapters',
      f'{compile_ahead.size(plan.adapter_bytes)} for {plan.num_adapters} of'
      f' rank {plan.adapter_rank}{shared}',
    )
  if kind := plan.drafting.kind:
    drafting = plan.drafting.num_bytes(plan.part.vocab_size)
    each = ', on each device' if plan.tensor > 1 else ''
    yield (
      'drafts',
      f'{compile_ahead.size(drafting)} of a draft {kind}, and'
      f' {compile_ahead.size(plan.drafting.bytes_per_token)} per token{each};'
      ' speeds are those without drafts',
    )
  yield (
    'cache',
    f'{compile_ahead.size(plan.kv_bytes_per_token)} per token{shared}',
  )
  if limit and plan.num_sequences(1) == 0:
    larger = 'take a larger device'
    if plan.slices:
      larger = 'take larger devices, or more that share the model'
    yield 'fits', f'NO: not the weights and one token; {larger}'
  elif limit:
    yield (
      'sequences',
      ', '.join(
        f'{plan.num_sequences(length):,} of {length}'
        for length in _lengths(plan)
      )
      + ' tokens fit',
    )


def _lengths(plan: plan_lib.Plan) -> list[int]:
  """Returns the lengths to report: a quarter, half and all of the context."""
  longest = plan.config.max_length
  return [length for length in (longest // 4, longest // 2, longest) if length]


def _speed_lines(plan: plan_lib.Plan) -> _Lines:
  context = plan.config.max_length / 2
  yield 'decode', f'at best, {context:g} tokens of context in each sequence'
  batches = {1: 'alone'}
  most = plan.num_sequences(plan.config.max_length)
  if most > 1:
    batches[most] = 'all that fit'
  for batch, name in batches.items():
    yield (
      '',
      f'{plan.tokens_per_s(batch, context):,.4g} tokens/s with'
      f' {batch:,} ({name})',
    )
  if plan.num_replicas > 1 and most:
    yield (
      '',
      f'{plan.rate:,.4g} tokens/s of {plan.num_replicas} replicas together',
    )
  for told, tokens in (('that context', context), ('an empty one', 0)):
    bound = plan.compute_bound_batch(tokens)
    text = 'never' if bound is None else f'from {bound:,} sequences on'
    yield '', f'compute-bound {text}, at {told}'


def _apart_lines(plan: plan_lib.Plan) -> _Lines:
  """Yields when prompts are better computed on devices of their own."""
  length = plan.config.max_length
  batch = min(plan.num_sequences(length), _APART_SEQUENCES)
  if plan.num_replicas < 2 or not batch:
    return
  context = length / 2
  seconds = plan.step_seconds(batch, context)
  beside = plan.least_prompts(batch, context, _LONGER) / batch
  computed = plan.prompt_tokens_per_s(length)
  answers = plan.tokens_per_s(batch, context)
  yield (
    'prefill apart',
    f'a step of {batch} answers takes {1e3 * seconds:.3g} ms at best; beside'
    f' {beside:.3g} prompt tokens for each of them it takes {_LONGER} times as'
    ' long',
  )
  yield (
    '',
    'with more prompt tokens, --engine.prefill_engines=1 keeps that time: it'
    f' computes {computed:,.4g} prompt tokens/s, there those of'
    f' {computed / answers / beside:.2g} engines with answers, and sends'
    f' {compile_ahead.size(plan.tensor * plan.kv_bytes_per_token)} of pages per'
    ' token',
  )


def _compiled_lines(plan: plan_lib.Plan) -> _Lines:
  compiled = plan.compiled
  if compiled is None:
    return
  count, length = plan.compiled_sequences, plan.config.max_length
  # A decode step has no arrays of drafts.
  alone = dataclasses.replace(plan, drafting=drafts.Memory())
  formula = alone.bytes_of(count, length)
  told = f'{count} sequences of {length}: '
  if isinstance(compiled, compile_ahead.OutOfMemory):
    needed = compile_ahead.size(compiled.needed) if compiled.needed else 'more'
    available = compile_ahead.size(
      compiled.available or plan.peaks.memory_bytes
    )
    yield 'compiler', f'{told}needs {needed} of {available}: DOES NOT FIT'
    return
  temporaries = compile_ahead.size(compiled.temporaries)
  yield (
    'compiler',
    f'{told}{compile_ahead.size(compiled.in_use)} at its peak (formula'
    f' {compile_ahead.size(formula)}, {formula / compiled.in_use:.1%});'
    f' arguments {compile_ahead.size(compiled.arguments)},'
    f' temporaries {temporaries},'
    f' {compile_ahead.size(compiled.aliased)} updated in place',
  )
  if plan.tensor == 1:
    return
  # The step is a loop whose turns the device decides, so it is counted once.
  for kind, (number, sent) in sorted(compiled.traffic.by_kind().items()):
    yield (
      f'  {kind}',
      f'{number:,} per step, {compile_ahead.size(sent)} sent by a device',
    )
  yield (
    '  predicted',
    f'{plan.sums_per_step} sums of the stream{_across_text(plan)},'
    f' {compile_ahead.size(plan.sent_bytes(count))} sent; the others are of'
    ' the sampler',
  )
  largest = max(each.payload_bytes for each in compiled.traffic.collectives)
  yield (
    '  largest message',
    f'{compile_ahead.size(largest)}, states of a step:'
    f' {"no weight is sent" if plan.sends_no_weight else "WEIGHTS ARE SENT"}',
  )


def _across_text(plan: plan_lib.Plan) -> str:
  """Returns how many kernels send other arrays than a sum; '' for none."""
  num = len(plan.across)
  return f', inputs and outputs of {num} stored kernels' if num else ''
