// What an operator is given, checked and flattened; shared by the CPU and the CUDA code.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
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

// One parameter of an operator that writes rows: three blocks of memory with their elements in the same order.
struct Flat {
  const void* first;   // [count]: prev, or now
  const void* second;  // [count]: now, or grad
  void* rows;          // [N, count]: out
  int64_t count;
};

// One parameter of K stacked models, [K, count] each.
struct Stacked {
  void* param;
  const void* grad;
  void* buffer;  // param again where no model has momentum: not touched then
  int64_t count;
};

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

inline void check_rows(int64_t rows) {
  STD_TORCH_CHECK(rows >= 1 && rows <= kMaxRows, "autolr_fast: ", rows, " rows, and 1 to ", kMaxRows, " are served");
}

// Check the lists of an operator that writes rows; of one dtype and device.
inline std::vector<Flat> flatten(const std::vector<Tensor>& first, const std::vector<Tensor>& second,
                                 const std::vector<Tensor>& out, int64_t rows) {
  check_rows(rows);
  STD_TORCH_CHECK(first.size() == second.size() && first.size() == out.size(), "autolr_fast: lists of unequal length");
  std::vector<Flat> flat;
  flat.reserve(first.size());
  for (size_t i = 0; i < first.size(); ++i) {
    STD_TORCH_CHECK(first[i].scalar_type() == first[0].scalar_type() &&
                        first[i].get_device_index() == first[0].get_device_index(),
                    "autolr_fast: tensors of several dtypes or devices in one call");
    check_dense("an input", first[i]);
    check_alike("an input", second[i], first[i], -1);
    check_alike("out", out[i], first[i], rows);
    flat.push_back({first[i].const_data_ptr(), second[i].const_data_ptr(), out[i].mutable_data_ptr(),
                    static_cast<int64_t>(first[i].numel())});
  }
  return flat;
}

// Check the lists of the SGD step; of one dtype and device.
inline std::vector<Stacked> flatten_stacked(const std::vector<Tensor>& params, const std::vector<Tensor>& grads,
                                            const std::vector<Tensor>& buffers, const std::vector<double>& momentum,
                                            int64_t rows) {
  check_rows(rows);
  STD_TORCH_CHECK(params.size() == grads.size() && (buffers.empty() || params.size() == buffers.size()),
                  "autolr_fast: lists of unequal length");
  STD_TORCH_CHECK(!buffers.empty() || std::all_of(momentum.begin(), momentum.end(), [](double m) { return m == 0; }),
                  "autolr_fast: momentum without momentum_buffers");
  std::vector<Stacked> stacked;
  stacked.reserve(params.size());
  for (size_t i = 0; i < params.size(); ++i) {
    STD_TORCH_CHECK(params[i].scalar_type() == params[0].scalar_type() &&
                        params[i].get_device_index() == params[0].get_device_index(),
                    "autolr_fast: tensors of several dtypes or devices in one call");
    STD_TORCH_CHECK(params[i].dim() >= 1 && params[i].sizes()[0] == rows,
                    "autolr_fast: params must have one row for each model");
    const int64_t count = static_cast<int64_t>(params[i].numel()) / rows;
    STD_TORCH_CHECK(rows == 1 || count == 0 || params[i].strides()[0] == count,
                    "autolr_fast: params: rows must follow each other");
    check_dense("params", params[i]);
    check_alike("grads", grads[i], params[i], -1);
    const Tensor& buffer = buffers.empty() ? params[i] : buffers[i];
    check_alike("momentum_buffers", buffer, params[i], -1);
    stacked.push_back({params[i].mutable_data_ptr(), grads[i].const_data_ptr(), buffer.mutable_data_ptr(), count});
  }
  return stacked;
}

inline void check_rates(const Tensor& lr, size_t count) {
  STD_TORCH_CHECK(lr.scalar_type() == ScalarType::Double && lr.is_contiguous() &&
                      static_cast<size_t>(lr.numel()) == count,
                  "autolr_fast: lr must be contiguous float64, one rate for each tensor");
}

inline void check_settings(int64_t rows, std::initializer_list<size_t> sizes) {
  for (const size_t size : sizes) {
    STD_TORCH_CHECK(static_cast<int64_t>(size) == rows, "autolr_fast: give every setting for each model");
  }
}

inline Normalization parse_normalization(const std::string& name) {
  if (name == "minmax") return Normalization::kMinMax;
  if (name == "zscore") return Normalization::kZScore;
  if (name == "sum") return Normalization::kSum;
  STD_TORCH_CHECK(name == "none", "autolr_fast: normalize=", name, " is not known");
  return Normalization::kNone;
}

inline void check_score(const Tensor& losses, const std::vector<double>& factors, const Tensor& level,
                        const Tensor& weights, const Tensor& factor) {
  const auto count = static_cast<int64_t>(factors.size());
  check_rows(count);
  for (const Tensor* tensor : {&losses, &level, &weights, &factor}) {
    STD_TORCH_CHECK(tensor->scalar_type() == ScalarType::Double && tensor->is_contiguous(),
                    "autolr_fast: score takes contiguous float64 tensors");
  }
  STD_TORCH_CHECK(losses.numel() == count && weights.numel() == count && level.numel() == 1 && factor.numel() == 1,
                  "autolr_fast: score takes one loss and one weight for each factor, and one level and one factor");
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
