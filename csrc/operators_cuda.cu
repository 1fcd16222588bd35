// The operators on a CUDA device: one launch for all tensors of a call, with their addresses as its parameters.
//
// Nothing is allocated, uploaded or waited for, so that a CUDA graph captures the operators as they are.

#include <algorithm>
#include <cstring>

#include <cuda_runtime.h>

#include <torch/csrc/stable/accelerator.h>

#include "grid.h"
#include "operators.h"

namespace autolr {
namespace {

static_assert(CUDART_VERSION >= 12010, "kernel parameters of over 4 KiB need CUDA 12.1");
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 700
#error "kernel parameters of over 4 KiB need sm_70"
#endif
static_assert(kThreads >= kMaxRows, "a block's threads work out one row each");

struct Memory {
  template <typename T>
  __device__ __forceinline__ void read(const T* from, T& value) const {
    value = *from;
  }
  template <typename T>
  __device__ __forceinline__ void read_vector(const T* from, T (&values)[kWidth<T>]) const {
    const uint4 bits = *reinterpret_cast<const uint4*>(from);
    std::memcpy(values, &bits, sizeof(bits));
  }
  template <typename T>
  __device__ __forceinline__ void write(T* to, const T& value) const {
    *to = value;
  }
  template <typename T>
  __device__ __forceinline__ void write_vector(T* to, const T (&values)[kWidth<T>]) const {
    uint4 bits;
    std::memcpy(&bits, values, sizeof(bits));
    // Evicted first: the rows of all but small models are far larger than the cache. (An assignment the compiler would
    // take apart, to four stores.)
    __stcs(reinterpret_cast<uint4*>(to), bits);
  }
};

// Grid: (blocks). Writes N rows of every tile.
template <typename T, bool is_step, int capacity>
__global__ void __launch_bounds__(kThreads, kBlocksOfAnSm)
    write_rows_kernel(const __grid_constant__ Launch<capacity> launch) {
  using W = typename Wide<T>::type;
  __shared__ Row<W> rows[kMaxRows];
  const int thread = threadIdx.x;
  const Memory memory;
  int parameter = -1;  // that `rows` are of
  for (uint32_t number = blockIdx.x; number < launch.tiles; number += gridDim.x) {
    const Tile tile = find_tile<T>(launch, number, parameter < 0 ? 0 : parameter);
    if (is_step ? parameter < 0 : parameter != tile.parameter) {
      __syncthreads();  // until nobody reads those of the last
      if (thread < launch.rows) {
        rows[thread] = row_of<is_step, W>(launch, tile.parameter, thread);
      }
      __syncthreads();
    }
    parameter = tile.parameter;
    write_rows<T, is_step>(launch, tile, rows, thread, memory);
  }
}

// Blocks that the device holds at once, as many as a launch starts.
int64_t most_blocks(int64_t device) {
  int processors = 0;
  const cudaError_t error =
      cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, static_cast<int>(device));
  STD_TORCH_CHECK(error == cudaSuccess, "autolr_fast: the device is not known: ", cudaGetErrorString(error));
  return int64_t{kBlocksOfAnSm} * processors;
}

cudaStream_t current_stream(int64_t device) {
  void* stream = nullptr;
  // The macro that checks this has another name in each version of torch.
  const auto error = aoti_torch_get_current_cuda_stream(static_cast<int32_t>(device), &stream);
  STD_TORCH_CHECK(error == AOTI_TORCH_SUCCESS, "autolr_fast: the current stream could not be read");
  return static_cast<cudaStream_t>(stream);
}

template <bool is_step>
void write_all(const Work& work, const std::vector<double>& factors) {
  Factors scaled = {{}, work.lr};
  std::copy(factors.begin(), factors.end(), scaled.values);
  const torch::stable::accelerator::DeviceGuard guard(static_cast<int32_t>(work.device));
  const cudaStream_t stream = current_stream(work.device);
  const int64_t most = most_blocks(work.device);
  const auto rows = static_cast<int>(work.rows);
  dispatch(work.dtype, [&](auto example) {
    using T = decltype(example);
    for_each_launch<T>(work.parameters, scaled, rows, most, [&](const auto& launch, int64_t blocks) {
      constexpr int capacity = sizeof(launch.first_tile) / sizeof(uint32_t);
      write_rows_kernel<T, is_step, capacity><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(launch);
      const cudaError_t error = cudaGetLastError();
      STD_TORCH_CHECK(error == cudaSuccess, "autolr_fast: a kernel was not launched: ", cudaGetErrorString(error));
    });
  });
}

struct Cuda {
  static constexpr const char* kName = "CUDA";
  static bool serves(const Tensor& tensor) { return tensor.is_cuda(); }
  static void write(const Work& work, const std::vector<double>& factors) {
    work.lr == nullptr ? write_all<true>(work, factors) : write_all<false>(work, factors);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(autolr_fast, CUDA, library) {
  library.impl("stack_candidates.cuda", TORCH_BOX(&Operators<Cuda>::stack_candidates));
  library.impl("stack_gradient_candidates.cuda", TORCH_BOX(&Operators<Cuda>::stack_gradient_candidates));
  library.impl("write.cuda", TORCH_BOX(&Operators<Cuda>::write));
}

STABLE_TORCH_LIBRARY_IMPL(autolr_fast, CompositeExplicitAutograd, library) {
  library.impl("plan.cuda", TORCH_BOX(&Operators<Cuda>::plan));
}

}  // namespace autolr
