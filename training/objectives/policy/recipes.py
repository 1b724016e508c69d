"""Algorithms of reinforcement learning by name: settings of one loss.

    objective = recipes.grpo(group_size=8, kl=0.04)

Each recipe has the values of its paper; a given field replaces one of them. A
recipe is an objective alone: the size of a batch, inner epochs and filters of
groups are settings of the rollouts. With one step on each batch of completions,
pass proximal='own': all ratios are 1, and no forward pass is spent on them.
"""

from typing import Any

from training.objectives import advantages, token_loss
from training.objectives.policy import ppo as ppo_lib, terms


def reinforce(**fields: Any) -> token_loss.TokenLoss:
  """Reward minus the mean of the batch, one step (Williams 1992, section 4)."""
  return _loss(
    **{
      'advantages': advantages.Advantages(baseline='batch'),
      'proximal': 'own',
      'clip_low': 0.0,
      'clip_high': 0.0,
      **fields,
    }
  )


def reinforce_pp(*, kl: float = 0.01, **fields: Any) -> token_loss.TokenLoss:
  """REINFORCE++ (arXiv:2501.03262, section 3): clipped, over a batch's moments.

  Args:
    kl: factor of the log ratio to the reference in each token's reward.
  """
  return _loss(**{'kl_reward': kl, 'is_whitened': True, **fields})


def rloo(
  *, group_size: int = 4, kl: float = 0.05, **fields: Any
) -> token_loss.TokenLoss:
  """REINFORCE with the mean of the other answers (arXiv:2402.14740).

  One step on each batch. It sums over the tokens of an answer, not their mean,
  so `max_length` only scales the learning rate.

  Args:
    group_size: answers of each prompt; 2 and 4 in the paper.
    kl: factor of the log ratio to the reference in the reward.
  """
  return _loss(
    **{
      'advantages': advantages.Advantages(
        baseline='leave_one_out', group_size=group_size
      ),
      'kl_reward': kl,
      'proximal': 'own',
      'clip_low': 0.0,
      'clip_high': 0.0,
      'aggregation': terms.CONSTANT,
      'max_length': 1,
      **fields,
    }
  )


def grpo(
  *, group_size: int = 64, kl: float = 0.04, **fields: Any
) -> token_loss.TokenLoss:
  """GRPO (arXiv:2402.03300, equations 3 and 4; values of section 4.2).

  Args:
    group_size: answers of each prompt.
    kl: scale of the estimator k3 in the loss; 0: no reference.
  """
  return _loss(
    **{
      **({'distance_scale': kl, 'distance': 'k3'} if kl else {}),
      'advantages': advantages.Advantages(
        baseline='group', group_size=group_size, scale='group'
      ),
      'aggregation': terms.SEQUENCE,
      **fields,
    }
  )


def dr_grpo(
  *, group_size: int = 8, max_length: int, **fields: Any
) -> token_loss.TokenLoss:
  """GRPO done right (arXiv:2503.20783, section 3.2).

  The weight of an answer depends neither on its length nor on the deviation of
  its group.

  Args:
    max_length: the most sampled tokens of an answer, the constant divisor.
  """
  return _loss(
    **{
      'advantages': advantages.Advantages(
        baseline='group', group_size=group_size
      ),
      'aggregation': terms.CONSTANT,
      'max_length': max_length,
      **fields,
    }
  )


def dapo(*, group_size: int = 16, **fields: Any) -> token_loss.TokenLoss:
  """DAPO (arXiv:2503.14476, equation 8; values of section 4.1).

  Its other parts are settings of the rollouts: drops_groups_without_signal, and
  overlong_tokens with overlong_penalty.
  """
  return _loss(
    **{
      'advantages': advantages.Advantages(
        baseline='group', group_size=group_size, scale='group'
      ),
      'clip_high': 0.28,
      **fields,
    }
  )


def gspo(*, group_size: int = 8, **fields: Any) -> token_loss.TokenLoss:
  """GSPO (arXiv:2507.18071, equation 5; limits of section 5.1).

  The paper does not state its group size.
  """
  return _loss(
    **{
      'advantages': advantages.Advantages(
        baseline='group', group_size=group_size, scale='group'
      ),
      'ratio': terms.SEQUENCE,
      'aggregation': terms.SEQUENCE,
      'clip_low': 3e-4,
      'clip_high': 4e-4,
      **fields,
    }
  )


def cispo(*, group_size: int = 16, **fields: Any) -> token_loss.TokenLoss:
  """CISPO (MiniMax-M1, arXiv:2506.13585, equations 4 and 5).

  The paper has no lower limit, and does not state its upper limit: ratios up to
  5 are our choice. So is the group size.
  """
  return _loss(
    **{
      'advantages': advantages.Advantages(
        baseline='group', group_size=group_size, scale='group'
      ),
      'form': terms.CISPO,
      'clip_low': 1.0,
      'clip_high': 4.0,
      **fields,
    }
  )


def ppo(*, kl: float = 0.02, **fields: Any) -> ppo_lib.PPO:
  """PPO with a critic (arXiv:1707.06347), as InstructGPT has it.

  Args:
    kl: factor of the log ratio to the reference in each token's reward
      (arXiv:2203.02155, appendix C.4).
  """
  return ppo_lib.PPO(kl_reward=kl, **fields)


def _loss(**fields: Any) -> token_loss.TokenLoss:
  return token_loss.TokenLoss(
    **{'policy_scale': 1.0, 'is_sampled': True, **fields}
  )
