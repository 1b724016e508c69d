"""Claims about serving: sizes, caches and speculation."""

from evals import claims


def get_claims() -> tuple[claims.Claim, ...]:
  """Returns the claims."""
  return _published_sizes(), _cache_sizes(), _speculation()


def _published_sizes() -> claims.Claim:
  return claims.Claim(
    name='published_sizes',
    paper='Radford et al. 2019; Jiang et al. 2024, arXiv:2401.04088; Yang et'
    ' al. 2025, arXiv:2505.09388; Ben Allal et al. 2025, arXiv:2502.02737',
    where='the sizes that the reports and model cards name',
    statement='The model definition has the published numbers of parameters.',
    quantities=(
      claims.digits('GPT-2 small, 1e6', '124'),
      claims.digits('SmolLM2-135M, 1e6', '135'),
      claims.digits('Mixtral 8x7B, 1e9', '47'),
      claims.digits('Mixtral 8x7B, active, 1e9', '13'),
      claims.digits('Qwen3-30B-A3B, 1e9', '30.5'),
      claims.digits('Qwen3-30B-A3B, active, 1e9', '3.3'),
    ),
    seconds={'cpu': 3},
    note='Shapes alone: no weights are made. Active parameters include the'
    ' embedding.',
  )


def _cache_sizes() -> claims.Claim:
  return claims.Claim(
    name='cache_sizes',
    paper='Kwon et al. 2023, arXiv:2309.06180; DeepSeek-AI 2024,'
    ' arXiv:2405.04434',
    where='the size of the KV cache of OPT-13B; the comparison of DeepSeek-V2'
    ' with DeepSeek 67B',
    statement='A token of OPT-13B takes 800 KB of cache; latent attention saves'
    ' 93.3 %.',
    quantities=(
      claims.digits('OPT-13B, KiB/token', '800'),
      claims.digits('latent attention, groups of equal size', '2.25'),
      claims.digits('saved against DeepSeek 67B, %', '93.3'),
    ),
    seconds={'cpu': 1},
    note='16 bits a number; DeepSeek-V2 stores 6 bits on average, as its report'
    ' says.',
  )


def _speculation() -> claims.Claim:
  values = {
    (0.6, 2): '1.96',
    (0.7, 3): '2.53',
    (0.8, 5): '3.69',
    (0.9, 10): '6.86',
  }
  return claims.Claim(
    name='speculative_tokens',
    paper='Leviathan et al. 2023, arXiv:2211.17192',
    where='equation 1, and theorem 3.5 on the rate of acceptance',
    statement='A round of g drafted tokens yields (1 - a^(g + 1)) / (1 - a)'
    ' tokens, a the overlap of both distributions, and changes no'
    ' distribution.',
    quantities=(
      *(
        claims.within(
          f'overlap {rate:g}, {drafted} drafted', text, float(text), 0.01,
          'the error of 200,000 simulated rounds, and of the last digit',
        )
        for (rate, drafted), text in values.items()
      ),
      claims.at_most(
        'total variation from the target', '0', 0.01,
        'that of as many draws from the target itself is about .003',
      ),
    ),
    seconds={'cpu': 5},
    seeds=5,
    note='Random distributions over 16 tokens; no model drafts.',
  )  # fmt: skip
