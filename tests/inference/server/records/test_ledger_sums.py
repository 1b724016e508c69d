"""For any interleaving, the ledger has what the engine has computed."""

import asyncio
import math

import hypothesis
from hypothesis import strategies

from inference.requests import requests as requests_lib
from inference.sampling import settings
from inference.server import app as app_lib, engine_loop, service
from inference.server.access import admission, keys
from inference.server.api import errors
from inference.server.http import exchanges
from inference.server.records import database, ledger

_KEYS = (
  None,
  keys.Key(id='key_a', name='a', weight=3.0),
  keys.Key(id='key_b', name='b', max_concurrent=2, tokens_per_minute=200),
)
_PRICES = admission.Prices(prompt=1.0, cached=0.25, completion=4.0)
_COUNTS = {  # of the engine, and the column of the ledger
  'prefill_tokens_total': 'prefill_tokens',
  'decode_tokens_total': 'decode_tokens',
  'sampled_tokens_total': 'completion_tokens',
  'preemptions_total': 'preemptions',
  'flops_total': 'flops',
}
_actions = strategies.lists(
  strategies.one_of(
    strategies.tuples(
      strategies.just('ask'),
      strategies.integers(1, 30),  # tokens of a prompt
      strategies.integers(1, 12),  # most of a completion
      strategies.integers(1, 3),  # completions per prompt
      strategies.integers(1, 2),  # prompts
      strategies.sampled_from(_KEYS),
    ),
    strategies.tuples(strategies.just('leave'), strategies.integers(0, 9)),
    strategies.tuples(strategies.just('read'), strategies.integers(0, 9)),
    strategies.tuples(strategies.just('wait'), strategies.integers(1, 9)),
    strategies.just(('stop',)),
    strategies.just(('fail',)),
  ),
  min_size=2,
  max_size=14,
)


class _Failing:
  """An engine that fails when told."""

  def __init__(self, engine):
    self._engine, self.fails = engine, False

  def __getattr__(self, name):
    return getattr(self._engine, name)

  def step(self):
    if self.fails:
      raise RuntimeError('the device is on fire')
    return self._engine.step()


class _Server:
  """A server without HTTP, which can stop, fail and start again."""

  def __init__(self, generator, records):
    self._generator, self.records = generator, records
    self.open, self.finished, self.num_asked = [], {}, 0

  def start(self):
    self.ledger = ledger.Ledger(self.records)
    self.admission = admission.Admission(self.ledger, _PRICES)
    self.engine = _Failing(self._generator.engine)
    shadow = type('Generator', (), {})()
    shadow.engine = self.engine
    shadow.memory_text = shadow.products_text = lambda: ''
    self.loop = engine_loop.EngineLoop(lambda: shadow)
    self.loop.start()
    self.model = service.ServedModel(
      'tiny',
      self.loop,
      self._generator.frozen.manifest,
      context=64,
      admission=self.admission,
    )

  async def stop(self):
    await self.loop.close()
    await self.read_all()
    await self.records.run(lambda _: None)  # after all that was to be written
    await asyncio.sleep(0)
    for each in self.admission._limits.values():
      assert (each.num_open, each.reserved) == (0, 0)
    value = self.ledger.metrics.registry.get_sample_value
    assert value('ledger_reservations_open') == 0

  async def ask(self, length, most, n, num, key):
    request_id = f'req_{self.num_asked}'
    self.num_asked += 1
    state = {'request_id': request_id, 'key': key}
    exchanges.begin(exchanges.Exchange({'state': state}))
    asked = [
      requests_lib.Request(
        prompt_ids=(length, *range(1, length)),
        settings=settings.Settings(max_tokens=most, n=n, ignore_eos=True),
        principal=key.name if key else '',
      )
      for _ in range(num)
    ]
    try:
      updates = await self.model.submit(asked)
    except errors.ApiError:
      pass  # a limit of the key, or a failed engine
    else:
      self.open.append((request_id, (num * length, num * n * most), updates))

  def leave(self, which):
    if self.open:
      self.open.pop(which % len(self.open))[2].close()

  async def read(self, which):
    if not self.open:
      return
    request_id, expected, updates = self.open.pop(which % len(self.open))
    try:
      async for _ in updates:
        pass
    except (engine_loop.Failed, engine_loop.Stopped):
      return
    self.finished[request_id] = expected
    # The client has its last bytes only now: the row is there.
    row = await self.records.run(
      lambda c: c.execute(
        'SELECT * FROM ledger WHERE request_id = ?', (request_id,)
      ).fetchone()
    )
    assert row['outcome'] == 'finished'

  async def read_all(self):
    while self.open:
      await self.read(0)


async def _run(server, actions):
  server.start()
  for name, *args in actions:
    match name:
      case 'ask':
        await server.ask(*args)
      case 'leave':
        server.leave(*args)
      case 'read':
        await server.read(*args)
      case 'wait':
        await asyncio.sleep(args[0] * 1e-3)
      case 'stop' | 'fail':
        server.engine.fails = name == 'fail'
        await server.stop()
        server.start()
  await server.read_all()
  await server.stop()


@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(actions=_actions)
def test_the_sums_of_the_ledger_are_those_of_the_engine(generator, actions):
  value = generator.engine.metrics.value
  before = {name: value(name) for name in _COUNTS}
  records = database.Database(None, tables=app_lib.TABLES)
  server = _Server(generator, records)
  asyncio.run(_run(server, actions))
  rows = records.submit(
    lambda c: list(map(dict, c.execute('SELECT * FROM ledger')))
  ).result()
  records.close()
  assert all(row['outcome'] for row in rows)
  for name, column in _COUNTS.items():
    computed = value(name) - before[name]
    billed = sum(row[column] for row in rows)
    assert math.isclose(billed, computed, rel_tol=1e-9), (name, rows)
  by_request = {row['request_id']: row for row in rows}
  assert len(by_request) == len(rows)  # none is billed twice
  for request_id, (num_prompt, num_made) in server.finished.items():
    row = by_request[request_id]
    assert row['prompt_tokens'] == num_prompt
    assert row['completion_tokens'] == num_made
  for row in rows:
    used = row['prompt_tokens'] + row['completion_tokens']
    assert used <= row['reserved_tokens']
    assert 0 <= row['price_nanos'] <= row['reserved_nanos']
    assert row['price_nanos'] == _PRICES.nanos(
      prompt=row['prompt_tokens'],
      cached=row['cached_tokens'],
      completion=row['completion_tokens'],
    )
