"""The fleet to buy for a load: replicas, devices and money, by simulation.

    python -m studies.serving_fleet --config=experiments/pretrain.py:8b \
      --target=h100:1 --loads=2,8,32 --workdir=runs/fleet \
      --prices=experiments/prices/h100_rented.json

For each load, in requests per second, it finds the fewest replicas whose 99th
percentiles of time to first token and of time per token are within the limits.
The replicas run the engine's own scheduler (`studies.fleet`); requests have
bursts, long tails and shared prefixes, and are placed as a server would place
them. A step costs its roofline (`serve.py --plan`) over --efficiency: measure
that on the device, since the answer is in proportion to it. The default of 0.6
is an assumption; vLLM's 6.44 ms per token of an 8B model on an H100 are 0.74.

The other way round, --replicas finds the largest load of each number of
replicas, with a figure:

    python -m studies.serving_fleet --config=experiments/pretrain.py:8b \
      --replicas=1,2,4,8,16,32,64 --seconds=120 --workdir=runs/fleet \
      --placements=affinity,affinity:4,least_busy \
      --prices=experiments/prices/h100_rented.json --figure=fleet.svg

`python -m studies.fleet.measured` compares the simulator with an engine.
"""

from collections.abc import Callable, Sequence
import dataclasses
import json
import pathlib

from absl import app, flags

from checks import expect, path_flags
from hardware import targets
from inference.engine import engine_config
from inference.planning import plan as plan_lib, subject
from inference.server.replicas import placement as placement_lib
from storage import atomic
from studies import prices as prices_lib
from studies.common import figure, load, study_flags
from studies.fleet import costs, fleet, placing, replica, sizes, traffic

PAGE_TOKENS = 64
_LEAST_REQUESTS = 2000  # of a simulation: 20 are beyond a 99th percentile
# `affinity:N` is affinity with a margin of N open requests; `affinity` has that
# of a server.
PLACEMENTS = 'affinity', 'least_busy', 'in_turn'
# Flags that decide a simulation.
_DECIDING = (
  'model', 'config', 'target', 'efficiency', 'host_seconds', 'seconds',
  'burstiness', 'prefix_share', 'max_sequences',
)  # fmt: skip
_HEAD = (
  'load', 'placement', 'replicas', 'devices', 'first p50', 'first p99',
  'token p50', 'token p99', 'cached', 'busy', 'per hour', 'per 1M tokens',
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wanted:
  """The limits of a fleet, in seconds, and its most replicas."""

  to_first_p99: float
  per_token_p99: float
  most_replicas: int

  def met_by(self, found: fleet.Summary) -> bool:
    """Returns whether a fleet is fast enough."""
    return (
      found.to_first_p99 <= self.to_first_p99
      and found.per_token_p99 <= self.per_token_p99
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bought:
  """The fewest replicas for a load; the most allowed if none is enough."""

  load: float  # requests per second
  placement: str
  num_replicas: int
  num_devices: int
  found: fleet.Summary
  is_enough: bool


def fewest(
  run: Callable[[int], fleet.Summary], wanted: Wanted, first: int
) -> tuple[int, fleet.Summary]:
  """Returns the fewest replicas that are enough, of a growing series.

  Each number is an eighth larger than the one before, at least by 1.

  Args:
    run: simulates a number of replicas.
    wanted: the limits.
    first: number to begin with.
  """
  num = min(max(first, 1), wanted.most_replicas)
  while not wanted.met_by(found := run(num)) and num < wanted.most_replicas:
    num = min(max(num + 1, round(num * 1.125)), wanted.most_replicas)
  return num, found


class Buyer:
  """Simulates fleets of one plan."""

  def __init__(
    self, settings: replica.Settings, table: costs.Costs, tensor: int
  ):
    """Keeps what all fleets have in common.

    Args:
      settings: of each replica.
      table: of the costs of its steps.
      tensor: devices of a replica.
    """
    self.settings, self.table, self.tensor = settings, table, tensor

  def run(
    self, requests: Sequence[traffic.Request], placement: str, num: int
  ) -> fleet.Summary:
    """Returns the speed of a number of replicas."""
    replicas = [
      replica.Replica(self.settings, self.table, index) for index in range(num)
    ]
    tokens = self.settings.num_pages * self.settings.limits.page_size
    name, _, margin = placement.partition(':')
    usual = placement_lib.margin_of(self.settings.limits.max_sequences)
    place: fleet.Place = {
      'affinity': placing.Affinity(tokens, int(margin or usual)),
      'least_busy': fleet.least_busy,
      'in_turn': fleet.in_turn,
    }[name]
    return fleet.summary(fleet.simulate(replicas, requests, place), replicas)

  def capacity(self, like: traffic.Traffic) -> float:
    """Returns the requests per second of a replica that is never idle."""
    asked = traffic.requests(like, 2 * self.settings.limits.max_sequences)
    at_once = [dataclasses.replace(each, arrival=0.0) for each in asked]
    return self.run(at_once, 'least_busy', 1).requests_per_s

  def bought(
    self,
    like: traffic.Traffic,
    wanted: Wanted,
    placement: str,
    seconds: float,
  ) -> Bought:
    """Returns the fewest replicas for a load."""
    requests = traffic.requests(like, max(round(like.rate * seconds), 100))
    # Well below the number that would be enough if requests came evenly.
    first = int(0.6 * like.rate / self.capacity(like))
    num, found = fewest(
      lambda num: self.run(requests, placement, num), wanted, first
    )
    return Bought(
      load=like.rate,
      placement=placement,
      num_replicas=num,
      num_devices=num * self.tensor,
      found=found,
      is_enough=wanted.met_by(found),
    )


def table(found: Sequence[Bought], price: prices_lib.Price | None) -> str:
  """Returns the table of fleets, as Markdown."""
  lines = [_HEAD, ('---',) * len(_HEAD)]
  for each in found:
    speed = each.found
    hour = each.num_devices * price.device_hour if price else None
    lines.append(
      (
        f'{each.load:g}/s',
        each.placement,
        f'{each.num_replicas}' if each.is_enough else 'none is enough',
        f'{each.num_devices}',
        *(
          f'{value:.3g} s' for value in (speed.to_first_p50, speed.to_first_p99)
        ),
        *(
          f'{1000 * value:.3g} ms'
          for value in (speed.per_token_p50, speed.per_token_p99)
        ),
        f'{speed.cached:.0%}',
        f'{speed.busy:.0%}',
        f'{hour:.2f} {price.currency}' if price and hour else '-',
        f'{hour / 3600 / speed.tokens_per_s * 1e6:.2f}' if hour else '-',
      )
    )
  return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def _plan_of(values) -> plan_lib.Plan:
  found = subject.of(
    values.model, values.config, lambda name: load.experiment(name, '--config')
  )
  planned = plan_lib.make(found, values.target, is_compiled=False)
  if not planned.num_sequences(planned.config.max_length):
    raise ValueError(
      f'--target: got {values.target}, which does not hold {found.name};'
      ' expected a target that holds a replica, see serve.py --plan'
    )
  return planned


def _buyer(planned: plan_lib.Plan, values) -> Buyer:
  length = planned.config.max_length
  engine = engine_config.EngineConfig(
    max_sequences=values.max_sequences, page_size=PAGE_TOKENS
  )
  num_pages = planned.num_sequences(length) * -(-length // PAGE_TOKENS)
  settings = replica.Settings(
    limits=engine.limits(PAGE_TOKENS),
    num_pages=num_pages + 1,
    decode_steps=engine.decode_steps,
    stream_seconds=engine.stream_seconds,
  )
  steps = costs.Roofline(
    plan=planned,
    efficiency=values.efficiency,
    host_seconds=values.host_seconds,
  )
  return Buyer(settings, steps, planned.tensor)


def _loads(given: Sequence[str]) -> list[float]:
  try:
    found = [float(each) for each in given]
  except ValueError:
    found = []
  if not found or min(found) <= 0:
    raise ValueError(
      f'--loads: got {",".join(given)}, expected requests per second, as 2,8,32'
    )
  return found


def _check_placement(given: str) -> None:
  name, _, margin = given.partition(':')
  expect.one_of('--placements', name, PLACEMENTS)
  if (name != 'affinity' and margin) or not (margin or '0').isdecimal():
    raise ValueError(
      f'--placements: got {given}, expected a name, or affinity:N with the most'
      ' open requests more than the least busy replica has'
    )


def _draw(path: str, found: Sequence[Bought]) -> None:
  def line(placement: str, value: Callable[[Bought], float]) -> figure.Line:
    own = [x for x in found if x.placement == placement and x.is_enough]
    return figure.Line(x=[x.load for x in own], y=[value(x) for x in own])

  names = list(dict.fromkeys(x.placement for x in found if x.is_enough))
  panels = [
    figure.Panel(
      title=title,
      x_label='requests per second',
      y_label=title,
      lines={name: line(name, value) for name in names},
      log_x=True,
      log_y=title == 'replicas',
    )
    for title, value in (
      ('replicas', lambda x: x.num_replicas),
      ('share of the time that devices compute', lambda x: x.found.busy),
    )
  ]
  figure.save(path, panels, share_y=False)


def _bought(
  buyer: Buyer, like: traffic.Traffic, wanted: Wanted, price, values
) -> list[Bought]:
  """Returns the fleets of all loads and placements; prints each."""
  found = []
  for rate in _loads(values.loads):
    at_rate = dataclasses.replace(like, rate=rate)
    for placement in values.placements:
      found.append(buyer.bought(at_rate, wanted, placement, values.seconds))
      print(table(found[-1:], price).splitlines()[-1], flush=True)
  return found


def _carried(
  buyer: Buyer,
  like: traffic.Traffic,
  wanted: Wanted,
  values,
  workdir: pathlib.Path,
) -> list[sizes.Carried]:
  """Returns the loads of all numbers of replicas and placements."""

  def run(placement: str, num: int, load: float) -> fleet.Summary:
    asked = traffic.requests(
      dataclasses.replace(like, rate=load),
      sizes.num_requests(load, values.seconds, _LEAST_REQUESTS),
    )
    found = kept.get(
      f'{placement} {num} {load:.6g}',
      lambda: buyer.run(asked, placement, num),
    )
    print(
      f'{num} replicas, {placement}, {load:.3g} requests/s: first token'
      f' {found.to_first_p99:.3g} s, token {found.per_token_p99:.3g} s (p99)',
      flush=True,
    )
    return found

  settings = {name: values[name].value for name in _DECIDING}
  kept = sizes.Kept(workdir / 'simulated.jsonl', settings)
  replicas = sizes.counts(values.replicas)
  # Bursts: a replica alone carries less than half of what it could do.
  first = buyer.capacity(like) / 4
  return [
    each
    for placement in values.placements
    for each in sizes.carried(
      run,
      wanted.met_by,
      replicas=replicas,
      placement=placement,
      tensor=buyer.tensor,
      first=first,
    )
  ]


def main(argv: list[str]) -> None:
  """Simulates fleets; prints and saves what to buy."""
  workdir = study_flags.begin(argv)
  values = flags.FLAGS
  try:
    for placement in values.placements:
      _check_placement(placement)
    price = prices_lib.read(values.prices) if values.prices else None
    planned = _plan_of(values)
    if price and price.device != planned.device_kind:
      raise ValueError(
        f'--prices: got the price of {price.device}, expected one of'
        f' {planned.device_kind}, the device of --target'
      )
    buyer = _buyer(planned, values)
    wanted = Wanted(
      to_first_p99=values.to_first_p99,
      per_token_p99=values.per_token_p99,
      most_replicas=values.most_replicas,
    )
    like = traffic.Traffic(
      rate=1.0,
      most_tokens=planned.config.max_length,
      burstiness=values.burstiness,
      prefix_share=values.prefix_share,
    )
    path = study_flags.FIGURE.value
    if values.replicas:
      found = _carried(buyer, like, wanted, values, workdir)
      text = sizes.table(found, price)
      if path:
        sizes.draw(path, found)
    else:
      found = _bought(buyer, like, wanted, price, values)
      text = table(found, price)
      if path:
        _draw(path, found)
  except (ValueError, FileNotFoundError) as error:
    raise SystemExit(f'error: {error}') from None
  title = (
    f'{planned.subject.name} on {planned.target} per replica, tensor'
    f' {planned.tensor}, efficiency {values.efficiency:g}'
  )
  print(f'\n{title}\n\n{text}')
  rows = [dataclasses.asdict(each) for each in found]
  atomic.write_text(
    workdir / 'serving_fleet.json', json.dumps(rows, indent=2) + '\n'
  )


def _define_flags() -> None:
  path, number = path_flags.DEFINE_path, flags.DEFINE_float
  path('model', None, 'Frozen directory of the model.')
  flags.DEFINE_string(
    'config',
    None,
    'Model without weights: an experiment, such as experiments/pretrain.py:8b,'
    ' or a config.json.',
  )
  flags.DEFINE_string('target', 'h100:1', 'Devices of one replica.')
  flags.DEFINE_list('loads', ['2', '8', '32'], 'Requests per second.')
  flags.DEFINE_list(
    'replicas',
    [],
    'Numbers of replicas, in place of --loads: finds the largest load of each.',
  )
  flags.DEFINE_list(
    'placements',
    ['affinity', 'least_busy'],
    'Placements of requests on replicas: affinity, least_busy, in_turn; or'
    ' affinity:N, where the replica that knows a prefix may have N open'
    ' requests more than the least busy one.',
  )
  path('prices', '', 'Price file, see studies/prices.py.')
  number('efficiency', 0.6, 'Share of the roofline that steps reach.')
  number(
    'host_seconds',
    5e-4,
    'Seconds of the host per dispatch; benchmarks/engine_host.py measures it.',
  )
  number('seconds', 60.0, 'Seconds of traffic of each load.')
  number(
    'to_first_p99', 2.0, 'Most seconds to the first token, 99th percentile.'
  )
  number('per_token_p99', 0.05, 'Most seconds per token, 99th percentile.')
  number('burstiness', 1.0, 'Squared coefficient of variation of the rate.')
  number('prefix_share', 0.7, 'Share of the requests with a shared prefix.')
  flags.DEFINE_integer('most_replicas', 64, 'Replicas to try at most.')
  flags.DEFINE_integer('max_sequences', 64, 'Sequences of a replica at once.')


if __name__ == '__main__':
  targets.prepare_environment()
  _define_flags()
  app.run(main)
