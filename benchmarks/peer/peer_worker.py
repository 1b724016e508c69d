"""The peer of a benchmark: transformers on torch, in a process of its own.

`benchmarks.peer.peer_process` starts it; do not start it by hand. It reads one
JSON line with the workload, builds and warms up the model, and answers with a
line. Then it runs once for every further line and answers with the seconds
taken. Between turns it waits for the pipe and uses no core. It is a process of
its own because the thread pools of two frameworks in one process would compete
for the cores.

On a CPU: torch eager, float32, every core, transformers' default attention
(sdpa). On a GPU (training only): torch.compile, float32 weights under bfloat16
autocast, TF32 for products outside of it.
"""

from collections.abc import Callable
import json
import os
import resource
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
  return model, _steps(model, config, spec)


def _train_llama(spec: dict[str, Any]) -> tuple[Any, Callable[[], None]]:
  """Returns Llama, and a function that takes `steps` optimizer steps."""
  config = transformers.LlamaConfig(
    **spec['model'],
    use_cache=False,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
  )
  model = transformers.LlamaForCausalLM(config).train()
  return model, _steps(model, config, spec)


def _steps(model: Any, config: Any, spec: dict[str, Any]) -> Callable[[], None]:
  """Returns a function that takes `steps` optimizer steps."""
  device = spec['device']
  model.to(device)
  # The fused implementation is the fastest, and the Trainer's default.
  optimizer = torch.optim.AdamW(
    model.parameters(), **spec['optimizer'], fused=True
  )
  shape = (spec['batch_size'], spec['row_length'])
  tokens_BT, targets_BT = (
    torch.randint(0, config.vocab_size, shape, device=device) for _ in range(2)
  )
  is_gpu = device == 'cuda'
  forward = torch.compile(model) if is_gpu else model

  def run():
    for _ in range(spec['steps']):
      # transformers' own loss shifts the targets, and so would train on one
      # token per row less than our side.
      with torch.autocast(device, dtype=torch.bfloat16, enabled=is_gpu):
        logits_BTV = forward(input_ids=tokens_BT).logits
        loss = torch.nn.functional.cross_entropy(
          logits_BTV.flatten(0, 1).float(), targets_BT.flatten()
        )
      loss.backward()
      torch.nn.utils.clip_grad_norm_(model.parameters(), spec['clip_norm'])
      optimizer.step()
      optimizer.zero_grad(set_to_none=True)
    if is_gpu:
      torch.cuda.synchronize()

  return run


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
  'train_llama': _train_llama,
  'generate_llama': _generate_llama,
  'serve_llama': _serve_llama,
}


def _memory_bytes(device: str) -> int:
  """Returns the peak memory in bytes; on a CPU, of the process."""
  if device == 'cuda':
    return torch.cuda.max_memory_allocated()
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
  """Builds the workload of the first line, then runs once per line."""
  # Answers go to the real stdout; prints of libraries go to stderr.
  answers = os.fdopen(os.dup(1), 'w', buffering=1)
  os.dup2(2, 1)
  spec = json.loads(sys.stdin.readline())
  torch.manual_seed(0)
  torch.set_num_threads(os.cpu_count() or 1)
  torch.set_float32_matmul_precision('high')  # TF32 on GPUs
  model, run = _WORKLOADS[spec['workload']](spec)
  run()
  answer = {
    'num_params': sum(p.numel() for p in model.parameters()),
    'torch': torch.__version__,
    'transformers': transformers.__version__,
    'num_threads': torch.get_num_threads(),
    'memory_bytes': _memory_bytes(spec.get('device', 'cpu')),
  }
  print(json.dumps(answer), file=answers)
  for _ in sys.stdin:
    start = time.perf_counter()
    run()
    print(json.dumps({'seconds': time.perf_counter() - start}), file=answers)


if __name__ == '__main__':
  main()
