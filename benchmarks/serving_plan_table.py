"""The table of plans in experiments/SERVING_PLANS.md: many devices, one model.

    make plan-table
    python -m benchmarks.serving_plan_table --rows=8b@v5e:2x4,70b@h100:8

Compiles the decode step of each model over all devices of each target ahead of
time, whole. That takes minutes each on two cores, and needs no accelerator and
no weights (`pip install -r requirements-plan.txt`). Rows that are not asked for
stay as they are in the file.
"""

import pathlib
import sys

from absl import app, flags

from benchmarks.common import plan_rows
from checks import expect, path_flags
from hardware import compile_ahead, targets
from inference.planning import plan as plan_lib, subject as subject_lib

PATH = pathlib.Path(__file__).parents[1] / 'experiments' / 'SERVING_PLANS.md'
MODELS = '8b', '70b', '30b-a3b'  # of experiments/pretrain.py
TARGETS = 'v5e:2x4', 'v5p:2x2x2', 'h100:8'
ROWS = tuple(f'{model}@{target}' for model in MODELS for target in TARGETS)
_GROUPS_OF_EXPERTS = 8  # of a mixture: each device has whole experts
# Columns that need no compiler, and columns that do.
ANALYTIC = (
  'model@target', 'shared by', 'weights GiB', 'sequences that fit',
  'tokens/s alone', 'tokens/s of all', 'smallest slice',
)  # fmt: skip
COMPILED = (
  'sequences', 'formula GiB', 'compiler GiB', 'ratio', 'fits',
  'sums, predicted', 'sums, compiled', 'MiB sent, predicted',
  'MiB sent, compiled', 'largest KiB', 'weights sent',
)  # fmt: skip
_HEADER = """# Plans of serving one model over many devices

The answers of `python serve.py --config=experiments/pretrain.py:MODEL
--plan=TARGET --engine.tensor=N`, bfloat16, contexts of {length:,} tokens,
written on a machine without accelerators by

    make plan-table

- shared by: devices that share the model, all of the target. The experts of a
  mixture lie whole on one device each (`--engine.experts={groups}`).
- weights: of one device. Sequences that fit: of full length, in the memory that
  the weights leave.
- tokens/s: at best, by bytes, FLOPs and links (`hardware/peaks.py`), with half
  of the context cached; of one sequence alone, and of all that fit.
- smallest slice: of this generation that holds weights and one sequence.
- formula and compiler GiB: peak memory of one device with the sequences of the
  column before, by the formula, and by the compiler (`memory_analysis` of the
  decode step of the engine, compiled ahead of time).
- sums: over the devices, of the stream of a step; one after attention and one
  after the MLP of each layer, one of the embedding. The compiler joins or
  splits some. Bytes are sent by one device.
- largest: message of a step. No weight is sent if it is not larger than the
  stream.

"""


def plan(row: str, *, is_compiled: bool) -> plan_lib.Plan:
  """Returns the plan of a row."""
  from experiments import pretrain

  model, target = row.split('@')
  found = pretrain.get_config(model)
  subject = subject_lib.of_config(model, found.model, 'bfloat16')
  return plan_lib.make(
    subject,
    target,
    tensor=targets.parse(target).num_devices,
    experts=_GROUPS_OF_EXPERTS if found.model.num_experts else 1,
    is_compiled=is_compiled,
  )


def analytic_cells(row: str, made: plan_lib.Plan) -> list[str]:
  """Returns the cells that follow from shapes alone."""
  length = made.config.max_length
  most, found = made.num_sequences(length), plan_lib.smallest(made)
  smallest = ''
  if made.slices:
    smallest = 'none'
  if found:
    smallest = f'{found[0]}, tensor {found[1].tensor}'
  return [
    row,
    f'{made.tensor}',
    f'{made.weight_bytes / 2**30:.2f}',
    f'{most:,}',
    f'{made.tokens_per_s(1, length / 2):,.4g}' if most else '',
    f'{made.rate:,.5g}' if most else '',
    smallest,
  ]


def compiled_cells(made: plan_lib.Plan) -> list[str]:
  """Returns the cells that need the compiler."""
  count, found = made.compiled_sequences, made.compiled
  formula = made.bytes_of(count, made.config.max_length)
  cells = [f'{count}', f'{formula / 2**30:.2f}']
  if not isinstance(found, compile_ahead.Program):
    assert isinstance(found, compile_ahead.OutOfMemory)
    needed = f'{found.needed / 2**30:.2f}' if found.needed else 'more'
    return [*cells, needed, '', 'NO', *[''] * 6]
  num_sums, _ = found.traffic.by_kind().get('all-reduce', (0, 0.0))
  largest = max(each.payload_bytes for each in found.traffic.collectives)
  return [
    *cells,
    f'{found.in_use / 2**30:.2f}',
    f'{formula / found.in_use:.3f}',
    'yes' if found.in_use <= made.peaks.memory_bytes else 'NO',
    f'{made.sums_per_step}',
    f'{num_sums}',
    f'{made.sent_bytes(count) / 2**20:.1f}',
    f'{found.traffic.sent_bytes / 2**20:.1f}',
    f'{largest / 2**10:.0f}',
    'no' if made.sends_no_weight else 'YES',
  ]


def write(rows: plan_rows.Rows) -> str:
  """Returns the text of the file, with lines in the order of ROWS."""
  from experiments import pretrain

  header = _HEADER.format(
    length=pretrain.get_config(MODELS[0]).model.max_length,
    groups=_GROUPS_OF_EXPERTS,
  )
  return header + plan_rows.table((*ANALYTIC, *COMPILED), rows, ROWS)


def main(argv: list[str]) -> None:
  """Plans the rows of the flag and rewrites the file."""
  del argv
  wanted = flags.FLAGS.rows or list(ROWS)
  try:
    for row in wanted:
      expect.one_of('--rows', row, ROWS)
  except ValueError as error:
    sys.exit(f'error: {error}')
  path = pathlib.Path(flags.FLAGS.out)
  for row in wanted:
    made = plan(row, is_compiled=False)
    cells = analytic_cells(row, made)
    if made.num_sequences(1):
      made = plan(row, is_compiled=True)
      cells += compiled_cells(made)
    else:  # by the formula, whose weights alone are too large
      cells += ['', '', '', '', 'NO', *[''] * 6]
    print(' | '.join(cells), flush=True)
    # Written after each row, because the next one takes minutes.
    rows = plan_rows.read(path)
    rows[row] = dict(zip((*ANALYTIC, *COMPILED), cells, strict=True))
    path.write_text(write(rows), encoding='utf-8')


if __name__ == '__main__':
  targets.prepare_environment()
  flags.DEFINE_list('rows', [], 'Rows to plan, MODEL@TARGET; all if empty.')
  path_flags.DEFINE_path('out', str(PATH), 'The file to rewrite.')
  app.run(main)
