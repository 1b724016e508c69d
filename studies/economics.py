"""The bill of a model: training, inference, and how to pay less.

    python -m studies.economics --model=runs/quickstart/frozen \
      --prices=experiments/prices/h100_rented.json \
      --requests_per_day=1e6 --figure=runs/bill.svg
    python -m studies.economics --model=DIR --prices=FILE \
      --records=runs/server.sqlite

The cost of training follows from the FLOPs in the manifest, and the cost of a
request from its tokens. Both are the seconds that a device of the price file
needs, at a share of its peaks, times the price. Matrix products bound prompts,
and the bytes of a decode step (inference/planning/plan.py), shared by a batch,
bound answers. Measured rates, --prompt_tokens_per_s and --answer_tokens_per_s,
replace this model of time. --records takes the tokens and the requests of a day
from the ledger of a server.

The first table says after how many requests, and on which day, inference has
cost as much as training. The second one compares ways to change the bill, at
--requests requests:

    quantise      the same weights in 4 bits: only the bytes of a step change
    distil        a student of --distil_share of the parameters; its training
                  reads the teacher once for every token
    think longer  --think_factor times as many tokens in an answer
    larger        --larger_factor times the parameters, on the same tokens

Loss is the prediction of a scaling law (arXiv:2404.10102) for the parameters
and the tokens of training. The law does not cover quantising, the gain of
distillation, thinking, and models outside of the sizes that it was fitted to:
there the table has no loss. Costs leave out failed runs, people, idle devices
and networks.

Reference: Sardana et al. 2024, arXiv:2401.00448, equation 3.
"""

import dataclasses
import datetime
import math
import pathlib
from typing import Any

from absl import app, flags
import numpy as np

from checks import path_flags
from frozen import manifest as manifest_lib
from inference.server.access import keys
from inference.server.records import database, ledger
from models import flops, kv_cache, model_config
from studies import prices as prices_lib
from studies.common import figure, study_flags
from training.planning import scaling_laws

_BYTES, _FOUR_BITS = 2.0, 0.5625  # of a weight: bfloat16; int4 with scales
_LAW = scaling_laws.BESIROGLU
_SIZES = 4e7, 2e10  # parameters of the models that the law was fitted to


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
  """The tokens of a mean request."""

  prompt: float
  answer: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rates:
  """How much of a device's peaks is used; or measured tokens per second."""

  training_share: float = 0.4
  prompt_share: float = 0.5
  answer_share: float = 0.6  # of the memory's peak bytes/s
  batch: int = 16  # sequences that share a decode step
  prompt_tokens_per_s: float = 0.0  # of one device; 0: from the model of time
  answer_tokens_per_s: float = 0.0

  def validate(self) -> None:
    """Raises ValueError for shares outside (0, 1], batches < 1, rates < 0."""
    for name in ('training_share', 'prompt_share', 'answer_share'):
      value = getattr(self, name)
      if not 0 < value <= 1:
        raise ValueError(
          f'--{name}: got {value}, expected more than 0 and at most 1'
        )
    if self.batch < 1:
      raise ValueError(f'--batch: got {self.batch}, expected at least 1')
    for name in ('prompt_tokens_per_s', 'answer_tokens_per_s'):
      value = getattr(self, name)
      if not 0 <= value < math.inf:
        raise ValueError(
          f'--{name}: got {value}, expected a measured rate, or 0 for none'
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bill:
  """The cost of a model: once, and for every request."""

  name: str
  once: float
  per_request: float
  loss: float | None  # nats per token by the law; None: outside of the law

  def total(self, requests: float) -> float:
    """Returns the cost of the model and of a number of requests."""
    return self.once + requests * self.per_request


@dataclasses.dataclass(frozen=True, kw_only=True)
class Costs:
  """Costs on the device of a price, at some rates."""

  price: prices_lib.Price
  rates: Rates

  def training(self, num_flops: float) -> float:
    """Returns the price of training FLOPs in bfloat16."""
    peak = self.price.peaks.flops_per_s['bfloat16']
    return self.price.of_seconds(num_flops / (peak * self.rates.training_share))

  def request(
    self,
    config: model_config.ModelConfig,
    request: Request,
    *,
    size: float = 1.0,
    weight_bytes: float = _BYTES,
  ) -> float:
    """Returns the price of a request.

    Args:
      config: config of the model.
      request: tokens of the request.
      size: parameters of the billed model, over the parameters of `config`.
      weight_bytes: bytes of each weight.
    """
    peaks, rates = self.price.peaks, self.rates
    params = flops.num_matmul_params(config) * size
    context = request.prompt + request.answer / 2
    per_prompt_token = (
      2 * params / (peaks.flops_per_s['bfloat16'] * rates.prompt_share)
    )
    rows, width = kv_cache.rows_and_width(config)
    # The cache grows about as the square root of the parameters.
    cache = config.num_layers * rows * width * _BYTES * size**0.5
    step_bytes = params * weight_bytes / rates.batch + context * cache
    per_answer_token = max(
      step_bytes / (peaks.bytes_per_s * rates.answer_share),
      per_prompt_token,
    )
    # Measured rates belong to this model in this form. For another model they
    # are scaled by the ratio of the modelled times.
    base = self if (size, weight_bytes) == (1.0, _BYTES) else None
    if rates.prompt_tokens_per_s:
      per_prompt_token = size / rates.prompt_tokens_per_s
    if rates.answer_tokens_per_s:
      modelled = 1.0
      if base is None:
        bare = Costs(
          price=self.price,
          rates=dataclasses.replace(rates, answer_tokens_per_s=0.0),
        )
        only = Request(prompt=0.0, answer=1.0)
        modelled = bare.request(
          config, only, size=size, weight_bytes=weight_bytes
        ) / bare.request(config, only)
      per_answer_token = modelled / rates.answer_tokens_per_s
    return self.price.of_seconds(
      request.prompt * per_prompt_token + request.answer * per_answer_token
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """The sizes of the ways to change a bill."""

  distil_share: float = 0.25
  think_factor: float = 4.0
  larger_factor: float = 4.0

  def validate(self) -> None:
    """Raises ValueError for shares outside (0, 1) and factors up to 1."""
    if not 0 < self.distil_share < 1:
      raise ValueError(
        f'--distil_share: got {self.distil_share}, expected a share of the'
        ' parameters, more than 0 and less than 1'
      )
    for name in ('think_factor', 'larger_factor'):
      if not 1 < getattr(self, name) < math.inf:
        raise ValueError(
          f'--{name}: got {getattr(self, name)}, expected a number above 1'
        )


def bills(
  manifest: manifest_lib.Manifest,
  costs: Costs,
  request: Request,
  options: Options,
) -> list[Bill]:
  """Returns the bill of a model as it is, and the bills of its alternatives."""
  config = model_config.ModelConfig.from_dict(manifest.model)
  size, tokens = manifest.num_params, manifest.tokens_seen
  once = costs.training(manifest.training_flops)
  thinking = dataclasses.replace(
    request, answer=request.answer * options.think_factor
  )
  share, factor = options.distil_share, options.larger_factor
  # The student's own steps, and a forward pass of the teacher, a third of one
  # of its own steps, for every token.
  distilled = once * (1 + share + 1 / 3)

  def bill(name, once, per_request, size=None):
    # A law is not valid outside of the sizes that it was fitted to.
    if not tokens or size is None or not _SIZES[0] <= size <= _SIZES[1]:
      loss = None
    else:
      loss = _LAW.loss(size, tokens)
    return Bill(name=name, once=once, per_request=per_request, loss=loss)

  return [
    bill('as it is', once, costs.request(config, request), size),
    bill(
      'quantise to 4 bits',
      once,
      costs.request(config, request, weight_bytes=_FOUR_BITS),
    ),
    bill(
      f'distil to {share:g} of it',
      distilled,
      costs.request(config, request, size=share),
    ),
    bill(
      f'think {options.think_factor:g} x longer',
      once,
      costs.request(config, thinking),
    ),
    bill(
      f'train {factor:g} x larger',
      once * factor,
      costs.request(config, request, size=factor),
      size * factor,
    ),
  ]


def crossing(first: Bill, second: Bill) -> float | None:
  """Returns the number of requests at which bills are equal, or None."""
  saved = first.per_request - second.per_request
  if not saved:
    return None
  found = (second.once - first.once) / saved
  return found if found > 0 else None


def used(path: str) -> tuple[Request, float]:
  """Returns the mean request of a server's records, and requests per day.

  Raises:
    ValueError: there is no such file, or it has no request.
  """
  if not pathlib.Path(path).is_file():
    raise ValueError(
      f'--records: got {path}, which does not exist, expected the file that a'
      ' server was given with --records'
    )
  records = database.Database(path, tables=[keys.TABLES, ledger.TABLES])
  try:
    row = records.submit(
      lambda connection: connection.execute(
        'SELECT count(*), avg(prompt_tokens), avg(completion_tokens),'
        ' max(opened_at) - min(opened_at) FROM ledger WHERE outcome IS NOT NULL'
      ).fetchone()
    ).result()
  finally:
    records.close()
  count, prompt, answer, seconds = tuple(row)
  if not count:
    raise ValueError(
      f'--records: got {path} without a request that has ended, expected some'
    )
  # One request has no time between first and last: a day's worth is itself.
  per_day = count / max(seconds / 86_400, 1.0)
  return Request(prompt=prompt, answer=answer), per_day


def report(
  found: list[Bill], price: prices_lib.Price, requests: float, per_day: float
) -> str:
  """Returns both tables in Markdown, with the price's date and source."""
  base = found[0]
  lines = [
    f'{price.name}: {price.device_hour:g} {price.currency} per hour of'
    f' {price.device}, {price.date}; {price.source}',
    '',
    '| training | a request | inference overtakes training after | day |',
    '|---|---|---|---|',
    f'| {base.once:.4g} | {base.per_request:.4g} | {_overtaken(base)} |'
    f' {_day(base, per_day)} |',
    '',
    f'| way | once | a request | {requests:.3g} requests | against as it is |'
    ' equal bills at | loss, nats/token |',
    '|---|---|---|---|---|---|---|',
  ]
  for bill in found:
    total, whole = bill.total(requests), base.total(requests)
    share = f'{total / whole - 1:+.1%}' if whole else '-'
    at = crossing(base, bill)
    cells = (
      bill.name,
      f'{bill.once:.4g}',
      f'{bill.per_request:.4g}',
      f'{total:.4g}',
      share if bill is not base else '',
      f'{at:.3g} requests' if at else '-',
      '-' if bill.loss is None else f'{bill.loss:.3f}',
    )
    lines.append(f'| {" | ".join(cells)} |')
  think, larger = found[3], found[4]
  at = crossing(think, larger)
  lines += [
    '',
    f'{larger.name} costs less than to {think.name} '
    + (f'from {at:.3g} requests on' if at else 'at no number of requests'),
  ]
  return '\n'.join(lines)


def _overtaken(bill: Bill) -> str:
  if not bill.once:
    return 'the manifest has no FLOPs of training'
  return f'{bill.once / bill.per_request:.3g} requests'


def _day(bill: Bill, per_day: float) -> str:
  if not bill.once:
    return '-'
  days = bill.once / bill.per_request / per_day
  if days > 365_000:
    return f'day {days:.3g}'
  day = datetime.date.today() + datetime.timedelta(days=math.ceil(days))
  return f'{day}, day {days:.3g} at {per_day:.3g} requests a day'


def panels(found: list[Bill], currency: str) -> list[figure.Panel]:
  """Returns the total of each way over the number of requests."""
  base = found[0]
  middle = base.once / base.per_request or 1.0
  requests = np.geomspace(middle / 1e3, middle * 1e3, 60)
  return [
    figure.Panel(
      title='the bill',
      x_label='requests',
      y_label=f'training and inference, {currency}',
      lines={
        bill.name: figure.Line(
          x=requests.tolist(), y=[bill.total(r) for r in requests.tolist()]
        )
        for bill in found
      }
      | {
        'training alone': figure.Line(
          x=requests.tolist(), y=[base.once] * len(requests), style=':'
        )
      },
      log_x=True,
      log_y=True,
      log_base=10,
    )
  ]


def _define_flags() -> None:
  path_flags.DEFINE_path('model', None, 'Frozen directory.', required=True)
  path_flags.DEFINE_path(
    'prices', None, 'Price file, see studies/prices.py.', required=True
  )
  path_flags.DEFINE_path(
    'records',
    '',
    "Records of a server (its --records): the tokens of a request and a day's"
    ' number of requests come from its ledger.',
  )
  flags.DEFINE_float('tokens_in', 500, 'Tokens of a prompt.')
  flags.DEFINE_float('tokens_out', 200, 'Tokens of an answer.')
  flags.DEFINE_float('requests_per_day', 1e5, 'Requests of a day.')
  flags.DEFINE_float('requests', 0, 'Requests in all; 0: requests of a year.')
  for fields in (Rates, Options):
    for field in dataclasses.fields(fields):
      define: Any = (
        flags.DEFINE_integer if field.type is int else flags.DEFINE_float
      )
      define(field.name, field.default, _HELP[field.name])


_HELP = {
  'training_share': "Share of the device's peak FLOP/s that training reaches.",
  'prompt_share': 'Share of the peak FLOP/s that prompts reach.',
  'answer_share': 'Share of the peak bytes/s of memory that answers reach.',
  'batch': 'Sequences that share a decode step.',
  'prompt_tokens_per_s': 'Prompt tokens per second, measured on one device; 0:'
  ' from the model of time.',
  'answer_tokens_per_s': 'Answer tokens per second, measured on one device; 0:'
  ' from the model of time.',
  'distil_share': 'Parameters of the student, as a share of the model.',
  'think_factor': 'Factor of the tokens of an answer that thinks longer.',
  'larger_factor': 'Factor of the parameters of the larger model.',
}


def _taken(kind, values):
  """Returns the Rates or Options from the flags, validated."""
  found = kind(
    **{
      field.name: getattr(values, field.name)
      for field in dataclasses.fields(kind)
    }
  )
  found.validate()
  return found


def run(values: Any, figure_path: str = '') -> str:
  """Returns the tables of the flags' values; draws the figure if asked to.

  Raises:
    ValueError, OSError: a value is wrong, or a file cannot be read.
  """
  price = prices_lib.read(values.prices)
  request = Request(prompt=values.tokens_in, answer=values.tokens_out)
  per_day = values.requests_per_day
  if values.records:
    request, per_day = used(values.records)
  for name, value in (
    ('tokens_in', request.prompt),
    ('tokens_out', request.answer),
    ('requests_per_day', per_day),
  ):
    if not 0 < value < math.inf:
      raise ValueError(f'--{name}: got {value}, expected more than 0')
  if not 0 <= values.requests < math.inf:
    raise ValueError(
      f'--requests: got {values.requests}, expected a number of requests, or 0'
      ' for the requests of a year'
    )
  manifest = manifest_lib.read(pathlib.Path(values.model))
  costs = Costs(price=price, rates=_taken(Rates, values))
  found = bills(manifest, costs, request, _taken(Options, values))
  if figure_path:
    figure.save(figure_path, panels(found, price.currency))
  return report(found, price, values.requests or 365 * per_day, per_day)


def main(argv: list[str]) -> int:
  """Prints the tables and draws the figure; errors are one line."""
  if len(argv) > 1:
    raise app.UsageError(f'got unknown arguments {argv[1:]}, expected flags')
  try:
    print(run(flags.FLAGS, study_flags.FIGURE.value))
  except (ValueError, OSError) as error:
    print(f'error: {error}')
    return 1
  return 0


if __name__ == '__main__':
  # Not at import: other commands have flags of these names.
  _define_flags()
  app.run(main)
