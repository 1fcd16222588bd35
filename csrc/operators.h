// The operators, but for what a device does; shared by the CPU and the CUDA code.
//
// `Device` has a name, serves(tensor), and write(work, factors), which writes the rows. A plan is what checking and
// flattening the tensors of a call gives, kept as a tensor of numbers: it is right while they lie where they lay.
#pragma once

#include <cstring>
#include <optional>

#include "arguments.h"

namespace autolr {

// What one call writes: tensors of one dtype on one device.
struct Work {
  ScalarType dtype;
  int64_t device;    // index
  int64_t rows;      // N
  const double* lr;  // [P] on the device, or null for the line through two points
  Parameters parameters;
};

// What a plan begins with; the parameters follow.
struct PlanHead {
  int64_t format, dtype, device, rows, count;
  const double* lr;
};
constexpr int64_t kPlanFormat = 0x6175746f6c7201;  // changes with what a plan holds
static_assert(sizeof(PlanHead) == 6 * sizeof(int64_t) && sizeof(Parameter) == 4 * sizeof(int64_t));

inline Tensor pack(const Work& work) {
  const int64_t count = work.parameters.size();
  const int64_t size = (sizeof(PlanHead) + count * sizeof(Parameter)) / sizeof(int64_t);
  Tensor plan = torch::stable::empty({size}, ScalarType::Long, std::nullopt,
                                     torch::stable::Device(torch::headeronly::DeviceType::CPU));
  const PlanHead head = {kPlanFormat, static_cast<int64_t>(work.dtype), work.device, work.rows, count, work.lr};
  auto* to = static_cast<char*>(plan.mutable_data_ptr());
  std::memcpy(to, &head, sizeof(head));
  std::memcpy(to + sizeof(head), work.parameters.begin(), count * sizeof(Parameter));
  return plan;
}

// The plan stays where it is while the work is used.
inline Work unpack(const std::vector<Tensor>& plan) {
  STD_TORCH_CHECK(plan.size() == 1 && plan[0].is_cpu() && plan[0].scalar_type() == ScalarType::Long &&
                      plan[0].is_contiguous() && plan[0].numel() * sizeof(int64_t) >= sizeof(PlanHead),
                  "autolr_fast: there is no plan: the tensors it was made of fit no single call");
  PlanHead head;
  const auto* from = static_cast<const char*>(plan[0].const_data_ptr());
  std::memcpy(&head, from, sizeof(head));
  STD_TORCH_CHECK(head.format == kPlanFormat && plan[0].numel() * sizeof(int64_t) ==
                                                    sizeof(PlanHead) + head.count * sizeof(Parameter),
                  "autolr_fast: this is no plan, or one of another version");
  return {static_cast<ScalarType>(head.dtype), head.device, head.rows, head.lr,
          Parameters(reinterpret_cast<const Parameter*>(from + sizeof(head)), head.count)};
}

template <typename Device>
struct Operators {
  static void stack_candidates(std::vector<Tensor> prev, std::vector<Tensor> now, std::vector<double> factors,
                               std::vector<Tensor> out) {
    write_once(prev, now, nullptr, factors, out);
  }

  static void stack_gradient_candidates(std::vector<Tensor> now, std::vector<Tensor> grad, Tensor lr,
                                        std::vector<double> factors, std::vector<Tensor> out) {
    write_once(now, grad, &lr, factors, out);
  }

  // Nothing if the tensors fit no single call: they must be sorted first. They may be of several devices, so that this
  // is registered for all.
  static std::vector<Tensor> plan(std::vector<Tensor> first, std::vector<Tensor> second, std::optional<Tensor> lr,
                                  std::vector<Tensor> out) {
    if (first.empty() || out.empty() || out[0].dim() == 0) {
      return {};
    }
    const int64_t rows = out[0].size(0);
    if (rows < 1 || rows > kMaxRows || why_not_one_call(first, second, out, rows) != nullptr) {
      return {};
    }
    check_served(first[0]);
    const double* rates = lr ? rates_of(*lr, first[0], first.size()) : nullptr;
    return {pack(work_on(first[0], rows, rates, flatten(first, second, out)))};
  }

  static void write(std::vector<Tensor> plan, std::vector<double> factors, Tensor out) {
    const Work work = unpack(plan);
    STD_TORCH_CHECK(Device::serves(out) && out.get_device_index() == work.device && out.scalar_type() == work.dtype,
                    "autolr_fast: out is not of the plan");
    STD_TORCH_CHECK(static_cast<int64_t>(factors.size()) == work.rows, "autolr_fast: ", factors.size(),
                    " factors, and the plan has ", work.rows, " rows");
    Device::write(work, factors);
  }

 private:
  static void write_once(const std::vector<Tensor>& first, const std::vector<Tensor>& second, const Tensor* lr,
                         const std::vector<double>& factors, const std::vector<Tensor>& out) {
    const auto rows = static_cast<int64_t>(factors.size());
    STD_TORCH_CHECK(rows >= 1 && rows <= kMaxRows, "autolr_fast: ", rows, " rows, and 1 to ", kMaxRows, " are served");
    const char* reason = why_not_one_call(first, second, out, rows);
    STD_TORCH_CHECK(reason == nullptr, "autolr_fast: ", reason);
    if (first.empty()) {
      return;
    }
    check_served(first[0]);
    const double* rates = lr != nullptr ? rates_of(*lr, first[0], first.size()) : nullptr;
    const std::vector<Parameter> parameters = flatten(first, second, out);
    Device::write(work_on(first[0], rows, rates, parameters), factors);
  }

  static Work work_on(const Tensor& model, int64_t rows, const double* lr, const Parameters& parameters) {
    return {model.scalar_type(), model.get_device_index(), rows, lr, parameters};
  }

  static void check_served(const Tensor& tensor) {
    STD_TORCH_CHECK(Device::serves(tensor), "autolr_fast: tensors not of a ", Device::kName, " device");
    dispatch(tensor.scalar_type(), [](auto) {});
  }
};

}  // namespace autolr
