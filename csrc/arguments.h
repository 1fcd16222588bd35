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

inline void check_alike(const char* name, const Tensor& tensor, const Tensor& model, int64_t rows) {
  const auto shape = tensor.sizes(), expected = model.sizes();
  const auto strides = tensor.strides(), expected_strides = model.strides();
  const size_t skip = rows >= 0 ? 1 : 0;  // a stacked tensor has one more dimension
  bool alike = tensor.scalar_type() == model.scalar_type() && shape.size() == expected.size() + skip &&
               tensor.get_device_index() == model.get_device_index() && tensor.is_cuda() == model.is_cuda();
  for (size_t i = 0; alike && i < expected.size(); ++i) {
    alike = shape[i + skip] == expected[i] && strides[i + skip] == expected_strides[i];
  }
  if (alike && skip) {
    alike = shape[0] == rows && (rows == 1 || model.numel() == 0 || strides[0] == model.numel());
  }
  STD_TORCH_CHECK(alike, "autolr_fast: ", name, " differs in shape, strides, dtype or device from its model");
}

inline void check_dense(const char* name, const Tensor& tensor) {
  int64_t span = 1;
  const auto shape = tensor.sizes(), strides = tensor.strides();
  for (size_t i = 0; i < shape.size(); ++i) {
    STD_TORCH_CHECK(strides[i] >= 0, "autolr_fast: ", name, " has a negative stride");
    span += (shape[i] - 1) * strides[i];
  }
  STD_TORCH_CHECK(tensor.numel() == 0 || span == tensor.numel(), "autolr_fast: ", name, " is not dense");
}

// Check the lists of an operator; of one dtype and device.
inline std::vector<Parameter> flatten(const std::vector<Tensor>& first, const std::vector<Tensor>& second,
                                      const std::vector<Tensor>& out, int64_t rows) {
  STD_TORCH_CHECK(rows >= 1 && rows <= kMaxRows, "autolr_fast: ", rows, " rows, and 1 to ", kMaxRows, " are served");
  STD_TORCH_CHECK(first.size() == second.size() && first.size() == out.size(), "autolr_fast: lists of unequal length");
  std::vector<Parameter> parameters;
  parameters.reserve(first.size());
  for (size_t i = 0; i < first.size(); ++i) {
    STD_TORCH_CHECK(first[i].scalar_type() == first[0].scalar_type() &&
                        first[i].get_device_index() == first[0].get_device_index(),
                    "autolr_fast: tensors of several dtypes or devices in one call");
    check_dense("an input", first[i]);
    check_alike("an input", second[i], first[i], -1);
    check_alike("out", out[i], first[i], rows);
    parameters.push_back({first[i].const_data_ptr(), second[i].const_data_ptr(), out[i].mutable_data_ptr(),
                          static_cast<int64_t>(first[i].numel())});
  }
  return parameters;
}

inline void check_rates(const Tensor& lr, size_t count) {
  STD_TORCH_CHECK(lr.scalar_type() == ScalarType::Double && lr.is_contiguous() &&
                      static_cast<size_t>(lr.numel()) == count,
                  "autolr_fast: lr must be contiguous float64, one rate for each tensor");
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
