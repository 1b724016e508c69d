"""The claims of experiments/papers/, and the functions that measure them."""

import re
from types import ModuleType

from evals import claims as claims_lib
from experiments.papers import (
  grokking as grokking_claims,
  in_context as in_context_claims,
  knowledge as knowledge_claims,
  least_squares as least_squares_claims,
  optimisation as optimisation_claims,
  pretraining as pretraining_claims,
  repeated_text as repeated_text_claims,
  sampling as sampling_claims,
  scaling_laws as scaling_laws_claims,
  serving as serving_claims,
  small_tasks as small_tasks_claims,
)
from studies.papers import (
  grokking,
  in_context,
  knowledge,
  least_squares,
  optimisation,
  port,
  pretraining,
  repeated_text,
  sampling,
  scaling_laws,
  serving,
  small_tasks,
)

# Claims, and the module whose functions of their names measure them.
_FILES: tuple[tuple[ModuleType, ModuleType], ...] = (
  (scaling_laws_claims, scaling_laws),
  (sampling_claims, sampling),
  (least_squares_claims, least_squares),
  (serving_claims, serving),
  (optimisation_claims, optimisation),
  (in_context_claims, in_context),
  (small_tasks_claims, small_tasks),
  (grokking_claims, grokking),
  (repeated_text_claims, repeated_text),
  (knowledge_claims, knowledge),
  (pretraining_claims, pretraining),
)
_BUDGET = re.compile(r'(cpu|gpu)-(\d+)(s|m|h)')
_SECONDS = {'s': 1, 'm': 60, 'h': 3600}


def all_claims() -> tuple[claims_lib.Claim, ...]:
  """Returns all claims, each validated; their names differ.

  Raises:
    ValueError: a claim cannot be checked, or a name is there twice.
  """
  found = tuple(claim for file, _ in _FILES for claim in file.get_claims())
  names = [claim.name for claim in found]
  for claim in found:
    claim.validate()
    if names.count(claim.name) > 1:
      raise ValueError(f'claims: got {claim.name} twice, expected it once')
  return found


def chosen(names: list[str], budget: str) -> tuple[claims_lib.Claim, ...]:
  """Returns the claims of a command line.

  Args:
    names: names of claims, or `all`.
    budget: device and longest time of a claim, as cpu-10m; '': any. A claim
      that is named must fit, and `all` leaves out the others.

  Raises:
    ValueError: there is no such claim, or it does not fit.
  """
  claims = all_claims()
  if not names:
    raise ValueError(
      'claims: got none, expected names or all; --list shows them'
    )
  limit = parse_budget(budget) if budget else None
  if names == ['all']:
    return tuple(c for c in claims if limit is None or _fits(c, *limit))
  by_name = {claim.name: claim for claim in claims}
  for name in names:
    if name not in by_name:
      raise ValueError(
        f'claims: got {name!r}, expected all or names of'
        f' {", ".join(by_name)}; --list describes them'
      )
    if limit and not _fits(by_name[name], *limit):
      raise ValueError(
        f'--budget: got {budget} for {name}, which takes about'
        f' {dict(by_name[name].seconds)} seconds; give it more, or leave it out'
      )
  return tuple(by_name[name] for name in dict.fromkeys(names))


def parse_budget(text: str) -> tuple[str, float]:
  """Returns the device and the seconds of a text such as cpu-10m.

  Raises:
    ValueError: the text has another form.
  """
  found = _BUDGET.fullmatch(text)
  if not found:
    raise ValueError(
      f'--budget: got {text!r}, expected a device and a time, such as cpu-10m,'
      ' cpu-30s or gpu-1h'
    )
  device, number, unit = found.groups()
  return device, int(number) * float(_SECONDS[unit])


def _fits(claim: claims_lib.Claim, device: str, seconds: float) -> bool:
  return claim.seconds.get(device, float('inf')) <= seconds


def measure_of(claim: claims_lib.Claim) -> port.Measure:
  """Returns the function that measures a claim.

  Raises:
    ValueError: there is no such function.
  """
  for file, measures in _FILES:
    if claim.name in {each.name for each in file.get_claims()}:
      return getattr(measures, claim.name)
  raise ValueError(
    f'claim {claim.name}: got no function of this name in studies/papers/,'
    ' expected the one that measures it'
  )
