// How a launch is laid out, and what one thread of one block of it does.
//
// Nothing here is CUDA's, so that tests/csrc/simulate_grid.cpp runs every thread of a launch on the host. `Memory`
// stands for the loads and stores: read(from, value), write(to, value), and read_vector(from, values),
// write_vector(to, values) for the kWidth<T> elements of 16 bytes at an address that is a multiple of 16.
#pragma once

#include <algorithm>
#include <cstdint>

#include "formulas.h"

#ifdef __CUDACC__
#define AUTOLR_THREAD __device__ __forceinline__
#else
#define AUTOLR_THREAD inline
#endif

namespace autolr {

constexpr int kThreads = 512;     // of a block; at least kMaxRows
constexpr int kBlocksOfAnSm = 2;  // README.md in benchmarks says why so few, and so wide
constexpr int kVectorBytes = 16;  // the widest load and store

template <typename T>
constexpr int kWidth = kVectorBytes / sizeof(T);  // elements of a vector: a thread's share of a tile

template <typename T>
constexpr int64_t kTile = kThreads * kWidth<T>;  // elements that a block takes at once

struct Factors {
  double values[kMaxRows];  // [N]
  const double* lr;         // [P] on the device, or null for the line through two points
};

// What a kernel is given, by value: nothing is uploaded that a CUDA graph or a stream could find stale.
//
// All tiles are one range, and block b of B takes the tiles b, b + B, b + 2 B: blocks that run at the same time work
// next to each other.
template <int capacity>
struct Launch {
  Parameter parameters[capacity];
  uint32_t first_tile[capacity];  // number of the first tile of each parameter: counts of the tiles, summed up
  uint32_t tiles;                 // of all
  int32_t count;                  // of the parameters
  int32_t begin;                  // place of the first of them in the operator's list
  int32_t rows;                   // N
  Factors factors;
};

// Parameters that fit a launch of so many bytes.
constexpr int launch_capacity(int bytes) {
  return (bytes - static_cast<int>(sizeof(Factors)) - 32) / static_cast<int>(sizeof(Parameter) + sizeof(uint32_t));
}

// A launch of a small model stays within what every driver takes as parameters, and costs less to submit.
constexpr int kFewBytes = 4096;
constexpr int kManyBytes = 32764;
constexpr int kFew = launch_capacity(kFewBytes);
constexpr int kMany = launch_capacity(kManyBytes);
static_assert(sizeof(Launch<kFew>) <= kFewBytes && sizeof(Launch<kMany>) <= kManyBytes);

// Call submit(launch, blocks) for every `capacity` parameters, unless they have no elements; tile: elements.
template <int capacity, typename Submit>
void for_each_launch_of(const Parameters& parameters, const Factors& factors, int rows, int64_t tile,
                        int64_t most_blocks, const Submit& submit) {
  const int64_t total = parameters.size();
  Launch<capacity> launch;
  launch.factors = factors;
  launch.rows = rows;
  for (int64_t begin = 0; begin < total; begin += capacity) {
    launch.begin = static_cast<int32_t>(begin);
    launch.count = static_cast<int32_t>(std::min<int64_t>(capacity, total - begin));
    int64_t tiles = 0;
    for (int i = 0; i < launch.count; ++i) {
      launch.parameters[i] = parameters[begin + i];
      launch.first_tile[i] = static_cast<uint32_t>(tiles);
      tiles += (launch.parameters[i].count + tile - 1) / tile;
    }
    launch.tiles = static_cast<uint32_t>(tiles);
    if (tiles > 0) {
      submit(launch, std::min(tiles, most_blocks));
    }
  }
}

// The same for parameters of type T, with the smaller kind of launch if it holds all.
template <typename T, typename Submit>
void for_each_launch(const Parameters& parameters, const Factors& factors, int rows, int64_t most_blocks,
                     const Submit& submit) {
  if (parameters.size() <= kFew) {
    for_each_launch_of<kFew>(parameters, factors, rows, kTile<T>, most_blocks, submit);
  } else {
    for_each_launch_of<kMany>(parameters, factors, rows, kTile<T>, most_blocks, submit);
  }
}

struct Tile {
  int parameter;       // place in the launch
  int64_t begin, end;  // elements of it
};

// from: a parameter that the tile is in or after, such as that of the block's last one.
template <typename T, typename L>
AUTOLR_THREAD Tile find_tile(const L& launch, uint32_t tile, int from) {
  // The last parameter whose first tile is not after it; one without elements is never the last.
  int low = from;
  if (low + 1 < launch.count && launch.first_tile[low + 1] <= tile) {
    int high = launch.count;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      if (launch.first_tile[middle] <= tile) {
        low = middle;
      } else {
        high = middle;
      }
    }
  }
  const int64_t begin = static_cast<int64_t>(tile - launch.first_tile[low]) * kTile<T>;
  const int64_t end = begin + kTile<T>, count = launch.parameters[low].count;
  return {low, begin, end < count ? end : count};
}

// Whether vectors can be loaded and stored in both inputs and in every row.
template <typename T>
AUTOLR_THREAD bool is_aligned(const Parameter& parameter, int rows) {
  uintptr_t bits = reinterpret_cast<uintptr_t>(parameter.first) | reinterpret_cast<uintptr_t>(parameter.second) |
                   reinterpret_cast<uintptr_t>(parameter.rows);
  if (rows > 1) {
    bits |= static_cast<uintptr_t>(parameter.count) * sizeof(T);
  }
  return bits % kVectorBytes == 0;
}

// The elements of a tile that a thread takes: a vector, or, where they are not aligned, every kThreads-th, so that the
// threads of a warp still touch neighbours.
struct Share {
  int64_t start, end;  // end: of the tile
  int stride;
  bool is_vector;  // whole
};

template <typename T>
AUTOLR_THREAD Share share_of(const Tile& tile, int thread, bool aligned) {
  const int64_t start = tile.begin + (aligned ? thread * kWidth<T> : thread);
  return {start, tile.end, aligned ? 1 : kThreads, aligned && start + kWidth<T> <= tile.end};
}

template <typename T, typename W, typename Memory>
AUTOLR_THREAD void load(const T* from, const Share& share, W (&values)[kWidth<T>], Memory& memory) {
  T narrow[kWidth<T>];
  if (share.is_vector) {
    memory.read_vector(from + share.start, narrow);
  } else {
    for (int j = 0; j < kWidth<T>; ++j) {
      const int64_t index = share.start + j * share.stride;
      narrow[j] = T(0);
      if (index < share.end) {
        memory.read(from + index, narrow[j]);
      }
    }
  }
  for (int j = 0; j < kWidth<T>; ++j) {
    values[j] = static_cast<W>(narrow[j]);
  }
}

template <typename T, typename W, typename Memory>
AUTOLR_THREAD void store(T* to, const Share& share, const W (&values)[kWidth<T>], Memory& memory) {
  T narrow[kWidth<T>];
  for (int j = 0; j < kWidth<T>; ++j) {
    narrow[j] = static_cast<T>(values[j]);
  }
  if (share.is_vector) {
    memory.write_vector(to + share.start, narrow);
  } else {
    for (int j = 0; j < kWidth<T>; ++j) {
      const int64_t index = share.start + j * share.stride;
      if (index < share.end) {
        memory.write(to + index, narrow[j]);
      }
    }
  }
}

// Candidate n of a parameter. is_step: on the line through prev and now, else along the gradient.
template <bool is_step, typename W, typename L>
AUTOLR_THREAD Row<W> row_of(const L& launch, int parameter, int n) {
  if constexpr (is_step) {
    return step_row<W>(launch.factors.values[n]);
  } else {
    return gradient_row<W>(launch.factors.values[n], launch.factors.lr[launch.begin + parameter]);
  }
}

// Write base + coefficient * step for every row of a tile: a thread keeps what it read while it writes the N rows.
template <typename T, bool is_step, typename W, typename L, typename Memory>
AUTOLR_THREAD void write_rows(const L& launch, const Tile& tile, const Row<W>* rows, int thread, Memory& memory) {
  const Parameter& parameter = launch.parameters[tile.parameter];
  const Share share = share_of<T>(tile, thread, is_aligned<T>(parameter, launch.rows));
  W start[kWidth<T>], step[kWidth<T>], end[kWidth<T>];
  load(static_cast<const T*>(parameter.first), share, start, memory);
  load(static_cast<const T*>(parameter.second), share, end, memory);
  for (int j = 0; j < kWidth<T>; ++j) {
    step[j] = is_step ? end[j] - start[j] : end[j];
  }
  T* to = static_cast<T*>(parameter.rows);
  for (int n = 0; n < launch.rows; ++n, to += parameter.count) {
    const Row<W> row = rows[n];
    W values[kWidth<T>];
    for (int j = 0; j < kWidth<T>; ++j) {
      values[j] = candidate(is_step && row.from_now ? end[j] : start[j], row.coefficient, step[j]);
    }
    store(to, share, values, memory);
  }
}

}  // namespace autolr
