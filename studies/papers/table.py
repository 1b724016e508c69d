"""experiments/RESULTS.md: the generated table of paper results.

Rows of claims that are measured again are replaced; the others stay as they
are. A row is checked when it is read: its verdict must follow from its numbers
and from the claim. So neither an edit by hand nor a changed claim can leave a
wrong verdict behind.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import pathlib
import re

from evals import claims as claims_lib
from storage import atomic
from studies.papers import verdicts

PATH = pathlib.Path(__file__).resolve().parents[2] / 'experiments/RESULTS.md'
_COLUMNS = (
  'claim',
  'quantity',
  'published',
  'counts as reproduced',
  'measured',
  'verdict',
  'seconds',
  'device',
  'date, commit',
)
_HEAD = (
  '# Paper results, measured here\n\n'
  'Written by `python -m studies.reproduce`; not by hand. The claims are in'
  ' `experiments/papers/`.\n'
  'An interval is at 95 %, over seeds unless the claim says otherwise.'
  ' *Reproduced*: all of it is in the\n'
  'range; *not reproduced*: all of it is outside; *inconclusive*: the rest. The'
  ' reason of each range is below.\n'
  'Seconds are of the last start of a claim, on a machine that may have done'
  ' other things: one that was resumed took longer.\n\n'
)
_NUMBER = r'-?\d+(?:\.\d+)?(?:e[+-]?\d+)?'
_MEASURED = re.compile(
  rf'({_NUMBER})(?: \[({_NUMBER}), ({_NUMBER})\])?(?: of (\d+) seeds)?'
)


class TableError(ValueError):
  """A table that its own numbers contradict, or that cannot be read."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
  """A line of the table."""

  claim: str
  quantity: str
  found: verdicts.Finding
  seconds: float
  device: str
  made: str  # date and commit


def text(
  claims: Sequence[claims_lib.Claim], rows: Mapping[str, Sequence[Row]]
) -> str:
  """Returns the whole page.

  Args:
    claims: all claims, in order. Rows of other claims are left out.
    rows: by claim.
  """
  lines = [
    f'| {" | ".join(_COLUMNS)} |',
    f'|{"---|" * len(_COLUMNS)}',
  ]
  shown = [claim for claim in claims if claim.name in rows]
  for claim in shown:
    of = {row.quantity: row for row in rows[claim.name]}
    lines += [
      _line(quantity, of[quantity.name])
      for quantity in claim.quantities
      if quantity.name in of
    ]
  described = '\n'.join(map(_described, shown))
  table = '\n'.join(lines)
  return (
    f'{_HEAD}{_counts(shown, rows)}{table}\n\n## The claims\n\n{described}\n'
  )


def _counts(claims, rows) -> str:
  """Returns a sentence with the number of rows by verdict."""
  found = [
    verdicts.verdict(quantity, row.found)
    for claim in claims
    for quantity in claim.quantities
    for row in rows[claim.name]
    if row.quantity == quantity.name
  ]
  parts = [f'{found.count(each)} {each}' for each in verdicts.VERDICTS]
  return f'{len(claims)} claims, {len(found)} rows: {", ".join(parts)}.\n\n'


def _line(quantity: claims_lib.Quantity, row: Row) -> str:
  verdict = verdicts.verdict(quantity, row.found)
  if verdict == verdicts.INCONCLUSIVE:
    verdict += f'; {verdicts.would_decide(quantity, row.found)} would decide'
  cells = (
    row.claim,
    quantity.name,
    quantity.published,
    shown_range(quantity),
    shown(row.found),
    verdict,
    f'{row.seconds:.0f}',
    row.device,
    row.made,
  )
  return f'| {" | ".join(cells)} |'


def _described(claim: claims_lib.Claim) -> str:
  reasons = dict.fromkeys(quantity.why for quantity in claim.quantities)
  lines = [
    f'- **{claim.name}**: {claim.statement} {claim.paper}, {claim.where}.'
    f' Range: {"; ".join(reasons)}.'
  ]
  if claim.note:
    lines.append(f'  {claim.note}')
  return '\n'.join(lines)


def shown_range(quantity: claims_lib.Quantity) -> str:
  """Returns the range of a quantity in few characters."""
  low, high = quantity.low, quantity.high
  if high == float('inf'):
    return f'at least {low:.6g}'
  if low == float('-inf'):
    return f'at most {high:.6g}'
  return f'{low:.6g} to {high:.6g}'


def shown(found: verdicts.Finding) -> str:
  """Returns a finding as a cell, from which `read` makes it again."""
  parts = [f'{found.value:.6g}']
  if not found.is_exact:
    parts.append(f'[{found.low:.6g}, {found.high:.6g}]')
  if found.seeds:
    parts.append(f'of {found.seeds} seeds')
  return ' '.join(parts)


def read(
  claims: Sequence[claims_lib.Claim], path: pathlib.Path = PATH
) -> dict[str, list[Row]]:
  """Returns the rows of a page, by claim; checks each.

  Rows of claims and quantities that no longer exist are left out.

  Raises:
    TableError: a row cannot be read, or its verdict or range does not follow
      from its numbers and from the claim.
  """
  if not path.exists():
    return {}
  known = {
    (claim.name, quantity.name): quantity
    for claim in claims
    for quantity in claim.quantities
  }
  rows: dict[str, list[Row]] = {}
  for number, line in enumerate(path.read_text('utf-8').splitlines(), 1):
    cells = [cell.strip() for cell in line.strip().strip('|').split('|')]
    is_row = line.startswith('| ') and cells != list(_COLUMNS)
    if not is_row or tuple(cells[:2]) not in known:
      continue
    row = _row(cells, f'{path}, line {number}')
    expected = _line(known[row.claim, row.quantity], row)
    if line.strip() != expected:
      raise TableError(
        f'{path}, line {number}: got {line.strip()}, expected {expected}, from'
        ' its own numbers and the claim; measure the claim again, with python'
        f' -m studies.reproduce {row.claim}'
      )
    rows.setdefault(row.claim, []).append(row)
  return rows


def _row(cells: list[str], where: str) -> Row:
  measured = _MEASURED.fullmatch(cells[4]) if len(cells) > 6 else None
  if measured is None or len(cells) != len(_COLUMNS):
    raise TableError(
      f'{where}: got {cells}, expected {len(_COLUMNS)} cells with a number'
      ' under measured; delete the line and measure the claim again'
    )
  value, low, high, seeds = measured.groups()
  return Row(
    claim=cells[0],
    quantity=cells[1],
    found=verdicts.Finding(
      value=float(value),
      low=float(low or value),
      high=float(high or value),
      seeds=int(seeds or 0),
    ),
    seconds=float(cells[6]),
    device=cells[7],
    made=cells[8],
  )


def write(
  claims: Sequence[claims_lib.Claim],
  rows: Mapping[str, Sequence[Row]],
  path: pathlib.Path = PATH,
) -> None:
  """Writes the page, whole or not at all."""
  atomic.write_text(path, text(claims, rows))
