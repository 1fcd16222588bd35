// The operators on the CPU: chunks that stay in a core's cache, in parallel, vectorised by the compiler.

#include <algorithm>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

#include "operators.h"

// Compiled for several instruction sets, of which the loader picks the machine's: one wheel is fast on each.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define AUTOLR_CLONES __attribute__((target_clones("avx512f", "avx2", "default"), noinline))
#else
#define AUTOLR_CLONES
#endif

namespace autolr {
namespace {

// Elements that one thread takes at a time: what it reads stays in its core's first cache while it writes row after
// row.
constexpr int64_t kChunk = 2048;

// Call f(parameter, offset, count) for every chunk of every parameter. All chunks are one range, so that threads
// share the work evenly whatever the sizes of the parameters.
template <typename F>
void for_each_chunk(const Parameters& parameters, const F& f) {
  std::vector<int64_t> first{0};  // [P + 1]: number of the first chunk of each parameter
  first.reserve(parameters.size() + 1);
  for (const Parameter& parameter : parameters) {
    first.push_back(first.back() + (parameter.count + kChunk - 1) / kChunk);
  }
  // Waking a thread for less than 16 k elements costs more than it saves.
  torch::stable::parallel_for(0, first.back(), 16384 / kChunk, [&](int64_t begin, int64_t end) {
    size_t index = std::upper_bound(first.begin(), first.end(), begin) - first.begin() - 1;
    for (int64_t number = begin; number < end; ++number) {
      while (number >= first[index + 1]) {
        ++index;
      }
      const int64_t offset = (number - first[index]) * kChunk;
      f(index, offset, std::min(kChunk, parameters[index].count - offset));
    }
  });
}

// row = prev + f * (now - prev)
template <typename T, typename W>
AUTOLR_CLONES void write_step_row(const T* __restrict__ prev, const T* __restrict__ now, Row<W> row, int64_t count,
                                  T* __restrict__ out) {
  if (row.from_now) {
    for (int64_t i = 0; i < count; ++i) {
      const W end = static_cast<W>(now[i]);
      out[i] = static_cast<T>(candidate(end, row.coefficient, end - static_cast<W>(prev[i])));
    }
  } else {
    for (int64_t i = 0; i < count; ++i) {
      const W start = static_cast<W>(prev[i]);
      out[i] = static_cast<T>(candidate(start, row.coefficient, static_cast<W>(now[i]) - start));
    }
  }
}

#ifdef __SSE2__
// The same past the caches: a store through them first reads the line that it overwrites, and evicts another.
template <typename T>
AUTOLR_CLONES void stream_step_row(const T* __restrict__ prev, const T* __restrict__ now, Row<T> row, int64_t count,
                                   T* __restrict__ out) {
  typedef T Vector __attribute__((vector_size(16), aligned(sizeof(T)), may_alias));
  constexpr int64_t kLanes = 16 / sizeof(T);
  const int64_t head = std::min(count, (-reinterpret_cast<intptr_t>(out) & 15) / static_cast<int64_t>(sizeof(T)));
  write_step_row(prev, now, row, head, out);
  const T* base = row.from_now ? now : prev;
  int64_t i = head;
  for (; i + kLanes <= count; i += kLanes) {
    Vector value = *reinterpret_cast<const Vector*>(base + i);
    if (row.coefficient != T(0)) {
      const Vector step = *reinterpret_cast<const Vector*>(now + i) - *reinterpret_cast<const Vector*>(prev + i);
      value = value + row.coefficient * step;
    }
    _mm_stream_si128(reinterpret_cast<__m128i*>(out + i), (__m128i)value);
  }
  write_step_row(prev + i, now + i, row, count - i, out + i);
}
#endif

// row = now - f * lr * grad
template <typename T, typename W>
AUTOLR_CLONES void write_gradient_row(const T* __restrict__ now, const T* __restrict__ grad, Row<W> row, int64_t count,
                                      T* __restrict__ out) {
  for (int64_t i = 0; i < count; ++i) {
    out[i] = static_cast<T>(candidate(static_cast<W>(now[i]), row.coefficient, static_cast<W>(grad[i])));
  }
}

template <typename T>
int64_t bytes_written(const Work& work) {
  int64_t bytes = 0;
  for (const Parameter& parameter : work.parameters) {
    bytes += parameter.count * work.rows * static_cast<int64_t>(sizeof(T));
  }
  return bytes;
}

// Who reads the rows next finds them there, if they fit. What one group of cores shares, as most have it: what the
// system reports may be the sum over all groups of a machine of which this process sees a part.
constexpr int64_t kSharedCache = int64_t{32} << 20;

template <typename T, typename W>
void write_steps(const Work& work, const std::vector<double>& factors) {
  [[maybe_unused]] const bool streams = bytes_written<T>(work) > kSharedCache;
  for_each_chunk(work.parameters, [&](size_t index, int64_t offset, int64_t count) {
    const Parameter& parameter = work.parameters[index];
    const T* before = static_cast<const T*>(parameter.first) + offset;
    const T* after = static_cast<const T*>(parameter.second) + offset;
    T* to = static_cast<T*>(parameter.rows) + offset;
#ifdef __SSE2__
    if constexpr (std::is_same_v<T, W>) {
      if (streams) {
        for (int64_t n = 0; n < work.rows; ++n) {
          stream_step_row(before, after, step_row<W>(factors[n]), count, to + n * parameter.count);
        }
        _mm_sfence();  // else another thread that is told of the rows may read what was there before
        return;
      }
    }
#endif
    for (int64_t n = 0; n < work.rows; ++n) {
      write_step_row(before, after, step_row<W>(factors[n]), count, to + n * parameter.count);
    }
  });
}

template <typename T, typename W>
void write_gradients(const Work& work, const std::vector<double>& factors) {
  for_each_chunk(work.parameters, [&](size_t index, int64_t offset, int64_t count) {
    const Parameter& parameter = work.parameters[index];
    const T* value = static_cast<const T*>(parameter.first) + offset;
    const T* gradient = static_cast<const T*>(parameter.second) + offset;
    T* to = static_cast<T*>(parameter.rows) + offset;
    for (int64_t n = 0; n < work.rows; ++n) {
      write_gradient_row(value, gradient, gradient_row<W>(factors[n], work.lr[index]), count, to + n * parameter.count);
    }
  });
}

struct Cpu {
  static constexpr const char* kName = "CPU";
  static bool serves(const Tensor& tensor) { return tensor.is_cpu(); }
  static void write(const Work& work, const std::vector<double>& factors) {
    dispatch(work.dtype, [&](auto example) {
      using T = decltype(example);
      using W = typename Wide<T>::type;
      work.lr == nullptr ? write_steps<T, W>(work, factors) : write_gradients<T, W>(work, factors);
    });
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(autolr_fast, CPU, library) {
  library.impl("stack_candidates.cpp", TORCH_BOX(&Operators<Cpu>::stack_candidates));
  library.impl("stack_gradient_candidates.cpp", TORCH_BOX(&Operators<Cpu>::stack_gradient_candidates));
  library.impl("write.cpp", TORCH_BOX(&Operators<Cpu>::write));
}

STABLE_TORCH_LIBRARY_IMPL(autolr_fast, CompositeExplicitAutograd, library) {
  library.impl("plan.cpp", TORCH_BOX(&Operators<Cpu>::plan));
}

}  // namespace autolr
