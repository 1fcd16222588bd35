// What an operator is given, checked and flattened; shared by the CPU and the CUDA code.
#pragma once

#include <cstdint>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include "formulas.h"

namespace autolr {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline bool same_device(const Tensor& tensor, const Tensor& model) {
  return tensor.get_device_index() == model.get_device_index() && tensor.is_cuda() == model.is_cuda() &&
         tensor.is_cpu() == model.is_cpu();
}

// Whether a tensor has the layout of its model; one with rows has one more dimension.
inline bool alike(const Tensor& tensor, const Tensor& model, int64_t rows = -1) {
  const auto shape = tensor.sizes(), expected = model.sizes();
  const auto strides = tensor.strides(), expected_strides = model.strides();
  const size_t skip = rows >= 0 ? 1 : 0;
  if (tensor.scalar_type() != model.scalar_type() || shape.size() != expected.size() + skip ||
      !same_device(tensor, model)) {
    return false;
  }
  for (size_t i = 0; i < expected.size(); ++i) {
    if (shape[i + skip] != expected[i] || strides[i + skip] != expected_strides[i]) {
      return false;
    }
  }
  return skip == 0 || (shape[0] == rows && (rows == 1 || model.numel() == 0 || strides[0] == model.numel()));
}

inline bool is_dense(const Tensor& tensor) {
  int64_t span = 1;
  const auto shape = tensor.sizes(), strides = tensor.strides();
  for (size_t i = 0; i < shape.size(); ++i) {
    span += (shape[i] - 1) * strides[i];
  }
  return tensor.numel() == 0 || span == tensor.numel();
}

// What keeps the lists of an operator from being written by one call; null if nothing does.
inline const char* why_not_one_call(const std::vector<Tensor>& first, const std::vector<Tensor>& second,
                                    const std::vector<Tensor>& out, int64_t rows) {
  if (first.size() != second.size() || first.size() != out.size()) {
    return "lists of unequal length";
  }
  for (size_t i = 0; i < first.size(); ++i) {
    if (first[i].scalar_type() != first[0].scalar_type() || !same_device(first[i], first[0])) {
      return "tensors of several dtypes or devices in one call";
    }
    if (!is_dense(first[i])) {
      return "an input is not dense";
    }
    if (!alike(second[i], first[i])) {
      return "an input differs in shape, strides, dtype or device from its model";
    }
    if (!alike(out[i], first[i], rows)) {
      return "out differs in shape, strides, dtype or device from its model";
    }
  }
  return nullptr;
}

// The lists as the kernels take them; they were found to fit one call.
inline std::vector<Parameter> flatten(const std::vector<Tensor>& first, const std::vector<Tensor>& second,
                                      const std::vector<Tensor>& out) {
  std::vector<Parameter> parameters;
  parameters.reserve(first.size());
  for (size_t i = 0; i < first.size(); ++i) {
    parameters.push_back({first[i].const_data_ptr(), second[i].const_data_ptr(), out[i].mutable_data_ptr(),
                          static_cast<int64_t>(first[i].numel())});
  }
  return parameters;
}

inline const double* rates_of(const Tensor& lr, const Tensor& model, size_t count) {
  STD_TORCH_CHECK(lr.scalar_type() == ScalarType::Double && lr.is_contiguous() &&
                      static_cast<size_t>(lr.numel()) == count && same_device(lr, model),
                  "autolr_fast: lr must be contiguous float64 on the tensors' device, one rate for each tensor");
  return static_cast<const double*>(lr.const_data_ptr());
}

// Call f with a value of the C++ type of a floating-point dtype.
template <typename F>
void dispatch(ScalarType dtype, F&& f) {
  switch (dtype) {
    case ScalarType::Float: return f(float{});
    case ScalarType::Double: return f(double{});
    case ScalarType::Half: return f(torch::headeronly::Half{});
    case ScalarType::BFloat16: return f(torch::headeronly::BFloat16{});
    default: STD_TORCH_CHECK(false, "autolr_fast: dtype ", torch::headeronly::toString(dtype), " is not served");
  }
}

}  // namespace autolr
