// Starts the kernels of averages over heads, strip after strip. The kernels of a view are those for its own head
// dimension: chunks of 32 features, or of 64. Those of averages are for the larger one.
#include "mean_kernels.h"
#include "primitives.cuh"

namespace ear_ops::cuda {

namespace {

template <typename T, typename Use>
const char* with_features(int dim, const Use& use) {
  return dim <= 32 ? use(MeanKernels<T, 32>{}) : use(MeanKernels<T, 64>{});
}

template <typename Use>
const char* with_mean_kernels(Element element, int dim, const Use& use) {
  switch (element) {
    case Element::kFloat32:
      return with_features<float>(dim, use);
    default:  // float16 became float32 (mean_heads.cpp)
      return with_features<bfloat16>(dim, use);
  }
}

// Powers of two that dS is multiplied by before it is rounded. It is at most 4 of the MSE and 2 of JS. Of KL it is up
// to a quarter of how far logarithms differ.
float range_of(Comparison comparison) { return comparison == Comparison::kKl ? 64 : 8192; }

// Starts kernels until one does not start.
class Call {
 public:
  Call(Comparison comparison, Element element, const MeanArgs& args, void* stream)
      : comparison_(comparison), element_(element), args_(args), stream_(stream) {}

  const char* run() {
    set_rectangle(0, padded(queries()), 0, 0);
    for (int v = 0; v < 2; ++v)
      of_view(v, [](auto kernels, const auto& a, void* stream) { return kernels.statistics(a, stream); });
    for_strips_of_queries([&]() {
      average();
      for (int v = 0; v < 2; ++v)
        if (args_.view[v].query[0].gradient || args_.view[v].key[0].gradient)
          of_view(v, [](auto kernels, const auto& a, void* stream) { return kernels.sums(a, stream); });
      query_gradients();
      if (is_one_strip(args_)) key_gradients();
    });
    if (!has_strips_of_keys(args_)) return error_;
    args_.block_sums = nullptr;
    const int strip = keys_of_strip(args_);
    for (int first = 0; first < padded(keys()); first += strip) {
      set_rectangle(0, padded(queries()), first, std::min(strip, padded(keys()) - first));
      average();
      key_gradients();
    }
    return error_;
  }

 private:
  const Comparison comparison_;
  const Element element_;
  MeanArgs args_;
  void* const stream_;
  const char* error_ = nullptr;

  int queries() const { return args_.view[0].queries; }
  int keys() const { return args_.view[0].keys; }

  void set_rectangle(int first_query, int rows, int first_key, int columns) {
    Slopes& slopes = args_.slopes;
    slopes.first_query = first_query, slopes.rows = rows, slopes.first_key = first_key, slopes.columns = columns;
  }

  template <typename Body>
  void for_strips_of_queries(const Body& body) {
    const int strip = queries_of_strip(args_);
    int first = 0;
    do {  // keys have a gradient, of zeros, where there is no query
      set_rectangle(first, std::min(strip, padded(queries()) - first), 0, padded(keys()));
      body();
    } while ((first += strip) < padded(queries()));
  }

  void average() {
    if (error_) return;
    error_ = with_mean_kernels(element_, std::max(args_.view[0].dim, args_.view[1].dim),
                               [&](auto kernels) { return kernels.average(comparison_, args_, stream_); });
  }

  template <typename Start>
  void of_view(int v, const Start& start) {
    if (error_) return;
    const MeanViewArgs a = {args_.view[v], args_.head_weights, args_.slopes, v, range_of(comparison_)};
    error_ = with_mean_kernels(element_, a.view.dim, [&](auto kernels) { return start(kernels, a, stream_); });
  }

  void query_gradients() {
    for (int v = 0; v < 2; ++v)
      if (args_.view[v].query[0].gradient)
        of_view(v, [](auto kernels, const auto& a, void* stream) { return kernels.query_gradient(a, stream); });
  }
  void key_gradients() {
    for (int v = 0; v < 2; ++v)
      if (args_.view[v].key[0].gradient)
        of_view(v, [](auto kernels, const auto& a, void* stream) { return kernels.key_gradient(a, stream); });
  }
};

}  // namespace

const char* launch_mean_heads(Comparison comparison, Element element, const MeanArgs& args, void* stream) {
  return Call(comparison, element, args, stream).run();
}

}  // namespace ear_ops::cuda
