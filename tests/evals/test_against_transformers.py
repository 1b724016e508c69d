"""Perplexity against a computation that shares nothing with ours but weights.

Skipped where torch and transformers are not installed
(requirements-peer.txt); CI installs them.
"""

import math

import numpy as np
import pytest

from evals import ports
from evals.tasks import perplexity
from models import transformer
from tests.helpers.serving import no_network

_WHY = 'the oracle is not installed: pip install -r requirements-peer.txt'
torch = pytest.importorskip('torch', reason=_WHY)
pytest.importorskip('transformers', reason=_WHY)


def _text():
  """Returns prose of 5 KB: two pieces, many windows."""
  rng = np.random.default_rng(0)
  words = ['the', 'sky', 'is', 'blue', 'seven', 'apples', 'naïve', 'trees', '—']
  return ' '.join(rng.choice(words, 1000)).replace('trees the', 'trees.\n\nThe')


def _loss_by_transformers(model, ids, max_length, stride) -> float:
  """Returns the mean loss by the recipe of transformers' documentation.

  Windows that begin every `stride` tokens; what was scored before is masked by
  its label. Here ids[0] is the prefix.
  """
  total, count, scored_until = 0.0, 0, 1
  ids_1T = torch.tensor([ids])
  while scored_until < len(ids):
    fresh = max_length if scored_until == 1 else stride
    end = min(scored_until + fresh, len(ids))
    # The token at `end` - 1 is predicted and not read.
    begin = max(end - 1 - max_length, 0)
    window_1T = ids_1T[:, begin:end]
    labels_1T = window_1T.clone()
    labels_1T[:, : scored_until - begin] = -100
    with torch.inference_mode():
      logits_1TV = model(window_1T[:, :-1]).logits
      total += torch.nn.functional.cross_entropy(
        logits_1TV[0].double(), labels_1T[0, 1:], reduction='sum'
      ).item()
    count += int((labels_1T[0, 1:] != -100).sum())
    scored_until = end
  assert count == len(ids) - 1
  return total / count


@pytest.mark.parametrize('stride', [24, 48])
def test_perplexity_is_that_of_transformers(tmp_path, stride):
  from tests.helpers import eval_peers

  tokenizer, _ = eval_peers.tokenizers(tmp_path)
  config, params, peer = eval_peers.llama(
    tokenizer.vocab_size, tokenizer.eos_id
  )
  net = no_network.Network(
    transformer.Transformer(config).apply,
    params,
    tokenizer,
    eval_peers.MAX_LENGTH,
  )
  model = ports.Model(
    tokenizer=tokenizer, max_length=eval_peers.MAX_LENGTH, logprob_fn=net.score
  )
  text = _text()
  group = perplexity.measure([text], model, stride=stride)
  ids = [tokenizer.bos_id, *tokenizer.encode(text)]
  loss = _loss_by_transformers(peer, ids, eval_peers.MAX_LENGTH, stride)
  # float32 sums in another order: 2e-6 when measured; 1e-4 is allowed.
  assert group.score('perplexity').value == pytest.approx(
    math.exp(loss), rel=2e-5
  )
  bits = loss * (len(ids) - 1) / len(text.encode()) / math.log(2)
  assert group.score('bits_per_byte').value == pytest.approx(bits, rel=2e-5)
  assert group.num_examples == 2
