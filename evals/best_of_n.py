"""Best of n: the answer that a proxy reward prefers, and what it is truly worth.

    curve = best_of_n.curve(proxy_PN, gold_PN, ns=(1, 2, 4, ...))
    fit = best_of_n.fit(curve)

Each of P prompts has N answers of one policy. Best of n draws n answers and
takes the one with the largest proxy reward. It moves away from the policy by at
most KL = log n - (n - 1) / n nats. With d = sqrt(KL), Gao et al. found that the
true (gold) reward above that of the policy is

    R(d) = d (alpha - beta d)

which rises, has its peak at d = alpha / (2 beta), and falls: over-optimisation.

References: Gao, Schulman & Hilton 2022 (arXiv:2210.10760), section 3.1; the
estimator: Nakano et al. 2021 (arXiv:2112.09332), appendix I; the KL: Stiennon
et al. 2020 (arXiv:2009.01325), appendix G.3, an upper bound that is reached
where no two answers are the same (Beirami et al. 2024, arXiv:2401.01879).
"""

from collections.abc import Sequence
import dataclasses
import math
from typing import NamedTuple

import numpy as np

from evals.results import statistics
