"""Answers of a random model under fifty JSON schemas; time of their masks.

    python -m benchmarks.constrained_answers --samples=1000

A model of random weights draws random letters, so an answer can be valid only
because of its grammar. `jsonschema`, which shares no code with the grammars,
checks each answer. Masks are timed again afterwards, one by one, with the
sampled tokens, and those of random answers in a vocabulary of 128,256 ids
(`large_vocabulary`). Then the time per step of a batch with half constrained
and half free answers is compared with the same batch without constraints. A
dispatch has one step in the one and many in the other, so a tiny model is bound
by the host: --layers and --width make a model whose steps take longer.
"""

from collections.abc import Iterator, Sequence
import json
import time
from typing import Any

from absl import app, flags
import jsonschema
import numpy as np

from benchmarks.common import (
  entry,
  json_schemas,
  large_vocabulary,
  random_model,
)
from checks import expect
from inference.constraints import constraint as constraint_lib, grammars
from inference.engine import engine as engine_lib, engine_config
from inference.requests import requests
from inference.sampling import settings as settings_lib
from models import model_config
from text import tokenizer as tokenizer_lib

_SEQUENCES, _TOKENS = 32, 600  # answers at once; the most tokens of an answer
_FREE_TOKENS = 100


def engine_of(
  num_sequences: int = _SEQUENCES, *, layers: int = 1, width: int = 32
) -> engine_lib.Engine:
  """Returns an engine with a model of random weights, and of bytes.

  Args:
    num_sequences: that run at once.
    layers: of the model.
    width: of the model.

  Raises:
    ValueError: the width is no multiple of 32.
  """
  expect.multiple_of('--width', width, '', 32)
  tokenizer = tokenizer_lib.ByteTokenizer()
  model = model_config.ModelConfig(
    vocab_size=tokenizer.vocab_size,
    num_layers=layers,
    model_width=width,
    num_heads=width // 32,
    num_kv_heads=width // 32,
    head_width=32,
    mlp_width=width if width == 32 else 4 * width,
    max_length=_TOKENS + 16,
  )
  return engine_lib.Engine(
    model,
    random_model.params(model),
    tokenizer=tokenizer,
    weights_digest='',
    config=engine_config.EngineConfig(
      max_sequences=num_sequences,
      decode_shapes=(num_sequences,),
      max_chunks=1,
      max_mixed_chunks=1,
    ),
  )


def request(constraint: Any, seed: int, **settings: Any) -> requests.Request:
  """Returns a request for one answer."""
  return requests.Request(
    prompt_ids=(97,),
    settings=settings_lib.Settings(
      constraint=constraint, seed=seed, **{'max_tokens': _TOKENS, **settings}
    ),
  )


def answers(
  engine: engine_lib.Engine, schemas: Sequence[Any], num: int
) -> Iterator[tuple[Any, requests.Completion]]:
  """Yields schemas with answers, each schema as often as the others."""
  asked = [schemas[number % len(schemas)] for number in range(num)]
  found = engine.answer(
    [
      request(constraint_lib.json_schema(schema), seed)
      for seed, schema in enumerate(asked)
    ]
  )
  for which, update in found:
    if update.completion:
      yield asked[which], update.completion


def fault(schema: Any, completion: requests.Completion) -> str:
  """Returns why an answer is invalid; '' if it is valid or cut by length."""
  if completion.finish_reason == 'length':
    return ''
  if completion.finish_reason != 'stop':
    return completion.failure or completion.finish_reason
  try:
    value = json.loads(completion.text)
    jsonschema.Draft202012Validator(schema).validate(value)
  except (ValueError, jsonschema.ValidationError) as error:
    return f'{completion.text!r}: {str(error).splitlines()[0]}'
  return ''


def mask_ms(
  found: grammars.Grammars,
  vocab_size: int,
  schema: Any,
  token_ids: Sequence[int],
) -> list[float]:
  """Returns the milliseconds of processor time of each mask."""
  matcher = found.compile(constraint_lib.json_schema(schema)).matcher()
  bits_W = np.zeros(-(-vocab_size // 32), np.uint32)
  times = []
  for token in token_ids:
    start = time.thread_time()  # other processes do not count
    matcher.fill(bits_W)
    times.append(1e3 * (time.thread_time() - start))
    matcher.push(token)
  return times


def large(
  samples: int, vocab_size: int = 128_256, most_tokens: int = 60
) -> dict[str, Any]:
  """Returns the figures of masks of a large vocabulary, in random answers.

  Args:
    samples: answers under each schema.
    vocab_size: V, of a vocabulary that is made.
    most_tokens: of an answer.
  """
  # Of a tokenizer, it has the parts that grammars read.
  vocabulary: Any = large_vocabulary.Vocabulary(vocab_size)
  found, rng = grammars.Grammars(vocabulary), np.random.default_rng(0)
  bits_W = np.zeros(-(-vocab_size // 32), np.uint32)
  masks, pushes = [], []
  for schema in json_schemas.ALL * samples:
    matcher = found.compile(constraint_lib.json_schema(schema)).matcher()
    token = -1
    for _ in range(most_tokens):
      start = time.thread_time()
      matcher.fill(bits_W)
      masks.append(1e3 * (time.thread_time() - start))
      if matcher.failure:
        raise ValueError(f'got {matcher.failure}, expected a next token')
      bits_V = np.unpackbits(bits_W.view(np.uint8), bitorder='little')
      token = int(rng.choice(np.flatnonzero(bits_V)))
      if token == vocabulary.eos_id:
        break
      start = time.thread_time()
      matcher.push(token)
      pushes.append(1e3 * (time.thread_time() - start))
  return {
    'name': 'large_vocabulary',
    'ids': vocab_size,
    'masks': len(masks),
    **{
      f'{name}_p{share}_ms': float(np.percentile(times, share))
      for name, times in (('mask', masks), ('push', pushes))
      for share in (50, 99, 100)
    },
  }


def mixed_ms(engine: engine_lib.Engine, *, is_constrained: bool) -> float:
  """Returns the median ms of a step; half of the batch may be constrained."""
  constraint = constraint_lib.regex('[a-z]*') if is_constrained else None
  for seed in range(engine.config.max_sequences):
    given = constraint if seed % 2 else None
    free = {'max_tokens': _FREE_TOKENS, 'ignore_eos': given is None}
    engine.submit(request(given, seed, **free))
  times = []
  while engine.has_work:
    before = engine.metrics.value('engine_steps_total')
    start = time.perf_counter()
    engine.step()
    steps = engine.metrics.value('engine_steps_total') - before
    if steps:
      times.append(1e3 * (time.perf_counter() - start) / steps)
  return float(np.median(times))


def sampled(samples: int) -> dict[str, Any]:
  """Returns the figures of `samples` answers."""
  engine = engine_of()
  made = list(answers(engine, json_schemas.ALL, samples))
  faults = [why for each in made if (why := fault(*each))]
  found, size = grammars.Grammars(engine.tokenizer), engine.tokenizer.vocab_size
  times = [
    each
    for schema, completion in made
    for each in mask_ms(found, size, schema, completion.token_ids)
  ]
  return {
    'name': 'constrained_answers',
    'schemas': len(json_schemas.ALL),
    'answers': len(made),
    'ended': sum(each.finish_reason == 'stop' for _, each in made),
    'faults': faults,
    'masks': len(times),
    'mask_p50_ms': float(np.percentile(times, 50)),
    'mask_p99_ms': float(np.percentile(times, 99)),
    'mask_max_ms': max(times),
  }


def beside(rounds: int, layers: int = 1, width: int = 32) -> dict[str, Any]:
  """Returns the ms per step of a batch, half of it constrained, and free."""
  engine = engine_of(layers=layers, width=width)
  ways = (True, False)
  for is_constrained in ways:
    mixed_ms(engine, is_constrained=is_constrained)  # compiles
  found = {way: [] for way in ways}
  for _ in range(rounds):
    for way in ways:
      found[way].append(mixed_ms(engine, is_constrained=way))
  held, free = (float(np.median(found[way])) for way in ways)
  return {
    'name': 'constrained_beside_free',
    'half_constrained_ms': held,
    'free_ms': free,
    'ratio': held / free,
  }


def report(result: dict[str, Any]) -> str:
  """Returns a result as one line, and its faults."""
  if result['name'] == 'constrained_beside_free':
    return (
      f'step of {_SEQUENCES} sequences: {result["half_constrained_ms"]:.2f} ms'
      f' with half of them constrained, {result["free_ms"]:.2f} ms without,'
      f' ratio {result["ratio"]:.2f}'
    )
  if result['name'] == 'large_vocabulary':
    parts = [
      f'{name} p50 {result[f"{name}_p50_ms"]:.3f}, p99'
      f' {result[f"{name}_p99_ms"]:.3f}, max {result[f"{name}_p100_ms"]:.1f} ms'
      for name in ('mask', 'push')
    ]
    return f'{result["masks"]:,} masks, {result["ids"]:,} ids: ' + '; '.join(
      parts
    )
  line = (
    f'{result["answers"]} answers of {result["schemas"]} schemas:'
    f' {result["ended"]} ended, {len(result["faults"])} not valid;'
    f' {result["masks"]:,} masks: p50 {result["mask_p50_ms"]:.3f} ms, p99'
    f' {result["mask_p99_ms"]:.3f} ms, max {result["mask_max_ms"]:.1f} ms'
  )
  return '\n'.join([line, *result['faults']])


def measure(args: Any) -> Iterator[entry.Result]:
  """Yields the figures of answers, then the figures of a batch."""
  yield sampled(args.samples)
  yield large(args.rounds)
  yield beside(args.rounds, args.layers, args.width)


def main(argv: list[str]) -> None:
  """Measures and reports."""
  del argv
  entry.run(measure, report, is_list=True)


if __name__ == '__main__':
  entry.define_flags(rounds=3)
  flags.DEFINE_integer('layers', 1, 'Layers of the model of the batch.', 1)
  flags.DEFINE_integer('width', 32, 'Its width, a multiple of 32.', 32)
  flags.DEFINE_integer('samples', 1000, 'Answers that are drawn.', 1)
  app.run(main)
