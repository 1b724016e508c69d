"""Host time of a decoded step, with a device program that does nothing.

    python -m benchmarks.engine_host

The host plans steps, fills their inputs and takes their tokens while the device
computes. On a fast device it is slower than the device, unless one dispatch has
several decode steps. Here the programs answer at once with a letter for each
sequence, so that all time is the host's: CPU time of the engine's thread, per
step of all sequences, by the number of decode steps per dispatch. The time that
`Compiled.__call__` takes for its arguments is not included.
"""

from collections.abc import Iterator
import statistics
import time
from typing import Any

from absl import app, flags
import numpy as np

from benchmarks.common import entry, random_model
from inference.engine import (
  engine as engine_lib,
  engine_config,
  inputs as inputs_lib,
  steps,
)
from inference.engine.compiled import programs
from inference.requests import requests
from inference.sampling import settings as settings_lib
from models import model_config

GOAL_MS = 0.3
DECODE_STEPS = 1, 8, 32
_TOKENS = 200  # of each sequence


class NoPrograms(programs.Programs):
  """Programs that compute nothing: each token is a letter."""

  def step(self, shape, params, state, flat_I):
    """Returns outputs as a device would, in NumPy."""
    inputs = inputs_lib.split(flat_I, self._layouts.of(shape))
    num_steps = 1 if shape.num_chunks else self.decode_steps
    tokens_SR = np.full((num_steps, len(inputs.slots_R)), 7, np.int32)
    if not shape.num_chunks:
      is_over = np.arange(num_steps)[:, None] >= inputs.lengths_D
      tokens_SR[is_over] = steps.NOT_COMPUTED
    return state, steps.Outputs(tokens_SR, None, None)


def engine_of(num_sequences: int, decode_steps: int) -> engine_lib.Engine:
  """Returns an engine without a device program."""
  model = model_config.ModelConfig(
    vocab_size=512,
    num_layers=1,
    model_width=16,
    num_heads=1,
    num_kv_heads=1,
    head_width=16,
    mlp_width=16,
    max_length=1024,
  )
  engine = engine_lib.Engine(
    model,
    random_model.params(model),
    tokenizer=random_model.Tokenizer(model.vocab_size),
    weights_digest='',
    config=engine_config.EngineConfig(
      max_sequences=num_sequences,
      decode_shapes=(num_sequences,),
      max_chunks=1,
      decode_steps=decode_steps,
      stream_seconds=0,
    ),
  )
  # A change of the class keeps the compiled programs: `seat` still runs.
  engine._programs.__class__ = NoPrograms
  return engine


def step_ms(engine: engine_lib.Engine) -> float:
  """Returns the milliseconds of a step in which all sequences decode."""
  settings = settings_lib.Settings(
    temperature=0.0, max_tokens=_TOKENS, ignore_eos=True
  )
  for number in range(engine.config.max_sequences):
    engine.submit(
      requests.Request(prompt_ids=(3, 4, 5 + number), settings=settings)
    )
  while (
    any(
      each.num_computed < each.num_prompt for each in engine.manager.running()
    )
    or engine.num_waiting
  ):
    engine.step()
  value = engine.metrics.value
  before, start = value('engine_steps_total'), time.thread_time()
  for _ in engine.run():
    pass
  seconds = time.thread_time() - start
  return 1000 * seconds / (value('engine_steps_total') - before)


def measure(args: Any) -> Iterator[entry.Result]:
  """Yields the figures, medians over rounds in which the sides take turns."""
  engines = {num: engine_of(args.sequences, num) for num in DECODE_STEPS}
  found: dict[int, list[float]] = {num: [] for num in engines}
  for _ in range(args.rounds + 1):
    for num, engine in engines.items():
      found[num].append(step_ms(engine))
  yield {
    'sequences': args.sequences,
    'goal_ms': GOAL_MS,
    # The first round fills caches.
    'step_ms': {num: statistics.median(ms[1:]) for num, ms in found.items()},
  }


def report(result: entry.Result) -> str:
  """Returns the figures as text."""
  return '\n'.join(
    f'{num:>3} decode steps per dispatch: {ms:.3f} ms of the host per step of'
    f' {result["sequences"]} sequences (goal {result["goal_ms"]})'
    for num, ms in result['step_ms'].items()
  )


def main(argv: list[str]) -> None:
  """Measures and reports."""
  del argv
  entry.run(measure, report)


if __name__ == '__main__':
  entry.define_flags(rounds=5)
  flags.DEFINE_integer('sequences', 32, 'Sequences that decode at once.', 1)
  app.run(main)
