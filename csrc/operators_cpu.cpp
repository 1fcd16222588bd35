// The operators on the CPU: blocks that stay in the first-level cache, in parallel, vectorised by the compiler.

#include <algorithm>
#include <cstring>

#ifdef __SSE2__
#include <emmintrin.h>
#endif
#ifdef __unix__
#include <unistd.h>
#endif

#include "arguments.h"

// Compiled for several instruction sets, of which the loader picks the machine's: one wheel is fast on each.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define AUTOLR_CLONES __attribute__((target_clones("avx512f", "avx2", "default"), noinline))
#else
#define AUTOLR_CLONES
#endif

namespace autolr {
namespace {

constexpr int64_t kBlock = 2048;   // elements: what a block reads and its buffers fit 48 KiB
constexpr int64_t kGrain = 16;     // blocks: waking a thread for less costs more than it saves

// Call f(parameter, offset, count) for every block of every parameter. All blocks are one range, so that threads
// share the work evenly whatever the sizes of the parameters.
template <typename P, typename F>
void for_each_block(const std::vector<P>& parameters, const F& f) {
  std::vector<int64_t> first{0};  // [P + 1]: number of the first block of each parameter
  first.reserve(parameters.size() + 1);
  for (const P& parameter : parameters) {
    first.push_back(first.back() + (parameter.count + kBlock - 1) / kBlock);
  }
  torch::stable::parallel_for(0, first.back(), kGrain, [&](int64_t begin, int64_t end) {
    size_t index = std::upper_bound(first.begin(), first.end(), begin) - first.begin() - 1;
    for (int64_t block = begin; block < end; ++block) {
      while (block >= first[index + 1]) {
        ++index;
      }
      const int64_t offset = (block - first[index]) * kBlock;
      f(parameters[index], offset, std::min(kBlock, parameters[index].count - offset));
    }
  });
}

template <typename T, typename W>
AUTOLR_CLONES void convert(const T* __restrict__ values, int64_t count, W* __restrict__ wide) {
  for (int64_t i = 0; i < count; ++i) {
    wide[i] = static_cast<W>(values[i]);
  }
}

// Return the values in the type they are computed in: themselves, or the buffer.
template <typename T, typename W>
const W* widen(const T* values, int64_t count, W* buffer) {
  if constexpr (std::is_same_v<T, W>) {
    return values;
  } else {
    convert(values, count, buffer);
    return buffer;
  }
}

template <typename W>
AUTOLR_CLONES void subtract(const W* __restrict__ end, const W* __restrict__ start, int64_t count, W* __restrict__ step) {
  for (int64_t i = 0; i < count; ++i) {
    step[i] = end[i] - start[i];
  }
}

template <typename T, typename W>
AUTOLR_CLONES void write_row(const W* __restrict__ base, W coefficient, const W* __restrict__ step, int64_t count,
                             T* __restrict__ row) {
  for (int64_t i = 0; i < count; ++i) {
    row[i] = static_cast<T>(candidate(base[i], coefficient, step[i]));
  }
}

// Copy past the caches: a store through them would first read the line that it overwrites.
void stream(void* to, const void* from, int64_t bytes) {
#ifdef __SSE2__
  auto* target = static_cast<char*>(to);
  const auto* source = static_cast<const char*>(from);
  const int64_t head = std::min<int64_t>(bytes, -reinterpret_cast<intptr_t>(target) & 15);
  std::memcpy(target, source, head);
  int64_t done = head;
  for (; done + 16 <= bytes; done += 16) {
    const __m128i value = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + done));
    _mm_stream_si128(reinterpret_cast<__m128i*>(target + done), value);
  }
  std::memcpy(target + done, source + done, bytes - done);
#else
  std::memcpy(to, from, bytes);
#endif
}

int64_t last_level_cache() {
#ifdef _SC_LEVEL3_CACHE_SIZE
  static const int64_t bytes = sysconf(_SC_LEVEL3_CACHE_SIZE);
  if (bytes > 0) {
    return bytes;
  }
#endif
  return int64_t{32} << 20;
}

// Write base + coefficient * step for every row, from blocks of first (`prev`, or `now`) and second (`now`, or
// `grad`). row_of(parameter, n) tells base and coefficient; is_step says which of the two lines it is.
template <typename T, bool is_step, typename RowOf>
void write_rows(const std::vector<Flat>& parameters, int64_t rows, const RowOf& row_of) {
  using W = typename Wide<T>::type;
  int64_t written = 0;
  for (const Flat& parameter : parameters) {
    written += parameter.count * rows * static_cast<int64_t>(sizeof(T));
  }
  const bool streams = written > last_level_cache();  // else who reads them next finds them in the cache
  for_each_block(parameters, [&](const Flat& parameter, int64_t offset, int64_t count) {
    alignas(64) W first_buffer[kBlock], second_buffer[kBlock], difference[kBlock];
    alignas(64) T row_buffer[kBlock];
    const W* first = widen(static_cast<const T*>(parameter.first) + offset, count, first_buffer);
    const W* second = widen(static_cast<const T*>(parameter.second) + offset, count, second_buffer);
    const W* step = second;
    if constexpr (is_step) {
      subtract(second, first, count, difference);
      step = difference;
    }
    const size_t index = &parameter - parameters.data();
    for (int64_t n = 0; n < rows; ++n) {
      const Row<W> row = row_of(index, n);
      const W* base = is_step && row.from_now ? second : first;
      T* target = static_cast<T*>(parameter.rows) + n * parameter.count + offset;
      write_row(base, row.coefficient, step, count, streams ? row_buffer : target);
      if (streams) {
        stream(target, row_buffer, count * static_cast<int64_t>(sizeof(T)));
      }
    }
  });
}

void stack_candidates(std::vector<Tensor> prev, std::vector<Tensor> now, std::vector<double> factors,
                      std::vector<Tensor> out) {
  const auto rows = static_cast<int64_t>(factors.size());
  const std::vector<Flat> parameters = flatten(prev, now, out, rows);
  if (parameters.empty()) {
    return;
  }
  dispatch(prev[0].scalar_type(), [&](auto example) {
    using T = decltype(example);
    using W = typename Wide<T>::type;
    write_rows<T, true>(parameters, rows, [&](size_t, int64_t n) { return step_row<W>(factors[n]); });
  });
}

void stack_gradient_candidates(std::vector<Tensor> now, std::vector<Tensor> grad, Tensor lr,
                               std::vector<double> factors, std::vector<Tensor> out) {
  const auto rows = static_cast<int64_t>(factors.size());
  const std::vector<Flat> parameters = flatten(now, grad, out, rows);
  check_rates(lr, parameters.size());
  if (parameters.empty()) {
    return;
  }
  const auto* rates = static_cast<const double*>(lr.const_data_ptr());
  dispatch(now[0].scalar_type(), [&](auto example) {
    using T = decltype(example);
    using W = typename Wide<T>::type;
    write_rows<T, false>(parameters, rows,
                         [&](size_t index, int64_t n) { return gradient_row<W>(factors[n], rates[index]); });
  });
}

template <typename T, typename W>
AUTOLR_CLONES void sgd_row(const Sgd<W>& settings, bool first_step, const T* __restrict__ grad, int64_t count,
                           T* __restrict__ param, T* __restrict__ buffer) {
  for (int64_t i = 0; i < count; ++i) {
    W p = static_cast<W>(param[i]), b = static_cast<W>(buffer[i]);
    sgd_step(settings, first_step, static_cast<W>(grad[i]), p, b);
    param[i] = static_cast<T>(p);
    buffer[i] = static_cast<T>(b);
  }
}

void stacked_sgd_step(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> momentum_buffers,
                      std::vector<double> lr, std::vector<double> momentum, std::vector<double> weight_decay,
                      std::vector<double> dampening, std::vector<bool> nesterov, bool first_step) {
  const auto rows = static_cast<int64_t>(lr.size());
  const std::vector<Stacked> parameters = flatten_stacked(params, grads, momentum_buffers, rows);
  check_settings(rows, {momentum.size(), weight_decay.size(), dampening.size(), nesterov.size()});
  if (parameters.empty()) {
    return;
  }
  dispatch(params[0].scalar_type(), [&](auto example) {
    using T = decltype(example);
    using W = typename Wide<T>::type;
    for_each_block(parameters, [&](const Stacked& parameter, int64_t offset, int64_t count) {
      for (int64_t k = 0; k < rows; ++k) {
        const Sgd<W> settings = sgd<W>(lr[k], momentum[k], weight_decay[k], dampening[k], nesterov[k]);
        const int64_t start = k * parameter.count + offset;
        T* param = static_cast<T*>(parameter.param) + start;
        T* buffer = static_cast<T*>(parameter.buffer) + start;
        const T* grad = static_cast<const T*>(parameter.grad) + start;
        sgd_row(settings, first_step, grad, count, param, buffer);
      }
    });
  });
}

void score_losses(Tensor losses, std::vector<double> factors, std::string normalize, double exponent, double lowest,
                  double highest, Tensor level, Tensor weights, Tensor factor) {
  check_score(losses, factors, level, weights, factor);
  score(static_cast<const double*>(losses.const_data_ptr()), factors.data(), static_cast<int>(factors.size()),
        parse_normalization(normalize), exponent, lowest, highest, static_cast<double*>(level.mutable_data_ptr()),
        static_cast<double*>(weights.mutable_data_ptr()), static_cast<double*>(factor.mutable_data_ptr()));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(autolr_fast, CPU, library) {
  library.impl("stack_candidates.cpp", TORCH_BOX(&stack_candidates));
  library.impl("stack_gradient_candidates.cpp", TORCH_BOX(&stack_gradient_candidates));
  library.impl("stacked_sgd_step.cpp", TORCH_BOX(&stacked_sgd_step));
  library.impl("score.cpp", TORCH_BOX(&score_losses));
}

}  // namespace autolr
