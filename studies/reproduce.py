"""Measures results of papers, and writes the table experiments/RESULTS.md.

    python -m studies.reproduce --list
    python -m studies.reproduce kl_estimators voting
    python -m studies.reproduce all --budget=cpu-1m
    python -m studies.reproduce chinchilla_refit \
      --inputs=points=chinchilla_points.csv

A claim says which values count as reproduced, before it is measured. The
verdict follows from the measured value and its interval alone; a result that is
not reproduced is written down like any other. Runs are kept in --workdir
(runs/papers), so the same command resumes after an interruption.
"""

from collections.abc import Mapping, Sequence
import datetime
import pathlib
import time

from absl import app, flags, logging
import jax

from checks import paths
from evals import claims as claims_lib
from storage import code_commit, locks
from studies.common import study_flags
from studies.papers import port, registry, table, verdicts

_WORKDIR = 'runs/papers'  # where --workdir names none


def measure(
  claim: claims_lib.Claim,
  setting: port.Setting,
) -> list[table.Row]:
  """Returns the rows of a claim.

  Raises:
    ValueError: the measurement lacks a quantity, has an unknown one, or has one
      that is not finite.
  """
  started = time.perf_counter()
  measured = registry.measure_of(claim)(claim, setting)
  seconds = time.perf_counter() - started
  names = [quantity.name for quantity in claim.quantities]
  missing = set(names) - set(measured)
  if missing:
    raise ValueError(
      f'claim {claim.name}: got no value of {", ".join(sorted(missing))},'
      f' expected one of each quantity; the function in studies/papers/ must'
      ' return it'
    )
  return [
    table.Row(
      claim=claim.name,
      quantity=name,
      found=verdicts.finding(measured[name]),
      seconds=seconds,
      device=_device(),
      made=f'{datetime.date.today()}, {_commit()}',
    )
    for name in names
  ]


def _commit() -> str:
  """Returns the commit of the code, short, with -dirty if files were edited."""
  commit, dash, dirty = code_commit.find().partition('-')
  return commit[:10] + dash + dirty


def _device() -> str:
  device = jax.devices()[0]
  return 'cpu' if device.platform == 'cpu' else device.device_kind


def parse_inputs(texts: Sequence[str]) -> dict[str, str]:
  """Returns NAME=PATH texts as a dict; the files must exist.

  Raises:
    ValueError: a text has another form, or there is no such file.
  """
  found = {}
  for text in texts:
    name, path = paths.named('--inputs', text)
    if not pathlib.Path(path).is_file():
      raise ValueError(f'--inputs: got {text!r}, expected a file that exists')
    found[name] = path
  return found


def _missing(claim: claims_lib.Claim, inputs: Mapping[str, str]) -> list[str]:
  return [
    f'--inputs={name}=PATH, {source}'
    for name, source in claim.inputs.items()
    if name not in inputs
  ]


def run(
  claims: Sequence[claims_lib.Claim],
  inputs: Mapping[str, str],
  workdir: pathlib.Path,
  *,
  is_all: bool,
  seeds: int = 0,
  path: pathlib.Path = table.PATH,
) -> None:
  """Measures claims; the table is written after each.

  Args:
    inputs: paths by name.
    workdir: keeps runs.
    is_all: whether a claim without its input is left out with a message; if
      false, it is refused.
    seeds: number of seeds; 0: the claim's own number.
    path: path of the table.

  Raises:
    ValueError: a claim lacks an input, or its measurement is not usable.
    table.TableError: the existing table contradicts itself.
    port.Stopped: a signal came.
  """
  known = registry.all_claims()
  table.read(known, path)  # refused before anything is measured
  unknown = set(inputs) - {name for claim in known for name in claim.inputs}
  if unknown:
    raise ValueError(
      f'--inputs: got {", ".join(sorted(unknown))}, expected names that a claim'
      ' has; --list shows them'
    )
  for claim in claims:
    missing = _missing(claim, inputs)
    if missing and not is_all:
      raise ValueError(
        f'claim {claim.name}: got --inputs={",".join(inputs) or "none"},'
        f' expected {"; ".join(missing)}'
      )
    if missing:
      print(f'{claim.name}: left out, it needs {"; ".join(missing)}')
      continue
    count = (seeds or claim.seeds) if claim.seeds else 0
    setting = port.Setting(
      seeds=range(count), workdir=workdir / claim.name, inputs=inputs
    )
    found = measure(claim, setting)
    # Read again: another process may have measured other claims meanwhile.
    table.write(known, {**table.read(known, path), claim.name: found}, path)
    print('\n'.join(_told(claim, found)), flush=True)


def _told(claim: claims_lib.Claim, rows: Sequence[table.Row]) -> list[str]:
  lines = [f'{claim.name}: {claim.statement} ({claim.paper}, {claim.where})']
  for quantity, row in zip(claim.quantities, rows, strict=True):
    verdict = verdicts.verdict(quantity, row.found)
    if verdict == verdicts.INCONCLUSIVE:
      verdict += f' ({verdicts.would_decide(quantity, row.found)} would decide)'
    lines.append(
      f'  {quantity.name}: {table.shown(row.found)}, published'
      f' {quantity.published}, range {table.shown_range(quantity)}: {verdict}'
    )
  return lines


def listing() -> str:
  """Returns all claims with their costs and inputs, one line each."""
  lines = []
  for claim in registry.all_claims():
    cost = ', '.join(f'{k} {v:g} s' for k, v in claim.seconds.items())
    needs = ''.join(f'; needs {name}' for name in claim.inputs)
    lines.append(f'{claim.name:20} {cost:12} {claim.statement}{needs}')
  return '\n'.join(lines)


def _define_flags() -> None:
  flags.DEFINE_bool('list', False, 'Print all claims and exit.')
  flags.DEFINE_string(
    'budget',
    '',
    'Device and longest time of a claim, as cpu-10m or gpu-1h. all measures the'
    ' claims that fit. Empty (default): any.',
  )
  flags.DEFINE_list(
    'inputs', [], 'Files that claims need, as NAME=PATH; --list shows them.'
  )


def main(argv: list[str]) -> int:
  """Measures the claims that the command line names."""
  values = flags.FLAGS
  logging.set_verbosity(logging.ERROR)
  if values.list:
    print(listing())
    return 0
  try:
    run(
      registry.chosen(argv[1:], values.budget),
      parse_inputs(values.inputs),
      pathlib.Path(study_flags.WORKDIR.value or _WORKDIR),
      is_all=argv[1:] == ['all'],
      seeds=study_flags.SEEDS.value,
    )
  except (ValueError, FileNotFoundError, locks.InUseError) as error:
    print(f'error: {error}')
    return 1
  except port.Stopped as stopped:
    print('stopped by a signal; the same command resumes')
    return stopped.args[0]
  return 0


if __name__ == '__main__':
  # Not at import: other commands have flags of these names.
  _define_flags()
  app.run(main)
