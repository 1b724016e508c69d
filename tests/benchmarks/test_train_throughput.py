"""The training benchmark at a tiny shape; no assertion on speed."""

import dataclasses

import pytest

from benchmarks import train_throughput
from models import flops


def _tiny():
  return train_throughput.Shape(
    model=train_throughput.gpt2(
      vocab_size=61, num_layers=1, num_heads=1, width=64, length=16
    ),
    batch_size=2,
    row_length=16,
    steps=1,
  )


@pytest.fixture(autouse=True)
def quick_roofline(monkeypatch):
  monkeypatch.setattr(
    train_throughput.peaks, 'matmul_flops_per_s', lambda *_, **__: 1e11
  )


def test_shapes_are_the_published_sizes():
  sizes = {
    name: flops.num_params(shape.model)
    for name, shape in train_throughput.shapes().items()
  }
  assert sizes['small'] == pytest.approx(10.8e6, rel=0.01)
  # 124,439,808 with GPT-2's vocabulary of 50257, padded here to 50304.
  assert sizes['124m'] == 124_439_808 + (50304 - 50257) * 768


@pytest.mark.slow
def test_result_is_consistent():
  result = train_throughput.run('tiny', _tiny(), with_peer=False, rounds=2)
  ours = result['ours']
  assert len(ours['seconds_per_turn']) == 2
  assert ours['tokens_per_s'] > 0
  used = ours['tokens_per_s'] * result['needed_flops_per_token']
  assert ours['mfu'] == pytest.approx(used / 1e11)
  assert ours['memory_bytes'] > 0
  assert ours['first_step_s'] > 0
  assert 'peer' not in result
  assert 'ratio' not in result


@pytest.mark.slow
def test_the_parts_of_a_step_are_all_of_it():
  shape = dataclasses.replace(_tiny(), steps=2)
  result = train_throughput.run(
    'tiny', shape, with_peer=False, rounds=1, with_parts=True
  )
  parts = result['parts']
  assert list(parts) == ['products', 'attention', 'loss', 'optimizer', 'rest']
  assert all(parts[name] > 0 for name in parts if name != 'rest')
  (seconds,) = result['ours']['seconds_per_turn']
  assert sum(parts.values()) == pytest.approx(seconds / shape.steps)


def test_an_accelerator_has_real_sizes():
  found = train_throughput.shapes('gpu')
  assert found == train_throughput.shapes('tpu')
  sizes = {
    name: (
      flops.num_params(shape.model), shape.batch_size, shape.row_length,
      shape.dtype,
    )
    for name, shape in found.items()
  }  # fmt: skip
  assert sizes == {
    '124m': (124_475_904, 16, 1024, 'bfloat16'),
    '1b': (1_235_814_400, 4, 4096, 'bfloat16'),  # of Llama-3.2-1B's config
  }
  for shape in found.values():
    train_throughput.experiment_of(shape).validate()


def test_the_peer_gets_the_same_llama():
  shape = train_throughput.shapes('gpu')['1b']
  spec = train_throughput.peer_spec(shape, 'cuda')
  assert (spec['workload'], spec['device']) == ('train_llama', 'cuda')
  assert spec['model'] == {
    'vocab_size': 128_256,
    'num_hidden_layers': 16,
    'num_attention_heads': 32,
    'num_key_value_heads': 8,
    'head_dim': 64,
    'hidden_size': 2048,
    'intermediate_size': 8192,
    'max_position_embeddings': 4096,
    'rms_norm_eps': shape.model.norm_epsilon,
    'tie_word_embeddings': True,
  }


def test_report_names_both_sides_and_the_ratio():
  text = train_throughput.report(
    {
      'shape': 'tiny',
      'num_params': 1_500_000,
      'batch_size': 2,
      'row_length': 16,
      'roofline_flops_per_s': 1e11,
      'ours': {
        'tokens_per_s': 2400.0,
        'mfu': 0.5,
        'memory_bytes': 2e9,
        'chosen': ('remat none',),
      },
      'peer': {'tokens_per_s': 2000.0, 'mfu': 0.416, 'memory_bytes': 3e9},
      'ratio': 1.2,
      'parts': {'products': 0.003, 'rest': 0.001},
    }
  )
  lines = [line.split() for line in text.splitlines()]
  assert '1.5M parameters' in text
  assert 'roofline 100 GFLOP/s' in text
  assert lines[2] == ['ours', '2,400', '50.0%', '2.0', 'GB']
  assert lines[3] == ['peer', '2,000', '41.6%', '3.0', 'GB']
  assert lines[4] == ['ours', '/', 'peer:', '1.20']
  assert 'a step: products 3.0 ms 75%, rest 1.0 ms 25%' in text
  assert 'chosen: remat none' in text


@pytest.mark.slow
def test_peer_trains_the_same_shapes_in_turns():
  pytest.importorskip('torch', reason='requirements-peer.txt not installed')
  pytest.importorskip('transformers', reason='requirements-peer.txt')
  result = train_throughput.run('tiny', _tiny(), with_peer=True, rounds=2)
  assert len(result['peer']['seconds_per_turn']) == 2
  assert result['peer_info']['num_params'] == result['num_params']
  assert result['ratio'] > 0
