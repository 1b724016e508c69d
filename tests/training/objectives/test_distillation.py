"""Distillation: its formulas by enumeration, its refusals, and whole runs."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data import data_config
from frozen import freeze
from models import layout, transformer
from models.layers import cross_entropy
from storage import file_names
from tests.helpers import frozen_dirs, tiny_models
from tests.helpers.training import tiny_experiment, tiny_run
from text import bpe
from training.objectives import distillation, divergences, port
from training.reporting import metrics as metrics_lib

V = 61
MODEL = tiny_models.llama_like(init_std=0.5)
SMALLER = tiny_models.llama_like(init_std=0.5, num_layers=1, mlp_width=20)
RUN_MODEL = tiny_models.llama_like(vocab_size=264, num_layers=1, init_std=0.5)
DIVERGENCES = ('forward', 'reverse', 'jensen_shannon')


def _expected(divergence, theirs, own, beta=0.5):
  """Returns the divergence of probabilities [..., V], in float64."""

  def kl(p, q):
    return np.sum(p * np.log(p / q), axis=-1)

  if divergence == 'jensen_shannon':
    mixed = beta * theirs + (1 - beta) * own
    return beta * kl(theirs, mixed) + (1 - beta) * kl(own, mixed)
  return kl(theirs, own) if divergence == 'forward' else kl(own, theirs)


def _softmax(logits, temperature=1.0):
  logits = np.asarray(logits, np.float64) / temperature
  probs = np.exp(logits - logits.max(axis=-1, keepdims=True))
  return probs / probs.sum(axis=-1, keepdims=True)


def _of(divergence, theirs, own, beta=0.5):
  if divergence == 'jensen_shannon':
    return divergences.jensen_shannon(theirs, own, beta)
  return getattr(divergences, divergence)(theirs, own)


def _logits(seed, shape=(5, 7)):
  return np.random.default_rng(seed).normal(0, 2, shape)


@pytest.mark.parametrize('divergence', DIVERGENCES)
def test_values_and_gradients_are_those_of_the_formulas(divergence):
  theirs, own = _logits(0), _logits(1)

  def value(own):
    return jnp.sum(
      _of(divergence, jax.nn.log_softmax(jnp.float32(theirs)),
          jax.nn.log_softmax(own), 0.3)
    )  # fmt: skip

  def expected(own):
    p, q = _softmax(theirs), _softmax(own)
    return _expected(divergence, p, q, beta=0.3).sum()

  got, gradient = jax.value_and_grad(value)(jnp.float32(own))
  assert got == pytest.approx(expected(own), rel=1e-5)
  # Central differences in float64: their error is far below float32's.
  step = 1e-5
  differences = np.zeros_like(own)
  for at in np.ndindex(own.shape):
    shift = np.zeros_like(own)
    shift[at] = step
    differences[at] = (expected(own + shift) - expected(own - shift)) / (
      2 * step
    )
  np.testing.assert_allclose(gradient, differences, atol=2e-6)


@pytest.mark.parametrize(('beta', 'limit'), [(0, 'forward'), (1, 'reverse')])
def test_the_mixture_goes_to_both_divergences(beta, limit):
  theirs, own = (jax.nn.log_softmax(jnp.float32(_logits(i))) for i in (0, 1))
  expected = _of(limit, theirs, own)
  errors = []
  for distance in (1e-1, 1e-2, 1e-3):
    mixed = divergences.jensen_shannon(theirs, own, abs(beta - distance))
    errors.append(np.max(np.abs(mixed / distance / expected - 1)))
  assert errors[0] > 2 * errors[1] > 4 * errors[2]
  assert errors[2] < 0.05


def test_equal_distributions_with_masked_ids_have_no_distance():
  logits = jnp.float32(_logits(0)).at[:, 2].set(cross_entropy.MASKED)
  other = jnp.float32(_logits(1)).at[:, 2].set(cross_entropy.MASKED)
  for divergence in DIVERGENCES:

    def value(own, theirs, divergence=divergence):
      logprobs = map(jax.nn.log_softmax, (theirs, own))
      return jnp.sum(_of(divergence, *logprobs))

    got, gradient = jax.value_and_grad(value)(logits, logits)
    assert got == pytest.approx(0, abs=1e-6)
    np.testing.assert_allclose(gradient, 0, atol=1e-6)
    got, gradient = jax.value_and_grad(value)(logits, other)
    kept = np.array([0, 1, 3, 4, 5, 6])
    expected = _expected(
      divergence, _softmax(other[:, kept]), _softmax(logits[:, kept])
    )
    assert got == pytest.approx(expected.sum(), rel=1e-5)
    assert np.all(np.isfinite(gradient))


@pytest.fixture(scope='module')
def models():
  """Returns a student and its parameters, and a teacher of another size."""
  found = []
  for seed, config in ((0, SMALLER), (1, MODEL)):
    module = transformer.Transformer(config)
    init = jax.jit(module.init)
    params = init(jax.random.key(seed), jnp.zeros((1, 1), jnp.int32))
    found.append((port.Model(module), params))
  return found[0], port.FrozenModel(*found[1])


def _logits_of(model, params, batch):
  hidden = model.hidden(
    params, batch['tokens'], batch['positions'], batch['segment_ids']
  )
  return model.logits(params, hidden.states_BTD)


def _objective(**fields):
  objective = distillation.Distillation(teacher='frozen', **fields)
  objective.validate()
  return objective


def _batch():
  batch = tiny_models.batch(vocab_size=V, num_segments=2, num_padding=3)
  share_BT = np.random.default_rng(0).uniform(0.5, 2, batch['weights'].shape)
  return batch | {'weights': np.float32(batch['weights'] * share_BT)}


@pytest.mark.slow
@pytest.mark.parametrize('divergence', DIVERGENCES)
@pytest.mark.parametrize(
  'options',
  [
    {},
    {'temperature': 2.0, 'imitation_share': 0.25},
    {'temperature': 0.5, 'is_rescaled': False},
  ],
  ids=str,
)
def test_the_loss_is_that_of_all_tokens_of_the_vocabulary(
  models, divergence, options, monkeypatch
):
  (model, params), teacher = models
  batch = _batch()
  # Several chunks of time: no logits of a whole batch.
  monkeypatch.setattr(cross_entropy, 'MAX_CHUNK_LOGITS', 8 * 4 * V)
  loss, sums = jax.jit(
    lambda p: _objective(divergence=divergence, **options)(
      p, batch, model, teacher=teacher
    )
  )(params)
  own, theirs = (_logits_of(m, p, batch) for m, p in ((model, params), teacher))
  temperature = options.get('temperature', 1.0)
  probs = [_softmax(x, temperature) for x in (theirs, own)]
  weights = np.float64(batch['weights'])
  distance = np.sum(weights * _expected(divergence, *probs)) / weights.sum()
  nll = [
    -np.sum(
      weights
      * np.log(np.take_along_axis(_softmax(x), batch['targets'][..., None], 2))[
        ..., 0
      ]
    )
    / weights.sum()
    for x in (own, theirs)
  ]
  share = options.get('imitation_share', 0.0)
  scale = temperature**2 if options.get('is_rescaled', True) else 1.0
  total = sums['weight']
  assert total == pytest.approx(weights.sum())
  assert loss / total == pytest.approx(
    (1 - share) * scale * distance + share * nll[0], rel=1e-5
  )
  assert distance > 0.1
  assert sums['nll'] / total == pytest.approx(nll[0], rel=1e-5)
  assert sums['teacher_nll'].total / total == pytest.approx(nll[1], rel=1e-5)
  is_same = np.argmax(own, -1) == np.argmax(theirs, -1)
  agreement = sums['agreement']
  assert agreement.total == np.sum(is_same & (weights > 0)) > 0
  assert agreement.weight == np.sum(weights > 0)


@pytest.mark.slow
def test_the_gradient_has_one_size_at_every_temperature(models):
  """Hinton, section 2.1, in the limit of a high temperature."""
  (model, params), teacher = models
  batch = _batch()

  def norm(**options):
    def loss(params):
      return _objective(**options)(params, batch, model, teacher=teacher)[0]

    leaves = jax.tree.leaves(jax.jit(jax.grad(loss))(params))
    return float(np.sqrt(sum(jnp.sum(jnp.square(x)) for x in leaves)))

  sizes = [norm(temperature=t) for t in (8.0, 32.0)]
  assert sizes[1] == pytest.approx(sizes[0], rel=0.2)
  plain = [norm(temperature=t, is_rescaled=False) for t in (8.0, 32.0)]
  assert plain[0] / plain[1] == pytest.approx(16, rel=0.2)


def test_a_step_has_one_forward_pass_of_each_model(models, monkeypatch):
  (model, params), teacher = models
  passes = []
  hidden = port.Model.hidden

  def counted(self, *args):
    passes.append(self.module.config)
    return hidden(self, *args)

  monkeypatch.setattr(port.Model, 'hidden', counted)
  objective, batch = _objective(imitation_share=0.5), _batch()
  assert objective.totals(params, batch, model, teacher=teacher) is None
  jax.eval_shape(
    jax.value_and_grad(
      lambda p: objective(p, batch, model, teacher=teacher)[0]
    ),
    params,
  )
  assert passes == [SMALLER, MODEL]


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'teacher': ''}, "objective.teacher: got '', expected the frozen direct"),
    ({'divergence': 'kl'}, "objective.divergence: got 'kl', expected one of f"),
    (
      {'divergence': 'jensen_shannon', 'beta': 1.0},
      'objective.beta: got 1.0, expected a number above 0 and below 1',
    ),
    ({'beta': 0.1}, 'objective.beta: got 0.1 with objective.divergence = forw'),
    ({'temperature': 0.0}, 'objective.temperature: got 0.0, expected a numbe'),
    (
      {'imitation_share': 1.0},
      'objective.imitation_share: got 1.0, expected a number from 0 to below 1',
    ),
  ],
)
def test_values_that_cannot_work_are_refused(fields, message):
  objective = distillation.Distillation(**{'teacher': 'frozen', **fields})
  with pytest.raises(ValueError, match=message):
    tiny_experiment.make(objective=objective).validate()


def _teacher(directory, *, config=RUN_MODEL, seed=1, **fields):
  """Writes a frozen directory, with the tokenizer of `tiny_run`."""
  params = transformer.Transformer(config).init(
    jax.random.key(seed), jnp.zeros((1, 1), jnp.int32)
  )
  params, config = layout.unstack(params, config)
  frozen_dirs.write(directory, params=params, config=config, **fields)
  return str(directory)


def _distilled(corpus, teacher, **fields):
  objective = distillation.Distillation(
    teacher=teacher, **fields.pop('options', {})
  )
  return tiny_run.experiment(corpus, objective=objective, **fields)


def test_a_teacher_that_is_the_policy_is_refused(corpus, tmp_path):
  base = _teacher(tmp_path / 'base')
  copy = _teacher(tmp_path / 'copy')
  for teacher in (base, copy):
    objective = distillation.Distillation(teacher=teacher)
    with pytest.raises(
      ValueError, match='objective.teacher: got the weights of config.init_fro'
    ):
      tiny_run.tuning(corpus, base, objective=objective).validate()


def test_a_teacher_with_another_vocabulary_is_refused(corpus, tmp_path):
  config = dataclasses.replace(RUN_MODEL, vocab_size=270)
  teacher = _teacher(tmp_path / 'teacher', config=config)
  with pytest.raises(
    ValueError, match='objective.teacher: got a model of 270 tokens, expected'
  ):
    tiny_run.run(_distilled(corpus, teacher), tmp_path / 'run')


def test_a_teacher_with_another_tokenizer_is_refused(corpus, tmp_path):
  """As many ids in the model, which are other tokens."""
  other = bpe.train(['abracadabra ' * 20], vocab_size=263)
  other.save(tmp_path / 'other')
  teacher = _teacher(tmp_path / 'teacher', tokenizer_dir=tmp_path / 'other')
  with pytest.raises(
    ValueError,
    match=r'data.tokenizer: got .* for id \d+, expected .*: the weights of'
    r' objective.teacher were trained with it; set data.tokenizer.kind',
  ):
    tiny_run.run(_distilled(corpus, teacher), tmp_path / 'run')
  # An id more is another token too: nothing was learnt for it.
  experiment = _distilled(
    corpus,
    _teacher(tmp_path / 'bytes' / 'teacher'),
    data={'tokenizer': data_config.TokenizerConfig(kind='bpe', vocab_size=264)},
  )
  with pytest.raises(ValueError, match='for id .*, expected'):
    tiny_run.run(experiment, tmp_path / 'longer')


@pytest.mark.slow
def test_a_run_resumes_bit_for_bit_and_learns(corpus, tmp_path):
  teacher = _teacher(tmp_path / 'teacher')
  experiment = _distilled(
    corpus,
    teacher,
    options={'temperature': 2.0, 'imitation_share': 0.1},
    num_steps=8,
  )
  experiment = dataclasses.replace(
    experiment,
    optimizer=dataclasses.replace(
      experiment.optimizer, schedule='constant', peak_lr=1e-2
    ),
  )
  tiny_run.run(dataclasses.replace(experiment, num_steps=4), tmp_path / 'run')
  tiny_run.run(experiment, tmp_path / 'run')
  tiny_run.run(experiment, tmp_path / 'whole')
  resumed, whole = (
    freeze._restore_params(
      tmp_path / name / file_names.CHECKPOINTS / '8' / 'params'
    )
    for name in ('run', 'whole')
  )
  jax.tree.map(np.testing.assert_array_equal, resumed, whole)
  recorded = json.loads((tmp_path / 'run' / file_names.RUN).read_text())
  assert len(recorded['lineage']['teacher']) == 64
  records = metrics_lib.read(tmp_path / 'whole')
  train = [r for r in records if r['kind'] == 'train']
  assert train[-1]['divergence'] < train[0]['divergence']
  evaluated = [r for r in records if r['kind'] == 'eval'][-1]
  # The loss of an evaluation is that of the text, as without a teacher.
  assert {'bits_per_byte', 'agreement', 'agreement_error'} <= evaluated.keys()
  assert evaluated['loss'] == pytest.approx(
    evaluated['bits_per_byte'] * np.log(2), rel=0.2
  )
  other = _teacher(pathlib.Path(tmp_path, 'other'), seed=2)
  with pytest.raises(
    ValueError, match='objective.teacher: got a model with weights'
  ):
    tiny_run.run(_distilled(corpus, other), tmp_path / 'run')
