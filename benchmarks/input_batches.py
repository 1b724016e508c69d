"""Speed of the input batches, beside the speed of a training step.

    python -m benchmarks.input_batches
    python -m benchmarks.input_batches --data_dir=... --out=batches.json

Makes batches of the quickstart's data with every packing, and with a mix of two
sources; the quickstart's train step on this machine's devices takes turns with
them. `times` is rows per second of the batches over rows per second of the
step, the median over rounds. Below 1, a run waits for its data. Tokenising,
which happens once, is timed separately. Batches that are timed alone use all
cores; beside a train step on a CPU they compete for the cores.
"""

import dataclasses
import pathlib
import statistics
import sys
import tempfile
import time
from typing import Any

from absl import app, flags
import jax

from benchmarks.common import entry, timing
from checks import path_flags
from data import (
  batches as batches_lib,
  data_config,
  rows as rows_lib,
  sources,
  token_store,
  vocabulary,
)
from experiments import quickstart
from text import tokenizer as tokenizer_lib
from training import experiment as experiment_lib, learner as learner_lib

SOURCE_MIX = 'mix of 2 sources'
STEP = 'train step'


def data_configs(data: data_config.DataConfig) -> dict[str, Any]:
  """Returns the timed configs by name: every packing, and a mix of splits."""
  alone = {
    packing: dataclasses.replace(data, packing=packing)
    for packing in data_config.PACKINGS
  }
  mixed = tuple(
    data_config.SourceConfig(
      open_source=data.open_source, split=split, weight=weight, name=split
    )
    for split, weight in ((data.train_split, 3.0), (data.eval_split, 1.0))
  )
  return alone | {SOURCE_MIX: dataclasses.replace(data, sources=mixed)}


def open_batches(
  data: data_config.DataConfig, tokenizer: tokenizer_lib.Tokenizer
) -> batches_lib.TrainBatches:
  """Returns the batches of one of `data_configs`."""
  opened = [
    rows_lib.open_rows(
      source.open(data.data_dir), tokenizer, data, name=source.name
    )
    for source in data.train_sources()
  ]
  return batches_lib.TrainBatches(opened, data, seed=0)


def time_batches(batches: batches_lib.TrainBatches, num: int) -> float:
  """Returns the seconds that `num` further batches take."""
  next(batches)  # starts the threads, which prefetch
  start = time.perf_counter()
  for _ in range(num):
    next(batches)
  seconds = time.perf_counter() - start
  batches.close()
  return seconds


def make_step_turn(
  experiment: experiment_lib.Experiment,
  batches: batches_lib.TrainBatches,
  num: int,
) -> timing.Turn:
  """Returns a turn of `num` training steps on one batch, already placed."""
  learner = learner_lib.make(experiment)
  state = learner.init(jax.random.key(0))
  step = learner.compile_train_step()
  batch = learner.placement.put_batch(next(batches))
  batches.close()

  def take_steps() -> float:
    nonlocal state
    start = time.perf_counter()
    for _ in range(num):
      state, metrics = step(state, batch)
    jax.block_until_ready(metrics)
    return time.perf_counter() - start

  take_steps()  # compiles
  return take_steps


def time_tokenising(
  source: sources.Source, tokenizer: tokenizer_lib.Tokenizer, threads: int
) -> dict[str, float]:
  """Returns bytes and tokens per second of writing a token store."""
  num_bytes = sum(
    len(source[i]['text'].encode('utf-8')) for i in range(len(source))
  )
  with tempfile.TemporaryDirectory() as directory:
    start = time.perf_counter()
    store = token_store.open_or_write(
      source, tokenizer, directory, name='source', num_threads=threads
    )
    seconds = time.perf_counter() - start
  return {
    'bytes_per_s': num_bytes / seconds,
    'tokens_per_s': store.num_ids / seconds,
  }


def measure(
  experiment: experiment_lib.Experiment,
  tokenizer: tokenizer_lib.Tokenizer,
  *,
  rounds: int,
  num_batches: int,
  num_steps: int,
) -> dict[str, Any]:
  """Returns the figures of all configs and of the step, timed in turns."""
  configs = data_configs(experiment.data)
  opened = {
    name: open_batches(data, tokenizer) for name, data in configs.items()
  }
  turns: dict[str, timing.Turn] = {
    name: lambda batches=batches: time_batches(batches, num_batches)
    for name, batches in opened.items()
  }
  turns[STEP] = make_step_turn(
    experiment, opened['concat_then_split'], num_steps
  )
  seconds = timing.interleave(turns, rounds)
  rows, length = experiment.data.batch_size, experiment.data.row_length
  per_row = {
    name: [s / (rows * (num_steps if name == STEP else num_batches)) for s in x]
    for name, x in seconds.items()
  }
  return {
    name: {
      'rows_per_s': 1 / statistics.median(values),
      'tokens_per_s': length / statistics.median(values),
      'times': timing.median_ratio(per_row[STEP], values),
      'fill_rate': (
        min(source.fill_rate for source in opened[name].sources)
        if name in opened
        else 1.0
      ),
    }
    for name, values in per_row.items()
  }


def report(
  experiment: experiment_lib.Experiment,
  measured: dict[str, Any],
  tokenising: dict[str, float],
) -> str:
  """Returns the table of `measured`, and the line on tokenising."""
  data = experiment.data
  heads = ('', 'fill', 'rows/s', 'tokens/s', 'times')
  lines = [
    (
      name,
      f'{values["fill_rate"]:.1%}',
      f'{values["rows_per_s"]:,.0f}',
      f'{values["tokens_per_s"]:,.0f}',
      f'{values["times"]:.1f}',
    )
    for name, values in measured.items()
  ]
  title = (
    f'input batches: {data.batch_size} x {data.row_length},'
    f' {data.num_threads} threads; {STEP} on {jax.devices()[0].device_kind}'
  )
  return '\n'.join(
    [
      timing.table(title, [heads, *lines]),
      f'tokenising, once: {tokenising["bytes_per_s"] / 1e6:.1f} MB/s,'
      f' {tokenising["tokens_per_s"]:,.0f} tokens/s',
    ]
  )


def main(argv: list[str]) -> None:
  """Runs the benchmark."""
  if len(argv) > 1:
    raise app.UsageError(f'got arguments {argv[1:]}, expected flags only')
  args = flags.FLAGS
  if note := timing.busy_note():
    print(note, file=sys.stderr)
  experiment = quickstart.get_config()
  experiment.data.data_dir = args.data_dir
  experiment.data.num_threads = args.threads
  experiment.data.num_workers = args.workers
  experiment.data.validate()
  (source,) = experiment.data.train_sources()
  documents = source.open(args.data_dir)
  tokenizer = vocabulary.build_tokenizer(
    experiment.data.tokenizer, (documents, 1.0)
  )
  tokenising = time_tokenising(documents, tokenizer, args.threads)
  measured = measure(
    experiment,
    tokenizer,
    rounds=args.rounds,
    num_batches=args.batches,
    num_steps=args.steps,
  )
  print(report(experiment, measured, tokenising))
  if args.out:
    result = {'tokenising': tokenising, 'measured': measured}
    timing.write_json(str(pathlib.Path(args.out)), result)


if __name__ == '__main__':
  entry.define_flags(rounds=5)
  path_flags.DEFINE_path(
    'data_dir', '~/.cache/two_lives', 'Directory that keeps tokenised data.'
  )
  flags.DEFINE_integer('threads', 2, 'Threads that make batches.', 1)
  flags.DEFINE_integer(
    'workers', 0, 'Processes that make batches; 0: this process.', 0
  )
  flags.DEFINE_integer('batches', 400, 'Batches per turn.', 1)
  flags.DEFINE_integer('steps', 4, 'Training steps per turn.', 1)
  app.run(main)
