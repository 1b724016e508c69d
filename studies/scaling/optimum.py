"""The compute-optimal size of a model, with and without inference.

    python -m studies.scaling.optimum --flops=1e21
    python -m studies.scaling.optimum --flops=1e21 --requests=1e9 \
      --tokens_in=500 --tokens_out=200 --figure=optimum.svg

Without requests the best size has a closed form (`Fit.optimum`). With requests,
training and inference are one bill (Sardana et al., arXiv:2401.00448): of all
models with the loss of the compute-optimal model, the cheapest has

    min over N, D of  6 N D / u_train + 2 N T_in / u_in + 2 N T_out / u_out

for T tokens of all requests and the utilisation u (share of the device's peak)
of training, of prompts and of answers. Utilisations of 1 count FLOPs (equation
2 of the paper); others count the FLOPs that the devices could have done in the
time that they are occupied (equation 3). A model smaller than the
compute-optimal one is trained for longer and saves in every request.
"""

import dataclasses
import math

from absl import app, flags
import numpy as np
from scipy import optimize

from checks import expect, path_flags
from studies.common import figure
from training.planning import scaling_laws

LAWS = {
  'hoffmann': scaling_laws.HOFFMANN,
  'besiroglu': scaling_laws.BESIROGLU,
  'sardana': scaling_laws.SARDANA,
}
_LAW_FIELDS = 'E,A,B,alpha,beta'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Use:
  """The tokens of all requests, and the utilisation of the devices."""

  prompt_tokens: float = 0.0
  answer_tokens: float = 0.0
  training_utilisation: float = 1.0
  prompt_utilisation: float = 1.0
  answer_utilisation: float = 1.0

  def validate(self) -> None:
    """Raises ValueError for counts below 0 and shares outside (0, 1]."""
    for name in ('prompt_tokens', 'answer_tokens'):
      value = getattr(self, name)
      if not 0 <= value < math.inf:
        raise ValueError(f'{name}: got {value}, expected a count of tokens')
    for name in (
      'training_utilisation',
      'prompt_utilisation',
      'answer_utilisation',
    ):
      value = getattr(self, name)
      if not 0 < value <= 1:
        raise ValueError(
          f'--{name}: got {value}, expected a share of the peak, more than 0'
          ' and at most 1'
        )

  def training_cost(self, num_params: float, num_tokens: float) -> float:
    """Returns 6 N D over the utilisation, FLOPs of the devices' peak."""
    return 6 * num_params * num_tokens / self.training_utilisation

  def inference_cost(self, num_params: float) -> float:
    """Returns 2 N per token over the utilisation, FLOPs of the peak."""
    return (
      2
      * num_params
      * (
        self.prompt_tokens / self.prompt_utilisation
        + self.answer_tokens / self.answer_utilisation
      )
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
  """A model: its size, tokens and costs."""

  params: float
  tokens: float
  loss: float  # nats per token
  training: float  # FLOPs of the devices' peak
  inference: float  # the same, of all requests

  @property
  def total(self) -> float:
    """Returns the cost of both lives."""
    return self.training + self.inference


def choice(
  law: scaling_laws.Fit, num_params: float, num_tokens: float, use: Use
) -> Choice:
  """Returns a model of a size that is trained on a number of tokens."""
  return Choice(
    params=num_params,
    tokens=num_tokens,
    loss=law.loss(num_params, num_tokens),
    training=use.training_cost(num_params, num_tokens),
    inference=use.inference_cost(num_params),
  )


def tokens_for(law: scaling_laws.Fit, num_params: float, loss: float) -> float:
  """Returns the tokens with which a size reaches a loss; inf: it never does."""
  left = loss - law.floor - law.params_scale / num_params**law.params_exponent
  if left <= 0:
    return math.inf
  return (law.tokens_scale / left) ** (1 / law.tokens_exponent)


def cheapest(law: scaling_laws.Fit, loss: float, use: Use) -> Choice:
  """Returns the model of a loss with the lowest cost of both lives.

  Raises:
    ValueError: no model has the loss.
  """
  use.validate()
  if not loss > law.floor:
    raise ValueError(
      f'loss: got {loss}, expected more than {law.floor}, the lowest loss of'
      f' the law of {law.source}'
    )
  # The smallest size that reaches the loss, with infinitely many tokens.
  least = (law.params_scale / (loss - law.floor)) ** (1 / law.params_exponent)

  def cost(log_ratio: float) -> float:
    size = least * (1 + math.exp(log_ratio))
    tokens = tokens_for(law, size, loss)
    return math.log(use.training_cost(size, tokens) + use.inference_cost(size))

  # A grid first: far from the optimum the cost is flat in floating point.
  grid = np.linspace(-16, 12, 225)
  best = int(np.argmin([cost(x) for x in grid]))
  found = optimize.minimize_scalar(
    cost,
    bounds=(grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]),
    method='bounded',
    options={'xatol': 1e-12},
  )
  size = least * (1 + math.exp(found.x))
  return choice(law, size, tokens_for(law, size, loss), use)


def plan(
  law: scaling_laws.Fit, training_flops: float, use: Use
) -> tuple[Choice, Choice]:
  """Returns a budget's compute-optimal model, and the cheapest of its loss.

  Args:
    training_flops: FLOPs of the compute-optimal model, 6 N D.
  """
  reference = choice(law, *law.optimum(training_flops), use)
  return reference, cheapest(law, reference.loss, use)


def panels(
  law: scaling_laws.Fit, training_flops: float, use: Use
) -> list[figure.Panel]:
  """Returns the cost over size at one loss, by training and inference."""
  reference, best = plan(law, training_flops, use)
  sizes = np.geomspace(best.params / 3, reference.params * 2, 200)
  models = [
    choice(law, size, tokens_for(law, size, reference.loss), use)
    for size in sizes.tolist()
    if math.isfinite(tokens_for(law, size, reference.loss))
  ]
  # The curve of training diverges at the least size: it is cut off.
  models = [each for each in models if each.total < 3 * reference.total]
  x = [each.params for each in models]
  return [
    figure.Panel(
      title=f'models of loss {reference.loss:.3f}',
      x_label='parameters N',
      y_label='FLOPs',
      lines={
        'training': figure.Line(x=x, y=[m.training for m in models]),
        'inference': figure.Line(x=x, y=[m.inference for m in models]),
        'both': figure.Line(x=x, y=[m.total for m in models], width=2.0),
        'compute-optimal': figure.Line(
          x=[reference.params], y=[reference.total], style='o'
        ),
        'cheapest': figure.Line(x=[best.params], y=[best.total], style='s'),
      },
      log_x=True,
      log_base=10,
    )
  ]


def table(reference: Choice, best: Choice) -> str:
  """Returns both models as a table, and the share that is saved."""
  lines = [
    '| model | parameters | tokens | tokens/parameter | loss | training |'
    ' inference | both |',
    '|---|---|---|---|---|---|---|---|',
  ]
  for name, each in (('compute-optimal', reference), ('cheapest', best)):
    lines.append(
      f'| {name} | {each.params:.4g} | {each.tokens:.4g} |'
      f' {each.tokens / each.params:.1f} | {each.loss:.4f} |'
      f' {each.training:.3e} | {each.inference:.3e} | {each.total:.3e} |'
    )
  saved = reference.total - best.total
  lines.append(
    f'saved: {saved:.3e} FLOPs, {saved / reference.total:.1%} of the total'
  )
  return '\n'.join(lines)


def parse_law(text: str) -> scaling_laws.Fit:
  """Returns a law by name, or from five numbers.

  Raises:
    ValueError: the text is neither a name nor five numbers.
  """
  if text in LAWS:
    return LAWS[text]
  try:
    numbers = [float(part) for part in text.split(',')]
  except ValueError:
    numbers = []
  if len(numbers) != 5 or not all(0 < x < math.inf for x in numbers):
    raise ValueError(
      f'--law: got {text!r}, expected one of {", ".join(LAWS)}, or five'
      f' positive numbers {_LAW_FIELDS}'
    )
  floor, params_scale, tokens_scale, params_exponent, tokens_exponent = numbers
  return scaling_laws.Fit(
    source='--law',
    floor=floor,
    params_scale=params_scale,
    tokens_scale=tokens_scale,
    params_exponent=params_exponent,
    tokens_exponent=tokens_exponent,
  )


def _define_flags() -> None:
  flags.DEFINE_float(
    'flops', None, 'Training FLOPs, 6 N D, of the compute-optimal model.',
    required=True,
  )  # fmt: skip
  flags.DEFINE_string(
    'law',
    'besiroglu',
    f'The scaling law: {", ".join(LAWS)}, or numbers {_LAW_FIELDS}.',
  )
  flags.DEFINE_float('requests', 0.0, 'Requests over the life of the model.')
  flags.DEFINE_float('tokens_in', 0.0, 'Tokens of the prompt of a request.')
  flags.DEFINE_float('tokens_out', 0.0, 'Tokens of the answer to a request.')
  for life, of in (
    ('training', 'of training'),
    ('prompt', 'while prompts are computed'),
    ('answer', 'while answers are generated'),
  ):
    flags.DEFINE_float(
      f'{life}_utilisation',
      1.0,
      f"Share of the devices' peak FLOP/s {of}; 1 counts FLOPs.",
    )
  path_flags.DEFINE_path('figure', '', 'A .svg or .png file; none if empty.')


def _use(values: flags.FlagValues) -> Use:
  """Returns the use that the flags describe."""
  expect.at_least('--requests', values.requests, 0)
  expect.at_least('--tokens_in', values.tokens_in, 0)
  expect.at_least('--tokens_out', values.tokens_out, 0)
  tokens = values.tokens_in + values.tokens_out
  if bool(values.requests) != bool(tokens):
    raise ValueError(
      f'--requests: got {values.requests:g} requests of {tokens:g} tokens,'
      ' expected both or neither; set --requests and --tokens_in, --tokens_out'
    )
  use = Use(
    prompt_tokens=values.requests * values.tokens_in,
    answer_tokens=values.requests * values.tokens_out,
    training_utilisation=values.training_utilisation,
    prompt_utilisation=values.prompt_utilisation,
    answer_utilisation=values.answer_utilisation,
  )
  use.validate()
  return use


def main(argv: list[str]) -> int:
  """Prints the compute-optimal and the cheapest model of a budget."""
  if len(argv) > 1:
    raise app.UsageError(f'got unknown arguments {argv[1:]}, expected flags')
  values = flags.FLAGS
  try:
    if not 0 < values.flops < math.inf:
      raise ValueError(f'--flops: got {values.flops}, expected more than 0')
    law, use = parse_law(values.law), _use(values)
    reference, best = plan(law, values.flops, use)
    print(f'law of {law.source}; {values.flops:.3g} training FLOPs')
    if use.inference_cost(1.0):
      print(table(reference, best))
    else:
      print(
        f'{reference.params:.4g} parameters, {reference.tokens:.4g} tokens'
        f' ({reference.tokens / reference.params:.1f} per parameter), loss'
        f' {reference.loss:.4f} nats per token'
      )
    if values.figure:
      figure.save(values.figure, panels(law, values.flops, use))
  except ValueError as error:
    print(f'error: {error}')
    return 1
  return 0


if __name__ == '__main__':
  # Not at import: other commands have flags of these names.
  _define_flags()
  app.run(main)
