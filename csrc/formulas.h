// What an operator works on, and what it computes for one element; shared by the CPU and the CUDA code.
//
// Every product and every sum is rounded by itself: compile with -ffp-contract=off (g++) or -fmad=false (nvcc), so
// that all backends have the same bits. Half types are computed in float and rounded once.
#pragma once

#include <cstdint>
#include <vector>

#ifdef __CUDACC__
#define AUTOLR_HOST_DEVICE __host__ __device__ inline
#else
#define AUTOLR_HOST_DEVICE inline
#endif

namespace autolr {

constexpr int kMaxRows = 64;

// One parameter of a call: three blocks of memory with their elements in the same order.
struct Parameter {
  const void* first;   // [count]: prev, or now
  const void* second;  // [count]: now, or grad
  void* rows;          // [N, count]: out
  int64_t count;
};

// Those of a call; somebody else's memory.
class Parameters {
 public:
  Parameters(const Parameter* first, int64_t size) : first_(first), size_(size) {}
  Parameters(const std::vector<Parameter>& all) : Parameters(all.data(), static_cast<int64_t>(all.size())) {}
  int64_t size() const { return size_; }
  const Parameter& operator[](int64_t i) const { return first_[i]; }
  const Parameter* begin() const { return first_; }
  const Parameter* end() const { return first_ + size_; }

 private:
  const Parameter* first_;
  int64_t size_;
};

// The type that T is computed in.
template <typename T>
struct Wide {
  using type = float;
};
template <>
struct Wide<double> {
  using type = double;
};

// A candidate is base + coefficient * step.
template <typename W>
struct Row {
  bool from_now;  // the base is `now`, else `prev`
  W coefficient;
};

// prev + f * (now - prev), from the nearer end as in torch.lerp: factors of 0 and 1 are exact.
template <typename W>
AUTOLR_HOST_DEVICE Row<W> step_row(double factor) {
  const bool from_now = !(factor > -0.5 && factor < 0.5);
  return {from_now, static_cast<W>(from_now ? factor - 1.0 : factor)};
}

// now - f * lr * grad
template <typename W>
AUTOLR_HOST_DEVICE Row<W> gradient_row(double factor, double lr) {
  return {true, static_cast<W>(-(factor * lr))};
}

template <typename W>
AUTOLR_HOST_DEVICE W candidate(W base, W coefficient, W step) {
  // A step that is not finite must not spoil a candidate that takes nothing of it.
  return coefficient == W(0) ? base : base + coefficient * step;
}

}  // namespace autolr
