"""Decoding with drafts, beside decoding without.

    python -m benchmarks.speculation --model=runs/SmolLM2-135M-Instruct
    python -m benchmarks.speculation --model=runs/large --draft_model=runs/small
    python -m benchmarks.speculation --model=runs/large \
      --draft_head=runs/head/frozen --questions=questions.jsonl

Drafts are looked up in the prompt, or made by a draft model or a draft head.

Two engines of one frozen directory answer the same requests in turns. Their
tokens are compared: drafts change the time; tokens change only by rounding, and
not at all with --numerics=invariant. Traces:

    edit    greedy; the prompt is a passage three times, which the answer
            repeats, as an editor's request to change a word does
    free    temperature 1 behind a short prompt: there is little to look up
    mixed   half of the batch of each
    asked   with --questions: greedy answers to questions of a file, each as a
            server would render it (data/examples/prompts.py has the shapes);
            answers of a few tokens say nothing about a rate

A rate counts the tokens after the first one of all sequences. Goals: at least
1.5 times as fast on `edit` with look-ups, 1.3 times on `asked` with a head and
one sequence, and never below 0.97.
"""

from collections.abc import Iterator, Sequence
import time
from typing import Any, NamedTuple

from absl import app, flags

from benchmarks.common import entry, timing
from checks import path_flags
from data import data_config, sources
from data.examples import prompts
from frozen import format as frozen_format
from inference import generate
from inference.engine import engine as engine_lib, engine_config
from inference.requests import requests
from inference.sampling import settings as settings_lib

GOALS = {'edit': 1.5, 'free': 0.97, 'mixed': 0.97}
_LEAST_GOAL = 0.97
_HEAD_GOAL = 1.3  # on `asked`, one sequence
_ASKED = 'asked'
_PASSAGE = (
  'The quick brown fox jumps over the lazy dog. The small grey cat sleeps under'
  ' the old table. A tall man walks along the river with two brown dogs. '
)
_ROOM = 512  # context beyond the new tokens; holds the longest prompt


class Answers(NamedTuple):
  """The answers of one turn."""

  rate: float  # tokens per second after the first one
  token_ids: list[tuple[int, ...]]
  accepted: int  # drafted tokens
  rejected: int
  verified: int  # drafts


def engine_of(
  args: Any, batch_size: int, speculation: str
) -> engine_lib.Engine:
  """Returns an engine for one batch size, with one kind of drafts."""
  context = frozen_format.read_config(args.model).max_length
  config = engine_config.EngineConfig(
    max_sequences=batch_size,
    decode_shapes=(batch_size,),
    chunk_tokens=128,
    max_chunks=1,
    max_mixed_chunks=1,
    max_length=min(_ROOM + args.tokens, context),
    numerics=args.numerics,
    speculation=speculation,
    draft_model=args.draft_model if speculation == 'model' else '',
    draft_head=args.draft_head if speculation == 'head' else '',
  )
  return generate.load(args.model, config).engine


def requests_of(
  trace: str,
  tokenizer: Any,
  batch_size: int,
  new_tokens: int,
  seed: int,
  questions: Sequence[tuple[int, ...]] = (),
) -> list[requests.Request]:
  """Returns the requests of a trace; questions are those of `asked`."""

  def request(number: int) -> requests.Request:
    is_asked = trace == _ASKED
    is_edit = trace == 'edit' or (trace == 'mixed' and number % 2 == 0)
    if is_asked:
      ids = questions[(seed * batch_size + number) % len(questions)]
    else:
      text = _PASSAGE * 3 if is_edit else f'Story {number} begins like this:'
      ids = tuple(tokenizer.encode(text))
    return requests.Request(
      prompt_ids=ids,
      settings=settings_lib.Settings(
        temperature=0.0 if is_edit or is_asked else 1.0,
        max_tokens=new_tokens,
        seed=1000 * seed + number,
        # The text behind the end of an answer would be of no use to anybody.
        ignore_eos=not is_asked,
      ),
    )

  return [request(number) for number in range(batch_size)]


def questions_of(args: Any, engine: engine_lib.Engine) -> list[Any]:
  """Returns the prompts of --questions as token ids; [] without a file.

  Raises:
    ValueError: a record has no question, or all of them are too long.
  """
  if not args.questions:
    return []
  found = prompts.open_prompts(
    sources.jsonl(args.questions, text_key=None),
    engine.tokenizer,
    frozen_format.read_chat_template(args.model),
    name='--questions',
    most_tokens=engine.context - args.tokens,
    too_long=data_config.DROP,
  )
  return [each.ids for each in found.prompts]


def answer(
  engine: engine_lib.Engine, asked: Sequence[requests.Request]
) -> Answers:
  """Answers requests that begin together."""
  engine.manager.clear()  # no prompt is known from the turn before
  value = engine.metrics.value
  before = value('speculation_verified_spans_total')
  start, found = 0.0, {}
  for which, update in engine.answer(asked):
    start = start or time.perf_counter()
    if update.completion:
      found[which] = update.completion
  seconds = time.perf_counter() - start
  made = [found[which] for which in sorted(found)]
  return Answers(
    sum(len(each.token_ids) - 1 for each in made) / seconds,
    [each.token_ids for each in made],
    sum(each.usage.accepted_tokens for each in made),
    sum(each.usage.rejected_tokens for each in made),
    int(value('speculation_verified_spans_total') - before),
  )


def compared(
  trace: str,
  engines: dict[str, engine_lib.Engine],
  batch_size: int,
  args: Any,
  questions: Sequence[tuple[int, ...]] = (),
) -> entry.Result:
  """Returns the figures of one trace.

  Raises:
    ValueError: drafts have changed a token of invariant numerics.
  """
  found: dict[str, list[Answers]] = {name: [] for name in engines}

  def turn(name: str) -> float:
    engine = engines[name]
    made = answer(
      engine,
      requests_of(
        trace,
        engine.tokenizer,
        batch_size,
        args.tokens,
        len(found[name]),
        questions,
      ),
    )
    found[name].append(made)
    return 1 / made.rate

  # The first round measures the programs, which decides about later drafts.
  seconds = timing.interleave(
    {name: lambda name=name: turn(name) for name in engines}, args.rounds + 1
  )
  kind = _kind(args)
  equal = [
    one == other
    for plain, drafted in zip(found['plain'], found[kind], strict=True)
    for one, other in zip(plain.token_ids, drafted.token_ids, strict=True)
  ]
  if args.numerics == 'invariant' and not all(equal):
    raise ValueError(f'{trace}: got other tokens with drafts, expected equal')
  made = found[kind][1:]
  accepted, rejected, verified = (
    sum(getattr(each, name) for each in made)
    for name in ('accepted', 'rejected', 'verified')
  )
  return {
    'trace': trace,
    'batch_size': batch_size,
    'plain_rate': 1 / sorted(seconds['plain'][1:])[args.rounds // 2],
    'ratio': timing.median_ratio(seconds['plain'][1:], seconds[kind][1:]),
    'goal': _goal(trace, kind, batch_size),
    'equal': sum(equal),
    'answers': len(equal),
    'accepted': accepted,
    'rejected': rejected,
    'verified': verified,
    'tokens_per_verification': 1 + accepted / verified if verified else 0.0,
  }


def _kind(args: Any) -> str:
  """Returns the kind of speculation that is measured."""
  if args.draft_head:
    return 'head'
  return 'model' if args.draft_model else 'ngram'


def _goal(trace: str, kind: str, batch_size: int) -> float:
  """Returns the ratio to reach."""
  if kind == 'head' and trace == _ASKED and batch_size == 1:
    return _HEAD_GOAL
  return GOALS.get(trace, _LEAST_GOAL) if kind == 'ngram' else _LEAST_GOAL


def measure(args: Any) -> Iterator[entry.Result]:
  """Yields the figures of each batch size and trace."""
  if not args.model:
    raise ValueError('--model: got none, expected a frozen directory')
  if _ASKED in args.traces and not args.questions:
    raise ValueError(
      '--traces: got asked without --questions, expected a file of questions;'
      ' give one, or leave out the trace'
    )
  for batch_size in map(int, args.batches):
    engines = {
      'plain': engine_of(args, batch_size, 'off'),
      _kind(args): engine_of(args, batch_size, _kind(args)),
    }
    questions = questions_of(args, engines['plain'])
    for trace in args.traces or (*GOALS, *[_ASKED] * bool(questions)):
      if trace != 'mixed' or batch_size > 1:
        yield compared(trace, engines, batch_size, args, questions)


def report(result: entry.Result) -> str:
  """Returns the figures of one trace as a line."""
  return (
    f'{result["trace"]:>5}, batch {result["batch_size"]}:'
    f' {result["ratio"]:.2f} x (goal {result["goal"]}) of'
    f' {result["plain_rate"]:.1f} tokens/s; {result["accepted"]} drafted tokens'
    f' accepted, {result["rejected"]} rejected;'
    f' {result["tokens_per_verification"]:.2f} tokens per verification;'
    f' {result["equal"]} of {result["answers"]} answers are equal'
  )


def main(argv: list[str]) -> None:
  """Measures and reports."""
  del argv
  entry.run(measure, report, is_list=True)


if __name__ == '__main__':
  entry.define_flags(rounds=5)
  path_flags.DEFINE_path('model', '', 'The frozen directory that answers.')
  path_flags.DEFINE_path(
    'draft_model',
    '',
    'Frozen directory of a draft model, in place of look-ups.',
  )
  path_flags.DEFINE_path(
    'draft_head', '', 'Directory of a draft head, in place of look-ups.'
  )
  path_flags.DEFINE_path(
    'questions',
    '',
    'JSON Lines with a prompt, a question or messages each; adds the trace'
    ' asked.',
  )
  flags.DEFINE_multi_enum(
    'traces',
    [],
    [*GOALS, _ASKED],
    'Traces to measure, one per flag; none: all of them.',
  )
  flags.DEFINE_list('batches', ['1'], 'Sequences that decode at once.')
  flags.DEFINE_enum(
    'numerics', 'fast', engine_config.NUMERICS, 'Numerics of both engines.'
  )
  flags.DEFINE_integer('tokens', 60, 'Tokens of each answer.', 2)
  app.run(main)
