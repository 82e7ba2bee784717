// Starts the kernels of averages over heads of one element type and chunk of the head dimension.
#pragma once

#include "mean_average.cuh"
#include "mean_kernels.h"

namespace ear_ops::cuda {

inline int64_t blocks_of_rows(const MeanViewArgs& a) { return a.view.pairs * a.view.heads * (a.slopes.rows / kOwned); }
inline int chunks_of_view(const MeanViewArgs& a, int features) { return (a.view.dim + features - 1) / features; }

template <typename T, int kD>
const char* MeanKernels<T, kD>::average(Comparison comparison, const MeanArgs& a, void* stream) {
  auto* kernel = comparison == Comparison::kKl   ? &mean_average<T, kD, MeanKl>
                 : comparison == Comparison::kJs ? &mean_average<T, kD, MeanJs>
                                                 : &mean_average<T, kD, MeanMse>;
  return launch(kernel, a.view[0].pairs * (a.slopes.rows / kOwned) * a.key_parts, kThreads,
                HeadStages<T, kD, averaged_keys<T>()>::kBytes, stream, a);
}

template <typename T, int kD>
int64_t bytes_of_rows(const MeanViewArgs& a) {
  return Stages<T, kD, kVisited, Role::kQueries, 0, 1>::bytes(chunks_of_view(a, kD));
}

template <typename T, int kD>
const char* MeanKernels<T, kD>::statistics(const MeanViewArgs& a, void* stream) {
  return launch(&mean_statistics<T, kD>, blocks_of_rows(a), kThreads, bytes_of_rows<T, kD>(a), stream, a);
}

template <typename T, int kD>
const char* MeanKernels<T, kD>::sums(const MeanViewArgs& a, void* stream) {
  return launch(&mean_sums<T, kD>, blocks_of_rows(a), kThreads, bytes_of_rows<T, kD>(a), stream, a);
}

template <typename T, int kD>
const char* MeanKernels<T, kD>::query_gradient(const MeanViewArgs& a, void* stream) {
  const int chunks = chunks_of_view(a, kD);
  return launch(&mean_gradient<T, kD, Role::kQueries>, blocks_of_rows(a) * chunks, kThreads,
                MeanGradientStages<T, kD, Role::kQueries>::bytes(chunks), stream, a);
}

template <typename T, int kD>
const char* MeanKernels<T, kD>::key_gradient(const MeanViewArgs& a, void* stream) {
  const int chunks = chunks_of_view(a, kD);
  const int64_t blocks = a.view.pairs * a.view.key_heads * (a.slopes.columns / kOwned) * chunks;
  return launch(&mean_gradient<T, kD, Role::kKeys>, blocks, kThreads,
                MeanGradientStages<T, kD, Role::kKeys>::bytes(chunks), stream, a);
}

}  // namespace ear_ops::cuda
