"""The scores of a judge's verdicts on pairs that it saw in both orders.

For each pair, a judge has two verdicts. The preferred answer gets 1, a tie 1/2
to both; a pair's value is the mean of its two orders. So a judge that always
prefers a place gets 1/2. Verdicts that cannot be read are counted, and their
pairs have no value.
"""

from collections.abc import Sequence
from typing import Any

from evals import judges
from evals.results import scores

_POINTS = {
  judges.Choice.FIRST: 1.0,
  judges.Choice.TIE: 0.5,
  judges.Choice.SECOND: 0.0,
}


def group(
  name: str,
  found: Sequence[judges.Orders],
  ids: Sequence[str],
  *,
  clusters: Sequence[str] | None = None,
  is_labelled: bool,
) -> scores.Group:
  """Returns the scores of the first answers of all pairs.

  The scores:
    accuracy or win_rate: mean value of the first answer. It is an accuracy
      where the first answer is known to be the better one.
    position_bias: P(prefers the answer shown first) - P(... shown second); 0
      for a judge without bias, 1 if it always takes the first.
    consistency: pairs with the same preferred answer in both orders.
    tie_rate: verdicts that are ties.
    malformed_rate: verdicts that cannot be read, of all verdicts. The other
      scores are means over the pairs with two verdicts.

  Args:
    name: name of the group.
    found: verdicts in both orders.
    ids: ids of the pairs.
    clusters: clusters of the pairs, see `statistics.standard_error`.
    is_labelled: whether the first answer of each pair is the better one.

  Raises:
    ValueError: no pair has two verdicts that can be read.
  """
  kept = [i for i, orders in enumerate(found) if _is_read(orders)]
  if not kept:
    words = found[0].forward.words if found else ''
    raise ValueError(
      f'judge: got no pair with a verdict in both orders, of {len(found)}'
      f' pairs; the first words were {words[:80]!r}; expected words that end'
      ' with [[A]], [[B]] or [[C]]; take a more capable model, or give it more'
      ' tokens'
    )
  kept_clusters: Sequence[str] | None = None
  if clusters is not None:
    kept_clusters = [clusters[i] for i in kept]
  wins, biases, same, ties = [], [], [], []
  for orders in (found[i] for i in kept):
    forward, backward = (_POINTS[verdict.choice] for verdict in orders)
    wins.append((forward + 1 - backward) / 2)
    biases.append(forward + backward - 1)
    same.append(float(forward == 1 - backward))
    ties.append(((forward == 0.5) + (backward == 0.5)) / 2)

  def score(name, values, is_better=True):
    return scores.of_values(
      name, values, higher_is_better=is_better, clusters=kept_clusters
    )

  malformed = [sum(not _is_read((each,)) for each in o) / 2 for o in found]
  return scores.Group(
    name=name,
    scores=(
      score('accuracy' if is_labelled else 'win_rate', wins),
      score('position_bias', biases, False),
      score('consistency', same),
      score('tie_rate', ties, False),
      scores.of_values(
        'malformed_rate', malformed, higher_is_better=False, clusters=clusters
      ),
    ),
    num_examples=len(found),
    example_ids=tuple(ids),
    clusters=None if clusters is None else tuple(clusters),
    examples=tuple(map(_example, ids, found)),
    notes=_notes(len(found) - len(kept), len(found)),
  )


def _example(name: str, orders: judges.Orders) -> dict[str, Any]:
  """Returns the verdicts of a pair, for the reader of a result."""
  return {'id': name} | {
    order: {'choice': verdict.choice.value, 'words': verdict.words}
    for order, verdict in orders._asdict().items()
  }


def _is_read(verdicts: Sequence[judges.Verdict]) -> bool:
  return all(v.choice is not judges.Choice.MALFORMED for v in verdicts)


def _notes(num_left_out: int, num_pairs: int) -> tuple[str, ...]:
  if not num_left_out:
    return ()
  return (
    f'{num_left_out} of {num_pairs} pairs have a verdict that cannot be read;'
    ' they count in malformed_rate alone',
  )
