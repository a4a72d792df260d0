// Best-fit decreasing bin packing, tie for tie as srcfast/data/forest.py defines it, in time linear in the number of items.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <functional>
#include <vector>

namespace {

using torch::stable::Tensor;

// A set of numbers below `size` that finds its least member from a number on: bits, and bits over words of bits.
class Numbers {
 public:
  explicit Numbers(int64_t size) {
    do {
      size = (size + 63) / 64;
      levels_.emplace_back(size, 0);
    } while (size > 1);
  }

  void insert(int64_t number) {
    for (auto& level : levels_) {
      level[number / 64] |= uint64_t{1} << (number % 64);
      number /= 64;
    }
  }

  void erase(int64_t number) {
    for (auto& level : levels_) {
      level[number / 64] &= ~(uint64_t{1} << (number % 64));
      if (level[number / 64] != 0) return;
      number /= 64;
    }
  }

  // The least member that is not below `number`; -1 for none.
  int64_t from(int64_t number) const {
    for (size_t height = 0; height < levels_.size(); ++height) {
      const int64_t word = number / 64;
      if (word < static_cast<int64_t>(levels_[height].size())) {
        const uint64_t left = levels_[height][word] >> (number % 64);
        if (left != 0) return descend(height, number + std::countr_zero(left));
      }
      number = word + 1;
    }
    return -1;
  }

 private:
  int64_t descend(size_t height, int64_t number) const {
    while (height > 0) {
      --height;
      number = number * 64 + std::countr_zero(levels_[height][number]);
    }
    return number;
  }

  std::vector<std::vector<uint64_t>> levels_;
};

// Items by falling size, then rising number.
std::vector<int64_t> falling(const int64_t* sizes, int64_t count, int64_t budget) {
  std::vector<int64_t> starts(budget + 2, 0);
  for (int64_t item = 0; item < count; ++item) ++starts[budget - sizes[item] + 1];
  for (int64_t place = 1; place < budget + 2; ++place) starts[place] += starts[place - 1];
  std::vector<int64_t> order(count);
  for (int64_t item = 0; item < count; ++item) order[starts[budget - sizes[item]]++] = item;
  return order;
}

// Bin of each item, and the number of bins.
int64_t assign(const int64_t* sizes, int64_t count, int64_t budget, int64_t max_items, std::vector<int64_t>& bin_of) {
  Numbers rooms(budget + 1);                           // what is left in some bin
  std::vector<std::vector<int64_t>> open(budget + 1);  // by what is left: bins, a heap with the first on top
  std::vector<int64_t> members;                        // of each bin
  for (const int64_t item : falling(sizes, count, budget)) {
    int64_t left = rooms.from(sizes[item]);
    int64_t bin = static_cast<int64_t>(members.size());
    if (left < 0) {
      left = budget;
      members.push_back(0);
    } else {
      auto& heap = open[left];
      std::pop_heap(heap.begin(), heap.end(), std::greater<>());
      bin = heap.back();
      heap.pop_back();
      if (heap.empty()) rooms.erase(left);
    }
    bin_of[item] = bin;
    left -= sizes[item];
    if (++members[bin] == max_items) continue;
    auto& heap = open[left];
    if (heap.empty()) rooms.insert(left);
    heap.push_back(bin);
    std::push_heap(heap.begin(), heap.end(), std::greater<>());
  }
  return static_cast<int64_t>(members.size());
}

// sizes [n] int64 in [0, budget]; max_items 0 for no limit. Writes the items [n] bin by bin, rising in each, and where the bins
// begin and end, offsets [bins + 1] of [n + 1]. Returns the number of bins.
int64_t pack_sizes(Tensor sizes, int64_t budget, int64_t max_items, Tensor items, Tensor offsets) {
  const int64_t count = sizes.numel();
  STD_TORCH_CHECK(sizes.is_contiguous() && items.is_contiguous() && offsets.is_contiguous(), "contiguous tensors");
  STD_TORCH_CHECK(items.numel() == count && offsets.numel() == count + 1, "room for all");
  const auto* size_of = static_cast<const int64_t*>(sizes.data_ptr());
  for (int64_t item = 0; item < count; ++item) {
    STD_TORCH_CHECK(size_of[item] >= 0 && size_of[item] <= budget, "sizes lie in [0, budget]");
  }
  std::vector<int64_t> bin_of(count);
  const int64_t bins = assign(size_of, count, budget, max_items, bin_of);
  auto* offset = static_cast<int64_t*>(offsets.data_ptr());
  std::fill(offset, offset + bins + 1, 0);
  for (const int64_t bin : bin_of) ++offset[bin + 1];
  for (int64_t bin = 0; bin < bins; ++bin) offset[bin + 1] += offset[bin];
  std::vector<int64_t> place(offset, offset + bins);
  auto* item_at = static_cast<int64_t*>(items.data_ptr());
  for (int64_t item = 0; item < count; ++item) item_at[place[bin_of[item]]++] = item;
  return bins;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(srcfast, CPU, library) {
  library.impl("pack_sizes", TORCH_BOX(&pack_sizes));
}
