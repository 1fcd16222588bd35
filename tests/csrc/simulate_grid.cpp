// Runs every thread of the CUDA operators' launches on the host, as csrc/grid.h lays them out.
//
// Checked: an element is read once and written once, nothing else is touched, vectors are aligned, the values are
// those of a loop over plain formulas, and addresses past 2^31 elements (recorded, not allocated) are right.

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <map>
#include <set>
#include <string>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "grid.h"

using namespace autolr;

namespace {

std::string running;

void require(bool holds, const char* what) {
  if (!holds) {
    std::printf("%s: %s\n", running.c_str(), what);
    std::exit(1);
  }
}

// Blocks of memory with gaps between them; counts how often each element is read and written.
class Memory {
 public:
  int64_t vectors = 0, scalars = 0;  // written

  // Room for `count` elements, so many elements after a multiple of 16 bytes.
  template <typename T>
  T* allocate(int64_t count, int shift) {
    const int64_t bytes = count * static_cast<int64_t>(sizeof(T));
    void* start = std::aligned_alloc(64, (bytes + 256) / 64 * 64 + 64);
    owned_.push_back(start);
    T* address = static_cast<T*>(start) + 64 / sizeof(T) + shift;
    std::memset(address, 0x5a, bytes);
    blocks_[reinterpret_cast<uintptr_t>(address)] = {bytes, sizeof(T), std::vector<uint8_t>(count),
                                                     std::vector<uint8_t>(count)};
    return address;
  }
  ~Memory() {
    for (void* start : owned_) {
      std::free(start);
    }
  }

  template <typename T>
  void read(const T* from, T& value) {
    count(from, 1, &Block::reads);
    value = *from;
  }
  template <typename T>
  void read_vector(const T* from, T (&values)[kWidth<T>]) {
    require(reinterpret_cast<uintptr_t>(from) % 16 == 0, "a vector is read at an odd address");
    count(from, kWidth<T>, &Block::reads);
    std::memcpy(values, from, 16);
  }
  template <typename T>
  void write(T* to, const T& value) {
    count(to, 1, &Block::writes);
    *to = value;
    ++scalars;
  }
  template <typename T>
  void write_vector(T* to, const T (&values)[kWidth<T>]) {
    require(reinterpret_cast<uintptr_t>(to) % 16 == 0, "a vector is written at an odd address");
    count(to, kWidth<T>, &Block::writes);
    std::memcpy(to, values, 16);
    ++vectors;
  }

  // Check that all of `count` elements were read, and written, so many times.
  template <typename T>
  void require_counts(const T* address, int64_t count, int reads, int writes) {
    if (count == 0) {
      return;
    }
    const auto [block, index] = find(address, count);
    for (int64_t i = index; i < index + count; ++i) {
      require(block->reads[i] == reads, "an element is not read as often as it must be");
      require(block->writes[i] == writes, "an element is not written as often as it must be");
    }
  }

 private:
  struct Block {
    int64_t bytes;
    int64_t size;
    std::vector<uint8_t> reads, writes;
  };
  std::map<uintptr_t, Block> blocks_;
  std::vector<void*> owned_;

  template <typename T>
  std::pair<Block*, int64_t> find(const T* address, int64_t count) {
    const auto place = reinterpret_cast<uintptr_t>(address);
    auto after = blocks_.upper_bound(place);
    require(after != blocks_.begin(), "memory is touched that is nobody's");
    auto& [start, block] = *std::prev(after);
    const auto offset = static_cast<int64_t>(place - start), size = static_cast<int64_t>(sizeof(T));
    require(block.size == size && offset + count * size <= block.bytes, "memory is touched out of bounds");
    return {&block, offset / size};
  }
  template <typename T>
  void count(const T* address, int64_t number, std::vector<uint8_t> Block::*kind) {
    const auto [block, index] = find(address, number);
    for (int64_t i = index; i < index + number; ++i) {
      ++(block->*kind)[i];
    }
  }
};

template <typename T>
void fill(T* values, int64_t count) {
  static uint32_t state = 1;
  for (int64_t i = 0; i < count; ++i) {
    state = state * 1664525u + 1013904223u;
    values[i] = static_cast<T>(static_cast<float>(state >> 8) / (1 << 22) - 2.0f);
  }
}

template <typename T>
bool same(T a, T b) {
  return std::memcmp(&a, &b, sizeof(T)) == 0;
}

// The launches that the operators make; `run` is given each with the number of its blocks.
template <typename T, typename Run>
void launches(const std::vector<Parameter>& parameters, const Factors& factors, int rows, int64_t most_blocks,
              const Run& run) {
  size_t number = 0;
  for_each_launch<T>(parameters, factors, rows, most_blocks, [&](const auto& launch, int64_t blocks) {
    ++number;
    require(blocks > 0 && blocks <= most_blocks, "there are more blocks than there must be, or none");
    run(launch, blocks);
  });
  require(number <= (parameters.size() + kMany - 1) / kMany, "there are more launches than there must be");
}

// Call f(tile) for what a block works on, in its order.
template <typename T, typename L, typename F>
void for_each_tile(const L& launch, int64_t block, int64_t blocks, const F& f) {
  int parameter = 0;
  for (int64_t number = block; number < launch.tiles; number += blocks) {
    const Tile tile = find_tile<T>(launch, static_cast<uint32_t>(number), parameter);
    parameter = tile.parameter;
    f(tile);
  }
}

template <typename T, bool is_step, typename L, typename M>
void run_tile(const L& launch, const Tile& tile, M& memory) {
  using W = typename Wide<T>::type;
  Row<W> rows[kMaxRows];
  for (int n = 0; n < launch.rows; ++n) {
    rows[n] = row_of<is_step, W>(launch, tile.parameter, n);
  }
  for (int thread = 0; thread < kThreads; ++thread) {
    write_rows<T, is_step>(launch, tile, rows, thread, memory);
  }
}

// shift(i, j): by how many elements block j of parameter i is past a multiple of 16 bytes.
template <typename T, bool is_step, typename Shift>
void check_rows(const char* name, const std::vector<int64_t>& counts, int rows, const Shift& shift, bool vectors,
                int64_t most_blocks = 264) {
  running = std::string(name) + (is_step ? ", step, " : ", gradient, ") + std::to_string(rows) + " rows of " +
            std::to_string(sizeof(T)) + " bytes";
  using W = typename Wide<T>::type;
  const auto total = static_cast<int>(counts.size());
  Memory memory;
  std::vector<Parameter> parameters;
  std::vector<double> lr;
  for (int i = 0; i < total; ++i) {
    T* first = memory.allocate<T>(counts[i], shift(i, 0));
    T* second = memory.allocate<T>(counts[i], shift(i, 1));
    fill(first, counts[i]);
    fill(second, counts[i]);
    parameters.push_back({first, second, memory.allocate<T>(counts[i] * rows, shift(i, 2)), counts[i]});
    lr.push_back(0.1 + 0.001 * i);
  }
  Factors factors = {{2.0, 1.0, 0.5, 0.0, 0.25, -0.3, 64.0}, lr.data()};
  for (int n = 7; n < rows; ++n) {
    factors.values[n] = 0.1 * n;
  }
  launches<T>(parameters, factors, rows, most_blocks, [&](const auto& launch, int64_t blocks) {
    for (int64_t block = 0; block < blocks; ++block) {
      for_each_tile<T>(launch, block, blocks, [&](const Tile& tile) { run_tile<T, is_step>(launch, tile, memory); });
    }
  });
  for (int i = 0; i < total; ++i) {
    const auto* first = static_cast<const T*>(parameters[i].first);
    const auto* second = static_cast<const T*>(parameters[i].second);
    const auto* out = static_cast<const T*>(parameters[i].rows);
    memory.require_counts(first, counts[i], 1, 0);
    memory.require_counts(second, counts[i], 1, 0);
    memory.require_counts(out, counts[i] * rows, 0, 1);
    for (int n = 0; n < rows; ++n) {
      const double f = factors.values[n];
      for (int64_t e = 0; e < counts[i]; ++e) {
        const W a = static_cast<W>(first[e]), b = static_cast<W>(second[e]);
        W expected = a - static_cast<W>(f * lr[i]) * b;
        if (is_step) {
          expected = std::fabs(f) < 0.5 ? a + static_cast<W>(f) * (b - a) : b + static_cast<W>(f - 1.0) * (b - a);
        }
        require(same(out[n * counts[i] + e], static_cast<T>(expected)), "a value is not the formula's");
      }
    }
  }
  require((memory.vectors > 0) == vectors, "vectors are not written where they should be, or are elsewhere");
}

// Notes which elements of which rows would be touched.
template <typename T>
struct Notes {
  std::set<uintptr_t> reads, writes;
  void read(const T* from, T& value) {
    reads.insert(reinterpret_cast<uintptr_t>(from));
    value = T(0);
  }
  void read_vector(const T* from, T (&values)[kWidth<T>]) {
    for (int j = 0; j < kWidth<T>; ++j) {
      read(from + j, values[j]);
    }
  }
  void write(T* to, const T&) { require(writes.insert(reinterpret_cast<uintptr_t>(to)).second, "written twice"); }
  void write_vector(T* to, const T (&values)[kWidth<T>]) {
    for (int j = 0; j < kWidth<T>; ++j) {
      write(to + j, values[j]);
    }
  }
};

// A parameter of `count` elements between two small ones, at addresses that nothing is behind.
template <typename T>
void check_far(int64_t count, int rows) {
  running = std::to_string(count) + " elements of " + std::to_string(sizeof(T)) + " bytes";
  const uintptr_t first = uintptr_t{1} << 40, second = uintptr_t{1} << 41, out = uintptr_t{1} << 42;
  const auto at = [](uintptr_t address) { return reinterpret_cast<void*>(address); };
  const std::vector<Parameter> parameters = {{at(4096), at(8192), at(65536), 7},
                                        {at(first), at(second), at(out), count},
                                        {at(12288), at(16384), at(1 << 20), 1000}};
  const Factors factors = {{2.0, 1.0, 0.25}, nullptr};
  launches<T>(parameters, factors, rows, 264, [&](const auto& launch, int64_t blocks) {
    int64_t done[3] = {};
    for (int64_t block = 0; block < blocks; ++block) {
      for_each_tile<T>(launch, block, blocks, [&](const Tile& tile) {
        const int64_t size = parameters[tile.parameter].count;
        require(tile.begin % kTile<T> == 0 && tile.end == std::min(tile.begin + kTile<T>, size), "a tile is amiss");
        done[tile.parameter] += tile.end - tile.begin;
        const bool is_first = tile.begin == 0, is_last = tile.end == count;
        const bool is_past = tile.begin <= int64_t{1} << 31 && tile.end > int64_t{1} << 31;
        if (tile.parameter != 1 || !(is_first || is_last || is_past)) {
          return;
        }
        Notes<T> notes;
        run_tile<T, true>(launch, tile, notes);
        const auto length = static_cast<size_t>(tile.end - tile.begin);
        require(notes.reads.size() == 2 * length && notes.writes.size() == rows * length, "elements are left out");
        for (int64_t e = tile.begin; e < tile.end; ++e) {
          require(notes.reads.count(first + e * sizeof(T)) && notes.reads.count(second + e * sizeof(T)), "not read");
          for (int64_t n = 0; n < rows; ++n) {
            require(notes.writes.count(out + (n * count + e) * sizeof(T)), "a row is written elsewhere");
          }
        }
      });
    }
    require(done[0] == 7 && done[1] == count && done[2] == 1000, "tiles do not cover the parameters");
  });
}

template <typename T>
void check_type() {
  const auto aligned = [](int, int) { return 0; };
  const auto mixed = [](int i, int j) { return i % 3 == 1 ? j : 0; };
  const auto odd = [](int, int j) { return j == 2 ? 1 : 0; };
  for (const int64_t count : {0, 1, 3, 127, 128, 1025}) {
    check_rows<T, true>("one tensor", {count}, 7, aligned, count == 128);
    check_rows<T, false>("one tensor, not aligned", {count}, 7, odd, false);
  }
  check_rows<T, true>("a whole number of vectors", {4 * kTile<T> + kWidth<T>}, 3, aligned, true);
  check_rows<T, true>("an odd number", {100003}, 3, aligned, false);
  check_rows<T, true>("an odd number, one row", {100003}, 1, aligned, true);
  check_rows<T, false>("out is not aligned", {100000}, 1, odd, false);
  const std::vector<int64_t> six = {784 * 32, 32, 32 * 32, 32, 0, 330};
  check_rows<T, true>("six tensors", six, 7, aligned, true);
  check_rows<T, true>("six tensors, 64 rows", {784, 32, 0, 32, 8192, 11}, 64, aligned, true);
  check_rows<T, false>("six tensors, some not aligned", six, 3, mixed, true);
  std::vector<int64_t> counts;
  for (int i = 0; i < 62; ++i) {
    counts.push_back(i % 3 == 0 ? 64 * 9 * (i + 1) : i % 3 * 32 + i % 2);
  }
  check_rows<T, true>("62 tensors", counts, 3, aligned, true);
  check_rows<T, false>("62 tensors by one block", counts, 3, mixed, true, 1);
  check_rows<T, true>("62 tensors by seven blocks", counts, 3, aligned, true, 7);
  counts.clear();
  for (int i = 0; i < 1000; ++i) {
    counts.push_back(i == 950 ? 20000 : i * 7 % 41);
  }
  check_rows<T, true>("1000 tensors", counts, 2, aligned, true);
  check_rows<T, false>("1000 tensors by three blocks", counts, 2, aligned, true, 3);
  check_rows<T, false>("1000 tensors, some not aligned", counts, 2, mixed, true);
}

}  // namespace

int main() {
  check_type<float>();
  check_type<double>();
  check_type<torch::headeronly::Half>();
  check_type<torch::headeronly::BFloat16>();
  check_far<float>((int64_t{3} << 31) + 5, 3);
  check_far<double>((int64_t{1} << 32) + 4096, 2);
  check_far<torch::headeronly::Half>((int64_t{5} << 30) + 1024 * 8, 3);
  std::printf("every thread did what it must\n");
}
