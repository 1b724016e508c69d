"""The peer of a benchmark: transformers on torch, in a process of its own.

`benchmarks.peer.peer_process` starts it; do not start it by hand. It reads one
JSON line with the workload, builds and warms up the model, and answers with a
line. Then it runs once for every further line and answers with the seconds
taken. Between turns it waits for the pipe and uses no core. It is a process of
its own because the thread pools of two frameworks in one process would compete
for the cores.

torch eager, float32, every core, transformers' default attention (sdpa).
"""

from collections.abc import Callable
import json
import os
import sys
import time
from typing import Any

import torch  # pyright: ignore[reportMissingImports]
import transformers  # pyright: ignore[reportMissingImports]


def _train_gpt2(spec: dict[str, Any]) -> tuple[Any, Callable[[], None]]:
  """Returns GPT-2, and a function that takes `steps` optimizer steps."""
  config = transformers.GPT2Config(
    **spec['model'],
    resid_pdrop=0.0,
    embd_pdrop=0.0,
    attn_pdrop=0.0,
    use_cache=False,
    bos_token_id=None,
    eos_token_id=None,
  )
  model = transformers.GPT2LMHeadModel(config).train()
  # The fused implementation is the fastest, and the Trainer's default.
  optimizer = torch.optim.AdamW(
    model.parameters(), **spec['optimizer'], fused=True
  )
  shape = (spec['batch_size'], spec['row_length'])
  tokens_BT = torch.randint(0, config.vocab_size, shape)
  targets_BT = torch.randint(0, config.vocab_size, shape)

  def run():
    for _ in range(spec['steps']):
      # transformers' own loss shifts the targets, and so would train on one
      # token per row less than our side.
      logits_BTV = model(input_ids=tokens_BT).logits
      loss = torch.nn.functional.cross_entropy(
        logits_BTV.flatten(0, 1), targets_BT.flatten()
      )
      loss.backward()
      torch.nn.utils.clip_grad_norm_(model.parameters(), spec['clip_norm'])
      optimizer.step()
      optimizer.zero_grad()

  return model, run


def _generate_llama(spec: dict[str, Any]) -> tuple[Any, Callable[[], None]]:
  """Returns Llama, and a function that continues one prompt greedily."""
  batch = {'prompts': [spec['prompt']], 'new_tokens': spec['new_tokens']}
  return _serve_llama({'model': spec['model'], 'batches': [batch]})


def _serve_llama(spec: dict[str, Any]) -> tuple[Any, Callable[[], None]]:
  """Returns Llama, and a function that continues batches greedily."""
  # No end-of-text id: random weights would stop at any token.
  config = transformers.LlamaConfig(
    **spec['model'], bos_token_id=None, eos_token_id=None, pad_token_id=0
  )
  model: Any = transformers.LlamaForCausalLM(config).eval()

  def generate(prompts: list[list[int]], new_tokens: int):
    width = max(map(len, prompts))
    padded = [[0] * (width - len(prompt)) + prompt for prompt in prompts]
    mask = [
      [0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts
    ]
    with torch.inference_mode():
      out_BT = model.generate(
        torch.tensor(padded),
        attention_mask=torch.tensor(mask),
        do_sample=False,
        max_new_tokens=new_tokens,
      )
    if (num_new := out_BT.shape[1] - width) != new_tokens:
      raise ValueError(f'got {num_new} tokens, expected {new_tokens}')

  def run():
    for batch in spec['batches']:
      generate(batch['prompts'], batch['new_tokens'])

  return model, run


_WORKLOADS = {
  'train_gpt2': _train_gpt2,
  'generate_llama': _generate_llama,
  'serve_llama': _serve_llama,
}


def main() -> None:
  """Builds the workload of the first line, then runs once per line."""
  # Answers go to the real stdout; prints of libraries go to stderr.
  answers = os.fdopen(os.dup(1), 'w', buffering=1)
  os.dup2(2, 1)
  spec = json.loads(sys.stdin.readline())
  torch.manual_seed(0)
  torch.set_num_threads(os.cpu_count() or 1)
  model, run = _WORKLOADS[spec['workload']](spec)
  run()
  answer = {
    'num_params': sum(p.numel() for p in model.parameters()),
    'torch': torch.__version__,
    'transformers': transformers.__version__,
    'num_threads': torch.get_num_threads(),
  }
  print(json.dumps(answer), file=answers)
  for _ in sys.stdin:
    start = time.perf_counter()
    run()
    print(json.dumps({'seconds': time.perf_counter() - start}), file=answers)


if __name__ == '__main__':
  main()
