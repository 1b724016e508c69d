"""Heads of parts: none lost, each beside its own keys, and back again."""

import numpy as np
import pytest

from parallel.tensor import heads as heads_lib

# Query heads, key/value heads, parts; then copies, and heads of a part.
_CASES = (
  (9, 3, 2, 1, 2, 6),  # SmolLM2
  (9, 3, 4, 1, 1, 3),
  (9, 3, 8, 2, 1, 2),
  (32, 8, 8, 1, 1, 4),
  (64, 8, 16, 2, 1, 4),
  (16, 2, 8, 4, 1, 2),
  (7, 7, 4, 1, 2, 2),
  (4, 1, 8, 4, 1, 1),
)


@pytest.mark.parametrize('case', _CASES)
def test_every_query_head_is_beside_its_keys(case):
  num_heads, num_kv, num_parts, copies, kv_per_part, queries_per_part = case
  heads = heads_lib.fit(num_heads, num_kv, num_parts)
  assert heads.copies == copies
  assert heads.kv_per_part == kv_per_part
  assert heads.queries_per_part == queries_per_part
  # The channels of head n hold n + 1, so that zeros are padding.
  width = 3
  queries = np.repeat(np.arange(num_heads) + 1, width)[None]
  keys = np.repeat(np.arange(num_kv) + 1, width)[None]
  laid_q, laid_k = heads.queries(queries, 1), heads.keys(keys, 1)
  q_KG = laid_q[0, ::width].reshape(-1, heads.group)
  k_K = laid_k[0, ::width]
  assert len(q_KG) == len(k_K) == num_parts * kv_per_part
  for own, key in zip(q_KG, k_K, strict=True):
    for head in own[own > 0]:
      assert (head - 1) // (num_heads // num_kv) == key - 1
  assert sorted(q_KG[q_KG > 0]) == list(range(1, num_heads + 1))
  np.testing.assert_array_equal(heads.queries_of_model(laid_q, 1), queries)
  np.testing.assert_array_equal(heads.keys_of_model(laid_k, 1), keys)


def test_rows_are_laid_out_as_columns_are():
  heads = heads_lib.fit(9, 3, 4)
  weight = np.arange(18 * 5).reshape(18, 5)
  np.testing.assert_array_equal(
    heads.queries(weight, 0), heads.queries(weight.T, 1).T
  )
  np.testing.assert_array_equal(
    heads.queries_of_model(heads.queries(weight, 0), 0), weight
  )
