"""Ids without a token are masked alike in training, evaluation and serving."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evals import evaluate
from frozen import format as frozen_format
from inference import generate, model_port
from inference.engine import engine_config
from inference.sampling import settings
from models import transformer
from tests.helpers import tiny_models
from tests.helpers.training import tiny_run
from training.evaluation import evals_config
from training.objectives import next_token, port
from training.reporting import metrics

NUM_TOKENS = tiny_models.byte_tokenizer().vocab_size
SPARE = ((NUM_TOKENS, 320),)
# Large weights: a spare id that were counted would have a large share.
MODEL = tiny_models.llama_like(
  vocab_size=320, num_layers=1, max_length=16, init_std=0.5
)


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  """Returns the workdir of a short run, and the file of its task."""
  root = tmp_path_factory.mktemp('spare')
  text = root / 'prose.txt'
  text.write_text('def self return naïve ' * 60)
  experiment = tiny_run.experiment(
    tiny_run.write_corpus(root),
    model=MODEL,
    num_steps=4,
    objective=next_token.NextToken(z_loss_weight=1e-3),
    evals=evals_config.EvalsConfig(tasks=(f'perplexity:{text}',)),
  )
  tiny_run.run(experiment, root / 'run')
  return root / 'run', text


@pytest.mark.slow
def test_training_and_serving_have_one_perplexity(trained):
  workdir, text = trained
  generator = generate.load(
    workdir / 'frozen',
    engine_config.EngineConfig(max_sequences=4, chunk_tokens=16),
  )
  result = evaluate.run(f'perplexity:{text}', model_port.evaluated(generator))
  (*_, last) = [r for r in metrics.read(workdir) if r['kind'] == 'eval']
  served = result.score('perplexity').value
  # float32 sums in another order. The spare ids held a sixth of the mass.
  assert last['perplexity_prose/perplexity'] == pytest.approx(served, rel=1e-5)


@pytest.mark.slow
def test_the_manifest_names_the_ids_without_a_token(trained):
  workdir, _ = trained
  manifest = json.loads((workdir / 'frozen' / 'manifest.json').read_text())
  assert manifest['model']['spare_ids'] == [[NUM_TOKENS, 320]]
  # A run does not depend on them: its tokenizer says which they are.
  run = json.loads((workdir / 'run.json').read_text())
  assert run['model']['spare_ids'] == []


def test_the_frozen_directory_holds_no_path_of_the_machine(trained):
  workdir, _ = trained
  run = json.loads((workdir / 'run.json').read_text())
  # The run needs its paths, to resume; what it gives away does not.
  assert run['data_mix'][0]['path'].startswith('/')
  files = [path for path in (workdir / 'frozen').rglob('*') if path.is_file()]
  assert len(files) > 8
  for path in files:
    assert str(workdir.parent).encode() not in path.read_bytes(), path


def test_nothing_trains_a_spare_row(trained):
  workdir, _ = trained
  frozen = frozen_format.read(workdir / 'frozen')
  model = transformer.Transformer(frozen.config)
  tokens_BT = np.arange(16, dtype=np.int32)[None]

  def loss(params):
    hidden_BTD, _ = model.apply(params, tokens_BT, method='hidden')
    weights_BT = jnp.ones(tokens_BT.shape)
    return model.apply(
      params, hidden_BTD, tokens_BT, weights_BT, 0.1, method='weighted_nll'
    ).loss

  head = jax.grad(loss)(frozen.params)['params']['head']['embedding']
  np.testing.assert_array_equal(head[NUM_TOKENS:], 0)
  assert np.abs(head[:NUM_TOKENS]).min(axis=-1).max() > 0


@pytest.mark.slow
@pytest.mark.parametrize('softcap', [0.0, 3.0])
def test_a_masked_model_is_the_model_without_those_rows(softcap):
  whole = dataclasses.replace(MODEL, logit_softcap=softcap, spare_ids=SPARE)
  cut = dataclasses.replace(whole, vocab_size=NUM_TOKENS, spare_ids=())
  params = transformer.Transformer(whole).init(
    jax.random.key(0), jnp.zeros((1, 1), jnp.int32)
  )
  rows = jax.tree.map(
    lambda leaf: leaf[:NUM_TOKENS] if leaf.shape[0] == 320 else leaf, params
  )
  batch = tiny_models.batch(vocab_size=NUM_TOKENS)

  def measured(config, params):
    model = port.Model(transformer.Transformer(config))
    inputs = batch['tokens'], batch['positions'], batch['segment_ids']

    def loss(params):
      hidden_BTD = model.hidden(params, *inputs).states_BTD
      sums = model.weighted_nll(
        params, hidden_BTD, batch['targets'], batch['weights'], 0.1
      )
      logprobs = model.token_logprobs(params, hidden_BTD, batch['targets'])
      probs = jax.nn.softmax(model.logits(params, hidden_BTD))
      return sums.loss - jnp.sum(logprobs), (sums, logprobs, probs)

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)

  (_, got), grads = measured(whole, params)
  (_, expected), cut_grads = measured(cut, rows)
  probs_BTV, cut_probs_BTV = got[2], expected[2]
  np.testing.assert_array_equal(probs_BTV[..., NUM_TOKENS:], 0)
  # float32 sums in another order.
  np.testing.assert_allclose(
    probs_BTV[..., :NUM_TOKENS], cut_probs_BTV, rtol=1e-4, atol=1e-7
  )
  for a, b in zip(
    jax.tree.leaves(got[:2]), jax.tree.leaves(expected[:2]), strict=True
  ):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
  for a, b in zip(
    jax.tree.leaves(grads), jax.tree.leaves(cut_grads), strict=True
  ):
    np.testing.assert_allclose(a[: b.shape[0]], b, rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(a[b.shape[0] :], 0)


@pytest.mark.slow
def test_no_spare_id_is_sampled_or_listed(trained):
  workdir, _ = trained
  generator = generate.load(
    workdir / 'frozen',
    engine_config.EngineConfig(max_sequences=4, chunk_tokens=16),
  )
  completions = generator.generate(
    [[65]],
    settings.Settings(
      n=8, temperature=50.0, max_tokens=12, logprobs=20, ignore_eos=True
    ),
  )
  for completion in completions:
    assert max(completion.token_ids) < NUM_TOKENS
    assert completion.logprobs
    for each in completion.logprobs:
      assert max(each.ids) < NUM_TOKENS
      assert min(each.values) > -1e6


def test_ids_that_contradict_the_tokenizer_are_refused(tmp_path):
  experiment = tiny_run.experiment(
    tiny_run.write_corpus(tmp_path),
    model=dataclasses.replace(MODEL, spare_ids=((300, 320),)),
  )
  with pytest.raises(
    ValueError,
    match=r'model.spare_ids: got \(\(300, 320\),\), expected \(\), which',
  ):
    tiny_run.run(experiment, tmp_path / 'run')
