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

// A launch of a small model stays within what every driver takes as parameters, and costs less to submit.
constexpr int kFewBytes = 4096;
constexpr int kManyBytes = 32764;
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
    write_rows_kernel(const __grid_constant__ Launch<Flat, Factors, capacity> launch) {
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

// Grid: (chunks, K). Takes a chunk of one model a step.
template <typename T, int capacity>
__global__ void __launch_bounds__(kThreads)
    step_model_kernel(const __grid_constant__ Launch<Stacked, Models<typename Wide<T>::type>, capacity> launch) {
  const Memory memory;
  step_model<T>(launch, find_chunk(launch, blockIdx.x), blockIdx.y, threadIdx.x, memory);
}

// Grid: (1), of one thread.
__global__ void score_kernel(const double* losses, const __grid_constant__ Factors factors, int count,
                             Normalization normalization, double exponent, double lowest, double highest,
                             double* level, double* weights, double* factor) {
  score(losses, factors.values, count, normalization, exponent, lowest, highest, level, weights, factor);
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

void check_launch() {
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, "autolr_fast: a kernel was not launched: ", cudaGetErrorString(error));
}

// Call submit(launch, blocks) with the smaller kind of launch if it holds all parameters.
template <typename T, typename P, typename S, typename Submit>
void for_each_launch(const std::vector<P>& parameters, const S& settings, int64_t rows, int64_t blocks_per_chunk,
                     const Submit& submit) {
  constexpr int few = launch_capacity<P, S>(kFewBytes), many = launch_capacity<P, S>(kManyBytes);
  static_assert(sizeof(Launch<P, S, few>) <= kFewBytes && sizeof(Launch<P, S, many>) <= kManyBytes);
  const auto checked = [&](const auto& launch, int64_t blocks) {
    STD_TORCH_CHECK(blocks <= std::numeric_limits<int32_t>::max(), "autolr_fast: ", blocks, " blocks in a launch");
    submit(launch, static_cast<unsigned>(blocks));
    check_launch();
  };
  const int n = static_cast<int>(rows);
  if (parameters.size() <= few) {
    autolr::for_each_launch<few>(parameters, settings, n, kTile<T>, blocks_per_chunk, checked);
  } else {
    autolr::for_each_launch<many>(parameters, settings, n, kTile<T>, blocks_per_chunk, checked);
  }
}

// first_i, second_i [*shape_i], lr [P] or null -> out_i [N, *shape_i]
template <bool is_step>
void write_all(const std::vector<Tensor>& first, const std::vector<Tensor>& second, const Tensor* lr,
               const std::vector<double>& factors, const std::vector<Tensor>& out) {
  const auto rows = static_cast<int64_t>(factors.size());
  const std::vector<Flat> parameters = flatten(first, second, out, rows);
  if (lr != nullptr) {
    check_rates(*lr, parameters.size());
  }
  if (parameters.empty()) {
    return;
  }
  check_device(lr != nullptr ? *lr : first[0], first[0]);
  Factors settings = {{}, lr != nullptr ? static_cast<const double*>(lr->const_data_ptr()) : nullptr};
  std::copy(factors.begin(), factors.end(), settings.values);
  const torch::stable::accelerator::DeviceGuard guard(first[0].get_device_index());
  const cudaStream_t stream = current_stream(first[0]);
  dispatch(first[0].scalar_type(), [&](auto example) {
    using T = decltype(example);
    for_each_launch<T>(parameters, settings, rows, 1, [&](const auto& launch, unsigned blocks) {
      constexpr int capacity = sizeof(launch.first_chunk) / sizeof(uint32_t);
      write_rows_kernel<T, is_step, capacity><<<blocks, kThreads, 0, stream>>>(launch);
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

void stacked_sgd_step(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> momentum_buffers,
                      std::vector<double> lr, std::vector<double> momentum, std::vector<double> weight_decay,
                      std::vector<double> dampening, std::vector<bool> nesterov, bool first_step) {
  const auto rows = static_cast<int64_t>(lr.size());
  const std::vector<Stacked> parameters = flatten_stacked(params, grads, momentum_buffers, momentum, rows);
  check_settings(rows, {momentum.size(), weight_decay.size(), dampening.size(), nesterov.size()});
  if (parameters.empty()) {
    return;
  }
  check_device(params[0], params[0]);
  const torch::stable::accelerator::DeviceGuard guard(params[0].get_device_index());
  const cudaStream_t stream = current_stream(params[0]);
  dispatch(params[0].scalar_type(), [&](auto example) {
    using T = decltype(example);
    using W = typename Wide<T>::type;
    Models<W> settings = {};
    settings.first_step = first_step;
    for (int64_t k = 0; k < rows; ++k) {
      settings.models[k] = sgd<W>(lr[k], momentum[k], weight_decay[k], dampening[k], nesterov[k]);
    }
    for_each_launch<T>(parameters, settings, rows, rows, [&](const auto& launch, unsigned blocks) {
      constexpr int capacity = sizeof(launch.first_chunk) / sizeof(uint32_t);
      step_model_kernel<T, capacity><<<dim3(blocks, rows), kThreads, 0, stream>>>(launch);
    });
  });
}

void score_losses(Tensor losses, std::vector<double> factors, std::string normalize, double exponent, double lowest,
                  double highest, Tensor level, Tensor weights, Tensor factor) {
  check_score(losses, factors, level, weights, factor);
  for (const Tensor* tensor : {&losses, &level, &weights, &factor}) {
    check_device(*tensor, losses);
  }
  Factors settings = {};
  std::copy(factors.begin(), factors.end(), settings.values);
  const Normalization normalization = parse_normalization(normalize);
  const torch::stable::accelerator::DeviceGuard guard(losses.get_device_index());
  score_kernel<<<1, 1, 0, current_stream(losses)>>>(
      static_cast<const double*>(losses.const_data_ptr()), settings, static_cast<int>(factors.size()),
      normalization, exponent, lowest, highest, static_cast<double*>(level.mutable_data_ptr()),
      static_cast<double*>(weights.mutable_data_ptr()), static_cast<double*>(factor.mutable_data_ptr()));
  check_launch();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(autolr_fast, CUDA, library) {
  library.impl("stack_candidates.cuda", TORCH_BOX(&stack_candidates));
  library.impl("stack_gradient_candidates.cuda", TORCH_BOX(&stack_gradient_candidates));
  library.impl("stacked_sgd_step.cuda", TORCH_BOX(&stacked_sgd_step));
  library.impl("score.cuda", TORCH_BOX(&score_losses));
}

}  // namespace autolr
