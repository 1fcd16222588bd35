// The operators on a CUDA device: one launch for all tensors of a call, with their addresses as its parameters.
//
// Nothing is allocated, uploaded or waited for, so that a CUDA graph captures the operators as they are.

#include <algorithm>
#include <cstring>
#include <limits>

#include <cuda_runtime.h>

#include <torch/csrc/stable/accelerator.h>

#include "arguments.h"
#include "grid.h"

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
    __stcg(reinterpret_cast<uint4*>(to), bits);  // the compiler takes an assignment apart, to four stores
  }
};

// Grid: (chunks). Writes N rows of each chunk.
template <typename T, bool is_step, int capacity>
__global__ void __launch_bounds__(kThreads)
    write_rows_kernel(const __grid_constant__ Launch<capacity> launch) {
  using W = typename Wide<T>::type;
  __shared__ Row<W> rows[kMaxRows];
  const Chunk chunk = find_chunk(launch, blockIdx.x);
  const int thread = threadIdx.x;
  if (thread < launch.rows) {
    rows[thread] = row_of<is_step, W>(launch, chunk.parameter, thread);
  }
  __syncthreads();
  const Memory memory;
  write_rows<T, is_step>(launch, chunk, rows, thread, memory);
}

void check_device(const Tensor& tensor, const Tensor& model) {
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == model.get_device_index(),
                  "autolr_fast: tensors of several devices, or not of a CUDA device, in one call");
}

cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  // The macro that checks this has another name in each version of torch.
  const auto error = aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream);
  STD_TORCH_CHECK(error == AOTI_TORCH_SUCCESS, "autolr_fast: the current stream could not be read");
  return static_cast<cudaStream_t>(stream);
}

// first_i, second_i [*shape_i], lr [P] or null -> out_i [N, *shape_i]
template <bool is_step>
void write_all(const std::vector<Tensor>& first, const std::vector<Tensor>& second, const Tensor* lr,
               const std::vector<double>& factors, const std::vector<Tensor>& out) {
  const auto rows = static_cast<int64_t>(factors.size());
  const std::vector<Parameter> parameters = flatten(first, second, out, rows);
  if (lr != nullptr) {
    check_rates(*lr, parameters.size());
  }
  if (parameters.empty()) {
    return;
  }
  check_device(lr != nullptr ? *lr : first[0], first[0]);
  Factors scaled = {{}, lr != nullptr ? static_cast<const double*>(lr->const_data_ptr()) : nullptr};
  std::copy(factors.begin(), factors.end(), scaled.values);
  const torch::stable::accelerator::DeviceGuard guard(first[0].get_device_index());
  const cudaStream_t stream = current_stream(first[0]);
  dispatch(first[0].scalar_type(), [&](auto example) {
    using T = decltype(example);
    for_each_launch<T>(parameters, scaled, static_cast<int>(rows), [&](const auto& launch, int64_t blocks) {
      constexpr int capacity = sizeof(launch.first_chunk) / sizeof(uint32_t);
      STD_TORCH_CHECK(blocks <= std::numeric_limits<int32_t>::max(), "autolr_fast: ", blocks, " blocks in a launch");
      write_rows_kernel<T, is_step, capacity><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(launch);
      const cudaError_t error = cudaGetLastError();
      STD_TORCH_CHECK(error == cudaSuccess, "autolr_fast: a kernel was not launched: ", cudaGetErrorString(error));
    });
  });
}

void stack_candidates(std::vector<Tensor> prev, std::vector<Tensor> now, std::vector<double> factors,
                      std::vector<Tensor> out) {
  write_all<true>(prev, now, nullptr, factors, out);
}

void stack_gradient_candidates(std::vector<Tensor> now, std::vector<Tensor> grad, Tensor lr,
                               std::vector<double> factors, std::vector<Tensor> out) {
  write_all<false>(now, grad, &lr, factors, out);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(autolr_fast, CUDA, library) {
  library.impl("stack_candidates.cuda", TORCH_BOX(&stack_candidates));
  library.impl("stack_gradient_candidates.cuda", TORCH_BOX(&stack_gradient_candidates));
}

}  // namespace autolr
