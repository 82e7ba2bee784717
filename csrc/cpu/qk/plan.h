// Which thread makes what: the work on every key head, cut into shares.
#pragma once

#include <numeric>

#include "../schedule.h"
#include "task.h"

namespace ear_ops::cpu {

// A share of the work on one key head: part `index` of `of` of what its queries, or its keys, need.
struct Share {
  int64_t b, key_head;
  int64_t index, of;
};

inline int64_t count_real(const uint8_t* mask, const uint8_t* other, int64_t n) {
  if (!mask) return n;
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) count += mask[i] || (other && other[i]);
  return count;
}

// The shares of all key heads, those of the largest pairs first, so that the last ones to finish are small.
class Plan {
 public:
  Plan(const QKInputs& p, int64_t shares) : p_(p), shares_(shares), order_(p.pairs) {
    std::iota(order_.begin(), order_.end(), 0);
    if (!p.key_mask && !p.counted_queries) return;
    std::vector<int64_t> cost(p.pairs);
    for (int64_t b = 0; b < p.pairs; ++b)
      cost[b] = count_real(p.key_mask_of(0, b), p.key_mask_of(1, b), p.keys) *
                count_real(mask_row(p.counted_queries, b), nullptr, p.queries);
    std::stable_sort(order_.begin(), order_.end(), [&](int64_t x, int64_t y) { return cost[x] > cost[y]; });
  }
  int64_t size() const { return p_.pairs * p_.key_heads * shares_; }
  Share operator[](int64_t i) const {
    return {order_[i / shares_ / p_.key_heads], i / shares_ % p_.key_heads, i % shares_, shares_};
  }

 private:
  const QKInputs& p_;
  int64_t shares_;
  std::vector<int64_t> order_;
};

inline int64_t workers(const QKInputs& p) {
  constexpr double kPerVector = 16;  // multiplications
  return workers_for(1.0 * p.pairs * p.heads * p.queries * p.keys * p.dim / kPerVector);
}

inline int64_t blocks(int64_t queries) { return (queries + kBlock - 1) / kBlock; }

// Calls body(task, share) for every share whose pair has something to compare; the pair is selected in the task.
template <typename Task, typename Inputs, typename P, typename Body>
void run(const Inputs& p, const P& products, const Plan& plan, const Body& body) {
  const int64_t count = std::min(workers(p), plan.size());
  Arena measure(nullptr);
  Task(p, products, measure);
  const Scratch scratch(count, measure.used());
  run_tasks(plan.size(), count, [&](int64_t worker, const auto& next) {
    Arena arena = scratch.of(worker);
    Task task(p, products, arena);
    int64_t selected = -1;
    for (int64_t i = next(); i < plan.size(); i = next()) {
      const Share share = plan[i];
      if (share.b != selected) task.select(share.b);
      selected = share.b;
      if (!task.is_empty()) body(task, share);
    }
    products.release();
  });
}

// Calls body(head, block) for the share's part of all blocks of its key head.
template <typename P, typename Body>
void for_blocks(const QKTask<P>& task, const Share& share, const Body& body) {
  const int64_t per_head = blocks(task.counted.n_queries), all = task.inputs.group() * per_head;
  for (int64_t i = share.index * all / share.of; i < (share.index + 1) * all / share.of; ++i)
    body(share.key_head * task.inputs.group() + i / per_head, i % per_head);
}

}  // namespace ear_ops::cpu
