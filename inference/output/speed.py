"""The speed of an answer, as serve.py prints it."""


def text(completions, compile_seconds: float) -> str:
  """Returns the speed of the completions of one prompt, without compilation."""
  first = completions[0]
  took = first.usage
  # Prefill gives the first token of each completion. The others are decoded
  # together, so the slowest completion has the time of all.
  num_decoded = sum(each.num_completion_tokens - 1 for each in completions)
  seconds = max(each.usage.decode_seconds for each in completions)
  prefill = f'{took.prefill_tokens / took.prefill_seconds:,.0f} tokens/s'
  decode = (
    f'{num_decoded / seconds:,.1f} tokens/s' if num_decoded else 'no tokens'
  )
  reasons = ', '.join(dict.fromkeys(each.finish_reason for each in completions))
  return (
    f'prefill         {prefill} ({first.num_prompt_tokens} tokens,'
    f' {took.cached_tokens} of them cached)\n'
    f'decode          {decode} ({num_decoded} tokens, ended by'
    f' {reasons}, seed {first.seed})\n'
    f'compilation     {compile_seconds:.1f} s, not counted above'
  )
