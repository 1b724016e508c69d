"""The table of plans in experiments/PLANS.md: memory and cost of the presets.

    make plan-table
    python -m benchmarks.plan_table --presets=124m,8b

Compiles the train step of each preset for its target ahead of time. This takes
minutes each on two cores, and needs no accelerator and no data (`pip install -r
requirements-plan.txt`). Lines of other presets stay as they are in the file.
"""

import pathlib
import sys

from absl import app, flags

from benchmarks.common import plan_rows
from checks import expect, path_flags
from hardware import compile_ahead, targets
from training.planning import plan as plan_lib

PATH = pathlib.Path(__file__).parents[1] / 'experiments' / 'PLANS.md'
# A target of sensible size for each variant of experiments/pretrain.py, and the
# assumed price of its device-hour in dollars: round figures to compare presets
# by, not a quotation.
PRESETS = {
  '124m': ('v5e:2x4', 1.20),
  '1b': ('v5e:4x4', 1.20),
  '8b': ('v5p:4x4x4', 4.20),
  '70b': ('v5p:4x8x8', 4.20),
  '30b-a3b': ('v5p:4x4x4', 4.20),
}
# Columns that need no compiler, and columns that do.
ANALYTIC = (
  'preset', 'target', 'mesh', 'parameters', 'tokens per step', 'formula GiB',
)  # fmt: skip
COMPILED = (
  'compiler GiB', 'ratio', 'fits', 'collectives GB', 'compute s', 'HBM s',
  'links s', 'binds', 'step s', 'MFU', 'tokens', 'device-hours', 'dollars',
)  # fmt: skip
_HEADER = """# Plans of the presets

The answers of `python train.py --config=experiments/pretrain.py:PRESET
--plan=TARGET`, written on a machine without accelerators by

    make plan-table

- formula and compiler GiB: peak memory of one device, by the formula of
  `training/planning/memory.py`, and by the compiler (`memory_analysis` of the
  same train step, compiled ahead of time). The ratio is formula over compiler.
- collectives GB: sent by one device in a step.
- compute, HBM and links: the least seconds of a step on each resource, at the
  peaks of `hardware/peaks.py`. The longest binds.
- step: expected seconds, at {mfu:.0%} MFU, or at the limit of the binding
  resource if that is slower.
- tokens: of the whole run.
- dollars: at {prices} per device-hour.
  These prices are assumptions, not quotations; `--price_per_device_hour` takes
  yours.

"""


def plan(preset: str, *, is_compiled: bool) -> plan_lib.Plan:
  """Returns the plan of a preset for its target."""
  from experiments import pretrain

  target, price = PRESETS[preset]
  return plan_lib.make(
    pretrain.get_config(preset),
    target,
    price_per_device_hour=price,
    is_compiled=is_compiled,
  )


def analytic_cells(preset: str, made: plan_lib.Plan) -> list[str]:
  """Returns the cells that follow from shapes alone."""
  parameters = f'{made.num_params / 1e9:.3f}B'
  if made.num_active_params != made.num_params:
    parameters += f', {made.num_active_params / 1e9:.3f}B active'
  return [
    preset,
    made.target,
    made.mesh,
    parameters,
    f'{made.tokens_per_step:,}',
    f'{made.memory.total / 2**30:.2f}',
  ]


def compiled_cells(made: plan_lib.Plan) -> list[str]:
  """Returns the cells that need the compiler.

  Raises:
    ValueError: the step does not fit its target.
  """
  if not isinstance(made.compiled, compile_ahead.Program):
    raise ValueError(
      f'{made.experiment.name}: got a step that does not fit {made.target}'
      f' ({made.compiled}), expected a step that fits; change its experiment'
    )
  roof = made.roofline
  assert roof is not None
  return [
    f'{made.compiled.in_use / 2**30:.2f}',
    f'{made.formula_ratio:.3f}',
    'yes' if made.fits else 'NO',
    f'{made.compiled.traffic.sent_bytes / 1e9:.1f}',
    *(f'{s:.3g}' for s in (roof.compute, roof.memory, roof.links)),
    roof.binds,
    f'{made.step_seconds:.3g}',
    f'{made.mfu:.1%}',
    f'{made.tokens:.3g}',
    f'{made.device_hours:,.0f}',
    f'{made.cost:,.0f}',
  ]


def write(rows: plan_rows.Rows) -> str:
  """Returns the text of the file, with lines in the order of PRESETS."""
  prices = ' and '.join(
    f'{price:.2f} ({generation})'
    for generation, price in sorted(
      {(target.split(':')[0], price) for target, price in PRESETS.values()}
    )
  )
  header = _HEADER.format(mfu=plan_lib.DEFAULT_MFU, prices=prices)
  return header + plan_rows.table((*ANALYTIC, *COMPILED), rows, list(PRESETS))


def main(argv: list[str]) -> None:
  """Plans the presets of the flag and rewrites the file."""
  del argv
  wanted = flags.FLAGS.presets or list(PRESETS)
  try:
    for preset in wanted:
      expect.one_of('--presets', preset, PRESETS)
  except ValueError as error:
    sys.exit(f'error: {error}')
  path = pathlib.Path(flags.FLAGS.out)
  for preset in wanted:
    made = plan(preset, is_compiled=True)
    print(f'{plan_lib.report(made)}\n', flush=True)
    cells = [*analytic_cells(preset, made), *compiled_cells(made)]
    # Written after each preset, because the next one takes minutes.
    rows = plan_rows.read(path)
    rows[preset] = dict(zip((*ANALYTIC, *COMPILED), cells, strict=True))
    path.write_text(write(rows), encoding='utf-8')


if __name__ == '__main__':
  targets.prepare_environment()
  flags.DEFINE_list('presets', [], 'Presets to plan; all if empty.')
  path_flags.DEFINE_path('out', str(PATH), 'The file to rewrite.')
  app.run(main)
