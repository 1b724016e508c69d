"""Log-probabilities under a run's weights, on any devices, against `apply`."""

import jax
import numpy as np
import pytest

from evals import ports
from models import execution
from models.layers import cross_entropy
from parallel import parallel_config
from tests.helpers import tiny_models
from tests.helpers.serving import no_network
from tests.helpers.training import tiny_run
from training import learner as learner_lib
from training.evaluation import model_port, validation

LENGTH = 16  # of the rows of tiny_run
# float32 sums in another order, of log-probabilities of about 5; what is split
# over devices is added up in yet another. Measured: below 2e-6.
TOLERANCE = 2e-5


def _learner(parallel=None, **model):
  experiment = tiny_run.experiment(
    'corpus/{split}/*.txt',
    model=tiny_models.llama_like(vocab_size=264, **model),
    parallel=parallel_config.ParallelConfig(**(parallel or {})),
  )
  experiment.validate()
  return learner_lib.make(experiment)


def _network(learner, state):
  """Returns the same weights, run one request at a time on one device."""
  params = jax.device_get(learner.placement.whole(state).params)
  model = learner.model.clone(execution=execution.Execution())
  return no_network.Network(
    model.apply, params, tiny_models.byte_tokenizer(), LENGTH
  )


def _requests(net):
  """Returns requests of every length that fits, some of them greedy."""
  rng = np.random.default_rng(0)
  requests = []
  for size in [*range(2, LENGTH + 2), 3, 5, 9, 2]:
    ids = rng.integers(0, 256, size).tolist()
    cut = int(rng.integers(1, size))
    if size % 3 == 0:
      # What the model itself would say.
      cut = size - 1
      settings = ports.SampleSettings(max_tokens=1)
      ((said,),) = net.sample([ids[:cut]], settings, 1)
      ids[cut:] = said.ids
    if ids[cut:]:
      requests.append((ids[:cut], ids[cut:]))
  return requests


@pytest.mark.slow
@pytest.mark.parametrize(
  ('parallel', 'model'),
  [
    ({}, {}),
    ({'kind': 'pmap'}, {}),
    ({'fsdp': 4}, {}),
    ({'tensor': 2}, {}),
    ({'context': 2}, {}),
    ({'stage': 2, 'data': 4}, {'scan_layers': True}),
  ],
  ids=['data', 'pmap', 'fsdp', 'tensor', 'context', 'stage'],
)
def test_scores_are_those_of_one_request_alone(parallel, model):
  learner = _learner(parallel, **model)
  state = learner.init(jax.random.key(0))
  net = _network(learner, state)
  requests = _requests(net)
  expected = net.score(requests)
  assert 3 < sum(one.is_greedy for one in expected) < len(requests)
  scored = model_port.Scorer(learner).logprob_fn(state.params)(requests)
  for got, want in zip(scored, expected, strict=True):
    np.testing.assert_allclose(
      got.token_logprobs, want.token_logprobs, atol=TOLERANCE, rtol=0
    )
    assert got.logprob == pytest.approx(np.sum(got.token_logprobs))
    assert got.is_greedy == want.is_greedy


@pytest.mark.slow
def test_logits_in_chunks_are_the_same(monkeypatch):
  learner = _learner()
  state = learner.init(jax.random.key(0))
  requests = _requests(_network(learner, state))
  whole = model_port.Scorer(learner).logprob_fn(state.params)(requests)
  # Four places in time at once, of 8 rows.
  monkeypatch.setattr(cross_entropy, 'MAX_CHUNK_LOGITS', 8 * 4 * 264)
  chunked = model_port.Scorer(learner).logprob_fn(state.params)(requests)
  for one, other in zip(whole, chunked, strict=True):
    np.testing.assert_allclose(
      one.token_logprobs, other.token_logprobs, atol=TOLERANCE, rtol=0
    )


def test_rows_are_filled_and_answers_keep_their_order():
  requests = [([1] * (n - 1), [2]) for n in (3, 17, 9, 9, 2, 5)]
  slots = model_port._pack(requests, LENGTH)
  by_row = {}
  for slot in slots:
    by_row.setdefault(slot.row, []).append(slot)
  # Sizes are one less: 16 | 8 8 | 4 2 1.
  assert [[s.size for s in row] for row in by_row.values()] == [
    [16],
    [8, 8],
    [4, 2, 1],
  ]
  assert sorted(slot.request for slot in slots) == list(range(6))
  (batch, members), *rest = model_port._batches(requests, slots, (2, LENGTH))
  assert len(rest) == 1
  assert [index for index, _ in members] == [1, 2, 3]
  assert batch['segment_ids'][1].tolist() == [1] * 8 + [9] * 8
  assert batch['positions'][1].tolist() == [*range(8), *range(8)]
  for index, places in members:
    assert batch['targets'].reshape(-1)[places].tolist() == [2]
    assert len(requests[index][1]) == 1


@pytest.mark.parametrize(
  'request_', [([], [1]), ([1], []), ([1] * LENGTH, [1, 1])]
)
def test_a_request_that_does_not_fit_is_refused(request_):
  with pytest.raises(ValueError, match='expected some of both, and at most'):
    model_port._pack([request_], LENGTH)


def test_a_run_that_is_to_stop_stops_between_batches():
  learner = _learner()
  state = learner.init(jax.random.key(0))
  asked = []

  def should_stop():
    asked.append(1)
    return len(asked) > 1

  score = model_port.Scorer(learner).logprob_fn(state.params, should_stop)
  with pytest.raises(validation.Stopped):
    score([([1] * LENGTH, [2])] * 20)  # three batches of 8 rows
  assert len(asked) == 2


def test_no_requests_are_no_work():
  learner = _learner()
  state = learner.init(jax.random.key(0))
  assert list(model_port.Scorer(learner).logprob_fn(state.params)([])) == []
