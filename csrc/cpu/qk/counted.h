// Which queries and keys of one pair are compared. Everything else is left out before anything is multiplied.
#pragma once

#include "../scratch.h"
#include "inputs.h"

namespace ear_ops::cpu {

// The keys that are real in either view and the queries that count. "The j-th key" and "the i-th query" are those of
// these lists. Between calls of select, key[0, n_keys) and query[0, n_queries) ascend. Where the masks of the views
// differ, real[v][j] says whether the j-th key is real in view v.
struct Counted {
  int64_t n_keys = 0, n_queries = 0;
  int32_t *key, *query;  // positions in the tensors
  bool masks_differ = false;
  uint8_t* real[2];

  template <typename Inputs>
  Counted(const Inputs& inputs, Arena& arena)
      : key(arena.take<int32_t>(inputs.keys)), query(arena.take<int32_t>(inputs.queries)) {
    for (int v = 0; v < 2; ++v) real[v] = arena.take<uint8_t>(inputs.key_mask ? inputs.keys : 0);
  }

  template <typename Inputs>
  void select(const Inputs& inputs, int64_t b) {
    const uint8_t* mask[2] = {inputs.key_mask_of(0, b), inputs.key_mask_of(1, b)};
    const uint8_t* counts = mask_row(inputs.counted_queries, b);
    n_keys = n_queries = 0;
    masks_differ = false;
    for (int64_t j = 0; j < inputs.keys; ++j) {
      if (mask[0] && !mask[0][j] && !mask[1][j]) continue;
      if (mask[0]) {
        masks_differ |= mask[0][j] != mask[1][j];
        for (int v = 0; v < 2; ++v) real[v][n_keys] = mask[v][j];
      }
      key[n_keys++] = static_cast<int32_t>(j);
    }
    for (int64_t i = 0; i < inputs.queries; ++i)
      if (!counts || counts[i]) query[n_queries++] = static_cast<int32_t>(i);
  }

  // Whether the keys lie side by side in the tensor.
  bool keys_together() const { return n_keys > 0 && key[n_keys - 1] - key[0] == n_keys - 1; }
};

}  // namespace ear_ops::cpu
