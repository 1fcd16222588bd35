// What the operators compute, for one element; shared by the CPU and the CUDA code.
//
// Every product and every sum is rounded by itself: compile with -ffp-contract=off (g++) or -fmad=false (nvcc), so
// that all backends have the same bits. Half types are computed in float and rounded once.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#ifdef __CUDACC__
#define AUTOLR_HOST_DEVICE __host__ __device__ inline
#else
#define AUTOLR_HOST_DEVICE inline
#endif

namespace autolr {

constexpr int kMaxRows = 64;

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

// torch.optim.SGD's settings of one model.
template <typename W>
struct Sgd {
  W lr, momentum, weight_decay, keep;  // keep: 1 - dampening
  bool has_momentum, has_weight_decay, nesterov;
};

template <typename W>
AUTOLR_HOST_DEVICE Sgd<W> sgd(double lr, double momentum, double weight_decay, double dampening, bool nesterov) {
  return {static_cast<W>(lr), static_cast<W>(momentum), static_cast<W>(weight_decay),
          static_cast<W>(1.0 - dampening), momentum != 0, weight_decay != 0, nesterov};
}

// Update one element of a parameter and of its momentum buffer.
template <typename W>
AUTOLR_HOST_DEVICE void sgd_step(const Sgd<W>& sgd, bool first_step, W grad, W& param, W& buffer) {
  if (sgd.has_weight_decay) {
    grad = grad + sgd.weight_decay * param;
  }
  if (sgd.has_momentum) {
    buffer = first_step ? grad : sgd.momentum * buffer + sgd.keep * grad;
    grad = sgd.nesterov ? grad + sgd.momentum * buffer : buffer;
  }
  param = param - sgd.lr * grad;
}

enum class Normalization { kMinMax, kZScore, kSum, kNone };

// autolr_fast.scoring.weigh with the score exp(-x), then level * factor^exponent inside the limits.
//
// losses, factors, weights: [count]; level, factor: one number.
AUTOLR_HOST_DEVICE void score(const double* losses, const double* factors, int count, Normalization normalization,
                              double exponent, double lowest, double highest, double* level, double* weights,
                              double* factor) {
  const double infinity = std::numeric_limits<double>::infinity();
  double low = infinity, high = -infinity, smallest = infinity;
  bool all_equal = true;
  for (int n = 0; n < count; ++n) {
    smallest = std::fmin(smallest, factors[n]);
    all_equal = all_equal && losses[n] == losses[0];
    if (std::isfinite(losses[n])) {
      low = std::fmin(low, losses[n]);
      high = std::fmax(high, losses[n]);
    }
  }
  if (low > high) {  // no loss is finite
    for (int n = 0; n < count; ++n) {
      weights[n] = 0.0;
    }
    *factor = smallest;
  } else {
    // A loss that is not finite is shown to the normalisation as the largest finite one, and weighs 0.
    double scale = 1.0;
    if (normalization == Normalization::kMinMax) {
      scale = high - low;
    } else if (normalization == Normalization::kZScore) {
      double mean = 0.0, variance = 0.0;
      for (int n = 0; n < count; ++n) {
        mean += (std::isfinite(losses[n]) ? losses[n] : high) / count;
      }
      for (int n = 0; n < count; ++n) {
        const double distance = (std::isfinite(losses[n]) ? losses[n] : high) - mean;
        variance += distance * distance / count;
      }
      scale = std::sqrt(variance);
    } else if (normalization == Normalization::kSum) {
      scale = 0.0;
      for (int n = 0; n < count; ++n) {
        scale += std::fabs(std::isfinite(losses[n]) ? losses[n] : high);
      }
    }
    scale = scale == 0.0 ? 1.0 : scale;
    double sum = 0.0, logarithm = 0.0;
    for (int n = 0; n < count; ++n) {
      weights[n] = std::isfinite(losses[n]) ? std::exp((low - losses[n]) / scale) : 0.0;
      sum += weights[n];
    }
    for (int n = 0; n < count; ++n) {
      weights[n] /= sum;
      logarithm += weights[n] * std::log(factors[n]);
    }
    const double mean = std::exp(logarithm);
    *factor = all_equal || !std::isfinite(mean) ? 1.0 : mean;
  }
  *level = std::fmin(std::fmax(*level * std::pow(*factor, exponent), lowest), highest);
}

}  // namespace autolr
