// What the host does before a kernel is launched, with a launch that does nothing: the backend cuda for CPU tensors.
//
// A driver copies the parameters of a kernel, and so does this. Not here: asking for the current stream and setting
// the device, and what else a driver does. benchmarks/host_time.py compiles it; no package has it.

#include <algorithm>
#include <cstring>

#include "grid.h"
#include "operators.h"

namespace autolr {
namespace {

constexpr int64_t kMostBlocks = 132 * kBlocksOfAnSm;
char submitted[kManyBytes];

struct Nothing {
  static constexpr const char* kName = "CPU";
  static bool serves(const Tensor& tensor) { return tensor.is_cpu(); }
  static void write(const Work& work, const std::vector<double>& factors) {
    Factors scaled = {{}, work.lr};
    std::copy(factors.begin(), factors.end(), scaled.values);
    dispatch(work.dtype, [&](auto example) {
      using T = decltype(example);
      for_each_launch<T>(work.parameters, scaled, static_cast<int>(work.rows), kMostBlocks,
                         [](const auto& launch, int64_t) { std::memcpy(submitted, &launch, sizeof(launch)); });
    });
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(autolr_fast, CPU, library) {
  library.impl("stack_candidates.cuda", TORCH_BOX(&Operators<Nothing>::stack_candidates));
  library.impl("write.cuda", TORCH_BOX(&Operators<Nothing>::write));
}

STABLE_TORCH_LIBRARY_IMPL(autolr_fast, CompositeExplicitAutograd, library) {
  library.impl("plan.cuda", TORCH_BOX(&Operators<Nothing>::plan));
}

}  // namespace autolr
