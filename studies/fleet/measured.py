"""Is the simulator right? An engine on this machine against its prediction.

    python -m studies.fleet.measured --model=DIR --requests=60

The engine answers a calibration, from which a table of costs follows: seconds
by shape of a step and by decode steps. Then it answers other traffic, and the
simulator predicts it from the table. Printed are both, and how far apart.

The clock runs while the engine steps: a request arrives when the clock has
reached its second, and the clock jumps to the next arrival while the engine is
idle. With --clock=cpu it is the CPU time of this process, so that other work on
the machine counts little. But a step that computes on several cores ends before
their CPU time has passed, so steps of less than some milliseconds are mixed up.
"""

from collections.abc import Callable, Sequence
import dataclasses
import gc
import time

from absl import app, flags

from checks import expect, path_flags
from hardware import targets
from inference import generate
from inference.engine import engine as engine_lib, engine_config
from inference.requests import requests as requests_lib
from inference.sampling import settings as settings_lib
from inference.scheduling import spans
from studies.fleet import costs as costs_lib, fleet, replica, traffic

CLOCKS = {'wall': time.perf_counter, 'cpu': time.process_time}
_COLUMNS = (
  'tokens_per_s', 'to_last_mean', 'to_first_p50', 'to_first_p99',
  'per_token_p50', 'per_token_p99', 'cached',
)  # fmt: skip


@dataclasses.dataclass(kw_only=True)
class Run:
  """An engine's answers, and the seconds of its steps by kind."""

  answers: list[replica.Answer]
  calls: list[costs_lib.Call]


def answered(
  engine: engine_lib.Engine,
  requests: Sequence[traffic.Request],
  read: Callable[[], float] = time.perf_counter,
) -> Run:
  """Returns the answers of an engine to traffic.

  Args:
    engine: without work.
    requests: in the order of their arrival.
    read: the clock, in seconds.
  """
  run = Run(answers=[], calls=[])
  shapes = engine.config.step_shapes()
  begun: list[spans.Step] = []
  begin = engine.manager.begin

  def noted(plan, **how):
    begun.append(begin(plan, **how))
    return begun[-1]

  engine.manager.begin = noted  # the only place that sees every step
  clock, open_by_id, pending = 0.0, {}, list(requests)
  in_flight: spans.Step | None = None
  try:
    while pending or engine.has_work:
      if not engine.has_work:
        clock = max(clock, pending[0].arrival)
      while pending and pending[0].arrival <= clock:
        request = pending.pop(0)
        answer = replica.Answer(request=request, replica=0)
        open_by_id[engine.submit(_asked(engine, request))] = answer
        run.answers.append(answer)
      begun.clear()
      start = read()
      updates = engine.step()
      seconds = read() - start
      clock += seconds
      for update in updates:
        _note(open_by_id[update.request_id], update, clock)
      sent = begun[0] if begun else None
      landed = costs_lib.kind_of(in_flight, shapes) if in_flight else None
      run.calls.append(costs_lib.Call(sent, landed, seconds))
      in_flight = sent if sent and sent.spans else None
  finally:
    del engine.manager.begin
  return run


def _asked(engine: engine_lib.Engine, request: traffic.Request):
  size = engine.tokenizer.vocab_size
  return requests_lib.Request(
    prompt_ids=tuple(each % size for each in request.prompt),
    # As long as the traffic says: no token ends it before.
    settings=settings_lib.Settings(
      temperature=0.0, max_tokens=request.num_new, min_tokens=request.num_new
    ),
  )


def _note(answer: replica.Answer, update, now: float) -> None:
  if update.token_ids or update.completion:
    answer.first = answer.first or now
    answer.last = now
  if update.completion:
    answer.num_made = len(update.completion.token_ids)
    answer.num_cached = update.completion.usage.cached_tokens


def predicted(
  engine: engine_lib.Engine,
  costs: costs_lib.Measured,
  requests: Sequence[traffic.Request],
) -> list[replica.Answer]:
  """Returns the simulator's answers to the same traffic."""
  size = engine.tokenizer.vocab_size
  asked = [
    dataclasses.replace(
      each,
      prompt=tuple(token % size for token in each.prompt),
      most_new=each.num_new,  # the scheduler knows when it ends
    )
    for each in requests
  ]
  settings = replica.Settings(
    limits=engine.config.limits(engine.page_tokens),
    num_pages=engine.manager.tables.allocator.num_usable + 1,
    decode_steps=costs.most_steps,
    is_serial=True,
  )
  return fleet.simulate([replica.Replica(settings, costs)], asked)


def compared(
  engine: engine_lib.Engine,
  calibration: Sequence[traffic.Request],
  requests: Sequence[traffic.Request],
  read: Callable[[], float] = time.perf_counter,
) -> tuple[fleet.Summary, fleet.Summary]:
  """Returns the speed of an engine, and what the simulator says of it.

  The machine may become faster or slower meanwhile: the calibration is answered
  before and after the requests, and both count.
  """
  shapes = engine.config.step_shapes()
  # The first calls of a program take longer.
  answered(engine, calibration[:8], read)
  runs = []
  for each in (calibration, requests, calibration):
    engine.manager.clear()
    runs.append(answered(engine, each, read))
  measured = costs_lib.fitted([*runs[0].calls, *runs[2].calls], shapes)
  real = fleet.summary(runs[1].answers, ())
  return real, fleet.summary(predicted(engine, measured, requests), ())


def table(real: fleet.Summary, said: fleet.Summary) -> str:
  """Returns measured and predicted values, side by side."""
  lines = ['| | measured | predicted | off by |', '| --- | --- | --- | --- |']
  for name in _COLUMNS:
    measured, predicted = getattr(real, name), getattr(said, name)
    off = f'{predicted / measured - 1:+.1%}' if measured else '-'
    lines.append(f'| {name} | {measured:.4g} | {predicted:.4g} | {off} |')
  return '\n'.join(lines)


def _rates(given: Sequence[str]) -> list[float]:
  try:
    return [float(each) for each in given]
  except ValueError:
    raise ValueError(
      f'--rates: got {",".join(given)}, expected numbers, as 20,1000'
    ) from None


def main(argv: list[str]) -> None:
  """Measures, predicts, and prints both."""
  if len(argv) > 1:
    raise app.UsageError(f'got unknown arguments {argv[1:]}, expected flags')
  values = flags.FLAGS
  try:
    expect.at_least('--requests', values.requests, 8)
    rates = _rates(values.rates)
    config = engine_config.EngineConfig(
      max_sequences=8, decode_shapes=(2, 8), page_size=16, chunk_tokens=32,
      max_chunks=2, max_mixed_chunks=1, stream_seconds=0,
      max_length=values.max_length,
    )  # fmt: skip
    engine = generate.load(values.model, config).engine
    gc.collect()
    gc.freeze()  # as serve.py does: the collector need not walk the programs
    context = engine.context
    like = traffic.Traffic(
      rate=rates[0],
      prompt_tokens=context / 16,
      answer_tokens=context / 16,
      most_tokens=context,
      most_answer=context // 4,
      burst_seconds=2.0,
      num_prefixes=4,
      prefix_tokens=context // 8,
    )
  except (ValueError, FileNotFoundError) as error:
    raise SystemExit(f'error: {error}') from None
  for rate in rates:
    at_rate = dataclasses.replace(like, rate=rate)
    found = compared(
      engine,
      traffic.requests(at_rate, values.requests, seed=1),
      traffic.requests(at_rate, values.requests, seed=2),
      CLOCKS[values.clock],
    )
    print(f'{rate:g} requests per second\n\n{table(*found)}\n')
    engine.manager.clear()


if __name__ == '__main__':
  targets.prepare_for(None)
  path_flags.DEFINE_path('model', None, 'Frozen directory.', required=True)
  flags.DEFINE_integer('requests', 60, 'Requests of each of the two traffics.')
  flags.DEFINE_list('rates', ['20', '1000'], 'Requests per second.')
  flags.DEFINE_enum(
    'clock', 'wall', CLOCKS, 'Wall time, or CPU time on a machine with load.'
  )
  flags.DEFINE_integer(
    'max_length', 0, 'Most tokens of a sequence; 0: those of the model.'
  )
  app.run(main)
