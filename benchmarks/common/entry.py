"""The command line of all benchmarks: common flags, printing and --out.

entry.define_flags(rounds=5, has_peer=True)    # where the file is run
entry.run(measure, report)                     # in its main
"""

from collections.abc import Callable, Iterable
import sys
from typing import Any

from absl import flags

from benchmarks.common import timing
from checks import path_flags

Result = dict[str, Any]


def define_flags(*, rounds: int, has_peer: bool = False) -> None:
  """Defines --rounds with its default, --out, and --peer if there is one."""
  flags.DEFINE_integer(
    'rounds', rounds, 'Turns of each side; results are medians over them.', 1
  )
  path_flags.DEFINE_path('out', '', 'A file that gets the result as JSON.')
  if has_peer:
    flags.DEFINE_bool(
      'peer',
      False,
      'Also measures transformers on torch (CPU only; requirements-peer.txt).',
    )


def run(
  measure: Callable[[Any], Iterable[Result]],
  report: Callable[[Result], str],
  *,
  is_list: bool = False,
) -> None:
  """Measures, prints each result as it comes, and writes --out.

  Args:
    measure: yields results, given the values of all flags.
    is_list: --out gets {'results': [...]}, otherwise the only result.
  """
  args = flags.FLAGS
  if note := timing.busy_note():
    print(note, file=sys.stderr)
  results = []
  try:
    for result in measure(args):
      results.append(result)
      print(report(result), flush=True)
  except ValueError as error:
    sys.exit(f'error: {error}')
  if args.out:
    timing.write_json(args.out, {'results': results} if is_list else results[0])
