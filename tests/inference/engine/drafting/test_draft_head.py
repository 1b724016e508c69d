"""A draft head changes no token, and its states follow the pages."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from frozen import draft_heads, format as frozen_format, manifest
from inference import drafts, generate
from inference.engine import device_state, engine_config
from inference.engine.compiled import layered
from inference.requests import requests
from inference.sampling import settings as settings_lib
from inference.server.versions import memory
from models import transformer
from models.layers import draft_head
from tests.helpers import frozen_dirs
from tests.helpers.serving import guesses, reference_engine, trained_heads
from tests.inference.engine import test_engine_matrix
from tests.inference.engine.drafting import test_draft_model

_Settings = settings_lib.Settings
_LAYOUT = test_draft_model._LAYOUT


@pytest.mark.slow
def test_one_function_with_a_draft_head():
  """In crowds, with prefix hits, chunks, forks and preemptions."""
  engine = reference_engine.engine(**_LAYOUT, has_head=True)
  test_engine_matrix._check_alone('llama', engine)
  with guesses.verified_beside(engine) as beside:
    test_engine_matrix._check_crowds(
      'llama', engine, num_crowds=2, num_requests=24
    )
  assert sum(beside.values()) > 20
  assert min(guesses.counted(engine)) > 50, guesses.counted(engine)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['_DENSE', '_PAGE_1', '_PAGE_64'])
def test_one_function_with_a_draft_head_for_every_page_size(name):
  layout = {**getattr(test_engine_matrix, name), 'draft_tokens': 3}
  engine = reference_engine.engine(**layout, has_head=True)
  test_engine_matrix._check_alone('llama', engine)
  test_engine_matrix._check_crowds(
    'llama', engine, num_crowds=2, num_requests=24
  )


class _Offline:
  """Guesses without an engine: from one pass over the whole text."""

  def __init__(self, config, params, weights):
    self._model, self._params = transformer.Transformer(config), params
    self._weights = weights
    self._states = jax.jit(
      lambda ids: self._model.apply(params, ids, method='hidden')[0]
    )
    self._table_VD = self._apply(method='head_matrix')

  def _apply(self, *args, **fields):
    return self._model.apply(self._params, *args, **fields)

  def __call__(self, tokens, length, noise):
    """Returns the best tokens behind known ones, and the smallest margin.

    Args:
      tokens: known.
      length: of the draft.
      noise: function of a position, added to the logits, [V].
    """
    ids = np.zeros((1, reference_engine.MAX_LENGTH), np.int32)
    ids[0, : len(tokens)] = tokens
    state_D, num = self._states(ids)[0, len(tokens) - 2], self._weights.num_ids
    last, found, margins = tokens[-1], [], []
    for index in range(length):
      rows = self._apply(jnp.array([[last]]), method='token_rows')
      state_D = draft_head.advanced(
        self._weights.head, state_D, rows[0, 0], jnp.float32
      )
      logits_1K = draft_head.logits(
        state_D[None], self._table_VD[:num], 0.0, jnp.float32
      )
      scores_K = logits_1K[0] + noise(len(tokens) + index)[:num]
      second, first = np.sort(scores_K)[-2:]
      last = int(np.argmax(scores_K))
      found.append(last)
      margins.append(first - second)
    return found, min(margins)


def _noise(live, vocab_size):
  """Returns the noise of a sequence, without filters, times its temperature."""
  temperature = live._request.settings.temperature
  words = np.array([live.seed >> 32, live.seed & 0xFFFFFFFF], np.uint32)
  return lambda position: (
    temperature * reference_engine._gumbel(words, position, vocab_size)
  )


@pytest.mark.slow
@pytest.mark.parametrize('is_layered', [False, True])
def test_states_follow_pages(is_layered, monkeypatch):
  """Each draft begins with the state that the text alone has.

  After prefix hits, forks, preemptions, cancellations, and drafts that were
  accepted or rejected.
  """
  if is_layered:
    monkeypatch.setattr(layered, 'MIN_LAYER_BYTES', 0)
  config, params = reference_engine.model_config(), reference_engine.params()
  weights = trained_heads.weights(config, params)
  engine = reference_engine.engine_of(
    config,
    draft=weights,
    **{**_LAYOUT, 'page_size': 4, 'num_pages': 120},
    speculation='head',
    draft_head='given',
  )
  assert engine._programs._is_layered == is_layered
  engine._speculator._choice.costs = guesses.Costs()
  filled, made = engine.draft.filled, []

  def recorded(step, state):
    found = filled(step, state)
    for span in found.decodes:
      if span.length > 1:
        live = engine._live[span.sequence]
        made.append((tuple(span.sequence.tokens), span.tokens[1:], live))
    return found

  monkeypatch.setattr(engine.draft, 'filled', recorded)
  rng = np.random.default_rng(0)
  wanted = [
    requests.Request(
      prompt_ids=tuple(range(30, 30 + length)),
      settings=_Settings(
        max_tokens=24, seed=number, n=1 + (number % 4 == 0),
        temperature=0.8 * (number % 3 > 0), ignore_eos=True,
      ),
    )
    for number, length in enumerate((40, 17, 40, 1, 64, 33, 40, 17, 64, 5))
  ]  # fmt: skip
  before = guesses.counted(engine)
  served = reference_engine.serve(
    engine, wanted, rng=rng, spread=10, preemptions=(0, 1, 2)
  )
  assert sum(served.preemptions.values()) > 3
  assert any(
    each.usage.cached_tokens for some in served.completions for each in some
  )
  cancelled = engine.submit(wanted[0])
  while not (engine._flight and engine._flight.step.is_verified):
    engine.step()
  engine.cancel(cancelled)
  reference_engine.serve(engine, [wanted[2], wanted[3]])
  assert min(np.subtract(guesses.counted(engine), before)) > 10
  offline, checked = _Offline(config, params, weights), []
  for tokens, guess, live in made:
    noise = _noise(live, engine.tokenizer.vocab_size)
    expected, margin = offline(tokens, len(guess), noise)
    # Both round differently: near ties say nothing.
    if margin > 1e-3:
      assert guess == tuple(expected)
      checked.append(len(guess))
  assert len(checked) > 80
  assert max(checked) == 3


@pytest.mark.slow
def test_a_head_belongs_to_its_weights(tmp_path):
  base = frozen_dirs.write(tmp_path / 'model')
  target = frozen_format.open_directory(tmp_path / 'model')
  width = target.config.model_width
  provenance = manifest.Provenance(
    **{
      field.name: getattr(base, field.name)
      for field in dataclasses.fields(manifest.Provenance)
    }
  )
  written = draft_heads.write(
    tmp_path / 'head',
    draft_head.init(width, 2 * width, jax.random.key(0)),
    base_digest=base.weights_digest,
    num_ids=100,
    provenance=provenance,
    texts={},
  )
  config = engine_config.EngineConfig(
    speculation='head',
    draft_head=str(tmp_path / 'head'),
    max_sequences=2,
    decode_shapes=(2,),
    num_pages=20,
  )
  generator = generate.load(tmp_path / 'model', config)
  engine = generator.engine
  # The plan of the memory knows the sizes from the manifests alone.
  model = target.config
  found = drafts.memory(config, model, base.dtype, engine.backend, 'cpu')
  planned, per_token = found.num_bytes(270), found.bytes_per_token
  assert planned == engine.draft.num_bytes
  assert planned == 4 * (written.num_params + 100 * width)
  # Two devices share the rows that they unembed with.
  assert found.num_bytes(50) == planned - 4 * 50 * width
  wide = dataclasses.replace(model, model_width=2 * width)
  with pytest.raises(ValueError, match=f'draft_head: got .* width {width}, ex'):
    drafts.memory(config, wide, base.dtype, engine.backend, 'cpu')
  assert per_token == engine.backend.beside_bytes == 4 * width
  plain = dataclasses.replace(config, speculation='off', draft_head='')
  more = memory.plan(base, config), memory.plan(base, plain)
  assert more[0].weights - more[1].weights == planned
  held = [leaf.nbytes for leaf in jax.tree.leaves(engine._state.kv_cache[-1])]
  assert sum(held) == 21 * engine.page_tokens * per_token
  assert '; draft head 0 MiB, and 0 MiB of the' in generator.memory_text()
  engine.release()

  other = dataclasses.replace(base, weights_digest='ab' * 32)
  with pytest.raises(ValueError, match='got a draft head of weights .* train'):
    draft_heads.read(tmp_path / 'head', other)
  with pytest.raises(ValueError, match='draft head, expected a frozen one'):
    frozen_format.open_directory(tmp_path / 'head')
  with pytest.raises(FileNotFoundError, match='expected the directory of a dr'):
    draft_heads.read(tmp_path / 'absent', base)
  with pytest.raises(ValueError, match='it is not of a draft head'):
    draft_heads.read(tmp_path / 'model', base)
  path = tmp_path / 'head' / draft_heads.FILE
  damaged = bytearray(path.read_bytes())
  damaged[-1] ^= 1
  path.write_bytes(damaged)
  with pytest.raises(ValueError, match='copy or freeze the directory again'):
    draft_heads.read(tmp_path / 'head', base)


def test_states_in_pages_are_never_quantised():
  for dtype, kv_dtype, expected in (
    ('float32', 'float32', 'float32'),
    ('float32', 'int8', 'float32'),
    ('bfloat16', 'uint8', 'uint16'),  # the bits of fp8, and of bfloat16
    ('bfloat16', 'bfloat16', 'bfloat16'),
  ):
    assert device_state.hidden_dtype(dtype, kv_dtype) == expected


def test_settings_of_a_draft_head_that_cannot_be_are_refused():
  for fields, message in (
    ({'speculation': 'head'}, 'draft_head: got none with speculation = head'),
    ({'draft_head': 'd'}, 'draft_head: got d with speculation = off'),
  ):
    with pytest.raises(ValueError, match=message):
      engine_config.EngineConfig(**fields)
  with pytest.raises(ValueError, match="'head' with nothing that drafts, exp"):
    reference_engine.engine_of(
      reference_engine.model_config(), speculation='head', draft_head='absent'
    )
