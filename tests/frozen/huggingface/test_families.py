"""Import and export of every family, against its reference implementation.

Skipped where torch and transformers are not installed
(requirements-peer.txt); CI installs them.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from frozen.huggingface import (
  config_json,
  exporting,
  importing,
  safetensors_files,
  tensor_map,
)
from models import kv_cache, transformer
from tests.helpers.open_weights import open_weights

_WHY = 'the oracle is not installed: pip install -r requirements-peer.txt'
torch = pytest.importorskip('torch', reason=_WHY)
transformers = pytest.importorskip('transformers', reason=_WHY)

# Past windows of 9, 11 and 70, past trained lengths of 16, 32 and 48, and past
# one block of 64 rows of attention.
LENGTH = 80
PROMPT, STEPS = 14, 64

# float32 sums in another order, on logits of up to about 10.
TOLERANCE = 2e-4


@pytest.fixture(autouse=True)
def _quiet():
  transformers.logging.set_verbosity_error()
  transformers.logging.disable_progress_bar()
  # Threads that wait for each other at full speed stop all tests beside them.
  num_threads = torch.get_num_threads()
  torch.set_num_threads(1)
  yield
  torch.set_num_threads(num_threads)


def _params():
  """All models; all but one of each family are slow tests."""
  families = set()
  for name, (family, _) in open_weights.MODELS.items():
    marks = [pytest.mark.slow] if family in families else []
    families.add(family)
    yield pytest.param(name, marks=marks)


@pytest.fixture(scope='module', params=list(_params()))
def pair(request, tmp_path_factory):
  """The reference model, its directory, our model and its params."""
  theirs = open_weights.build(request.param)
  directory = tmp_path_factory.mktemp(request.param)
  open_weights.save(theirs, directory)
  source = importing.open_source(directory)
  params = importing.load_params(source, 'float32')
  params = jax.tree.map(jnp.asarray, params)
  return theirs, directory, transformer.Transformer(source.config), params


def _tokens(batch, time, seed=0):
  return np.random.default_rng(seed).integers(0, 61, (batch, time))


def _theirs(model, tokens_BT, **kwargs):
  with torch.inference_mode():
    return model(torch.tensor(tokens_BT), **kwargs).logits.numpy()


def test_logits_are_theirs(pair):
  theirs, _, model, params = pair
  tokens_BT = _tokens(2, LENGTH)
  expected_BTV = _theirs(theirs, tokens_BT)
  logits_BTV, _ = jax.jit(model.apply)(params, jnp.asarray(tokens_BT))
  assert np.abs(expected_BTV).max() > 0.5  # so that a wrong detail would show
  np.testing.assert_allclose(logits_BTV, expected_BTV, atol=TOLERANCE, rtol=0)


def _depends_on_length(model) -> bool:
  """Rotary positions that a longer text changes, in both implementations."""
  return model.config.rope_scaling.kind == 'dynamic'


@functools.lru_cache(maxsize=2)
def _decoder(model):
  """Compiles a prefill, and a decode step."""

  @jax.jit
  def prefill(params, tokens_BT):
    cache = kv_cache.init(
      model.config, batch_size=tokens_BT.shape[0], length=PROMPT + STEPS
    )
    return model.apply(params, tokens_BT, None, cache)

  @jax.jit
  def step(params, tokens_B, positions_B, cache):
    logits_B1V, cache = model.apply(
      params, tokens_B[:, None], positions_B[:, None], cache
    )
    return logits_B1V[:, 0], cache

  return prefill, step


@pytest.mark.fast_cases(3)
def test_cached_decoding_of_padded_prompts_is_the_full_forward(pair):
  """Prompts of different lengths, padded on the right with other tokens."""
  _, _, model, params = pair
  if _depends_on_length(model):
    pytest.skip('what a full pass computes depends on how long the text is')
  lengths_B = np.array([PROMPT, 5])
  tokens_BT = _tokens(2, PROMPT + STEPS)
  full_BTV = np.asarray(jax.jit(model.apply)(params, tokens_BT)[0])
  padded_BT = tokens_BT[:, :PROMPT].copy()
  padded_BT[1, 5:] = 3
  prefill, step = _decoder(model)
  prompt_BTV, cache = prefill(params, jnp.asarray(padded_BT))
  for b, length in enumerate(lengths_B):
    np.testing.assert_allclose(
      prompt_BTV[b, :length], full_BTV[b, :length], atol=TOLERANCE, rtol=0
    )
  rows_B = np.arange(2)
  for i in range(STEPS):
    positions_B = lengths_B + i
    logits_BV, cache = step(
      params, tokens_BT[rows_B, positions_B], jnp.asarray(positions_B), cache
    )
    np.testing.assert_allclose(
      logits_BV, full_BTV[rows_B, positions_B], atol=TOLERANCE, rtol=0
    )


@pytest.mark.fast_cases(3)
def test_greedy_continuations_are_theirs(pair):
  theirs, _, model, params = pair
  if model.config.rope_scaling.kind == 'longrope':
    pytest.skip('transformers reads the text again once it is long')
  tokens_BT = _tokens(2, PROMPT, seed=1)
  expected_BT = theirs.generate(
    torch.tensor(tokens_BT),
    max_new_tokens=STEPS,
    do_sample=False,
    pad_token_id=0,
    attention_mask=torch.ones(tokens_BT.shape, dtype=torch.long),
  ).numpy()[:, PROMPT:]
  prefill, step = _decoder(model)
  logits_BTV, cache = prefill(params, jnp.asarray(tokens_BT))
  tokens_B = jnp.argmax(logits_BTV[:, -1], axis=-1)
  drawn = [tokens_B]
  for i in range(STEPS - 1):
    positions_B = jnp.full((2,), PROMPT + i)
    logits_BV, cache = step(params, tokens_B, positions_B, cache)
    tokens_B = jnp.argmax(logits_BV, axis=-1)
    drawn.append(tokens_B)
  np.testing.assert_array_equal(np.stack(drawn, 1), expected_BT)
  assert len(np.unique(expected_BT)) > 1


def test_an_export_is_loaded_with_the_same_logits(pair, tmp_path):
  theirs, directory, model, params = pair
  family, values = config_json.write(
    model.config, config_json.load(directory)['model_type']
  )
  pieces = tensor_map.pieces(family, model.config, values)
  tensors = dict(exporting.tensors_of(params, pieces))
  safetensors_files.write_directory(
    tmp_path,
    {name: x.shape for name, x in tensors.items()},
    np.float32,
    iter(tensors.items()),
  )
  exporting._write_json(tmp_path / 'config.json', values)
  again, report = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path, attn_implementation='eager', output_loading_info=True
  )
  assert type(again) is type(theirs)
  assert not report['missing_keys']
  assert not report['unexpected_keys']
  assert not report['mismatched_keys']
  tokens_BT = _tokens(2, LENGTH)
  got_BTV, expected_BTV = (
    _theirs(m, tokens_BT) for m in (again.eval(), theirs)
  )
  # The same weights in the same program; YaRN's numbers took a detour.
  np.testing.assert_allclose(got_BTV, expected_BTV, atol=1e-6, rtol=0)
