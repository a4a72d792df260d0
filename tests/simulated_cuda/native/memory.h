// Memory of the simulated devices: host memory in blocks of 512 bytes, poisoned, counted and limited per device, with the figures of
// PyTorch's caching allocator; pools of captured graphs; pinned host memory.
#pragma once

#include <ATen/ATen.h>
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>

#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

namespace simulated {

constexpr size_t kBlock = 512;                    // the caching allocator's granularity
constexpr size_t kSegment = size_t{2} << 20;      // and that of what it reserves
constexpr size_t kSmall = size_t{1} << 20;        // up to which blocks are small ones
constexpr unsigned char kPoison = 0xFF;           // NaN in every floating type, -1 in every integer
constexpr int kMostDevices = 16;

inline std::recursive_mutex& mutex() {
  static std::recursive_mutex value;
  return value;
}
using Lock = std::lock_guard<std::recursive_mutex>;

inline size_t rounded(size_t size, size_t step) { return (size + step - 1) / step * step; }

inline char* new_host_memory(size_t bytes) {
  char* start = static_cast<char*>(aligned_alloc(kBlock, std::max(rounded(bytes, kBlock), kBlock)));
  TORCH_CHECK(start != nullptr, "simulated device: the host is out of memory");
  memset(start, kPoison, bytes);
  return start;
}

struct Figures {
  size_t now = 0, peak = 0;
  void add(size_t bytes) { peak = std::max(peak, now += bytes); }
  void take(size_t bytes) { now -= bytes; }
};

struct Device {
  size_t total = size_t{80} << 30;
  size_t limit = SIZE_MAX;  // of what may be reserved
  Figures allocated, reserved;
  size_t main_live = 0;      // bytes of live blocks outside of graphs' pools
  size_t main_reserved = 0;  // and what is reserved for them
  int64_t allocations = 0, retries = 0, out_of_memory = 0;
};

inline Device& device(int index) {
  static Device devices[kMostDevices];
  TORCH_CHECK(index >= 0 && index < kMostDevices, "CUDA error: invalid device ordinal");
  return devices[index];
}

// Gives back what is reserved and unused, as torch.cuda.empty_cache does.
inline void trim(Device& on) {
  const size_t needed = rounded(on.main_live, kSegment);
  if (on.main_reserved > needed) {
    on.reserved.take(on.main_reserved - needed);
    on.main_reserved = needed;
  }
}

[[noreturn]] inline void raise_out_of_memory(Device& on, int index, size_t bytes) {
  on.out_of_memory++;
  TORCH_CHECK_WITH(
      OutOfMemoryError, false, "CUDA out of memory. Tried to allocate ", bytes, " bytes. GPU ", index, " (simulated) has a limit of ",
      std::min(on.limit, on.total), " bytes, of which ", on.reserved.now, " are reserved and ", on.allocated.now, " allocated.");
}

// Makes sure that `growth()` more bytes may be reserved; where they may not, tries again after giving back what is unused.
template <typename Growth>
void reserve(int index, size_t requested, Growth growth) {
  Device& on = device(index);
  const size_t limit = std::min(on.limit, on.total);
  if (on.reserved.now + growth() > limit) {
    const size_t before = on.reserved.now;
    trim(on);
    if (on.reserved.now < before) on.retries++;
    if (on.reserved.now + growth() > limit) raise_out_of_memory(on, index, requested);
  }
  on.reserved.add(growth());
}

// Segments of one class of sizes: small and large blocks don't share any, as in the caching allocator.
struct Arena {
  std::map<char*, size_t> segments;
  std::map<char*, size_t> free;

  char* take(int device_index, size_t bytes) {
    auto best = free.end();
    for (auto it = free.begin(); it != free.end(); ++it)
      if (it->second >= bytes && (best == free.end() || it->second < best->second)) best = it;
    if (best == free.end()) {
      const size_t size = rounded(bytes, kSegment);
      reserve(device_index, bytes, [size] { return size; });
      char* start = new_host_memory(size);
      segments[start] = size;
      best = free.emplace(start, size).first;
    }
    auto [start, size] = *best;
    free.erase(best);
    if (size > bytes) free[start + bytes] = size - bytes;
    return start;
  }

  void give(char* start, size_t bytes) {
    auto segment = --segments.upper_bound(start);
    auto it = free.emplace(start, bytes).first;
    auto next = std::next(it);
    if (next != free.end() && it->first + it->second == next->first && next->first < segment->first + segment->second) {
      it->second += next->second;
      free.erase(next);
    }
    if (it != free.begin()) {
      auto before = std::prev(it);
      if (before->first + before->second == it->first && before->first >= segment->first) {
        before->second += it->second;
        free.erase(it);
      }
    }
  }

  void release(int device_index) {
    for (auto& [start, size] : segments) {
      device(device_index).reserved.take(size);
      memset(start, kPoison, size);
      ::free(start);
    }
    segments.clear();
    free.clear();
  }
};

// A pool of captured graphs: its segments stay where they are as long as a graph or a tensor uses it. What is freed in it is handed
// out again within the pool, also to the next graph that is captured into it.
struct Pool {
  int device_index;
  int graphs = 0;   // that use it
  size_t live = 0;  // blocks that tensors hold
  Arena small, large;

  explicit Pool(int index) : device_index(index) {}

  Arena& arena_of(size_t bytes) { return bytes <= kSmall ? small : large; }
  char* take(size_t bytes) {
    char* start = arena_of(bytes).take(device_index, bytes);
    live++;
    return start;
  }
  void give(char* start, size_t bytes) {
    live--;
    arena_of(bytes).give(start, bytes);
  }
  void release_if_unused() {
    if (graphs > 0 || live > 0) return;
    small.release(device_index);
    large.release(device_index);
  }
};

// Accesses by streams, for the check that work on one stream waits for the other's: see streams.h.
struct Access {
  int64_t stream = -1;
  int64_t number = 0;
};

struct Block {
  size_t size = 0;  // bytes, rounded
  int64_t id = 0;   // never used twice
  int device_index = 0;
  std::shared_ptr<Pool> pool;  // none: the ordinary memory
  Access written;
  std::vector<Access> read;  // since it was written
};

inline std::map<char*, Block>& blocks() {
  static auto* value = new std::map<char*, Block>;  // never destroyed: tensors may outlive main
  return *value;
}

inline std::shared_ptr<Pool>& capture_pool() {
  static std::shared_ptr<Pool> value;  // set during a capture
  return value;
}

inline std::pair<char* const, Block>* block_at(const void* address) {
  auto it = blocks().upper_bound(static_cast<char*>(const_cast<void*>(address)));
  if (it == blocks().begin()) return nullptr;
  --it;
  return static_cast<const char*>(address) < it->first + std::max(it->second.size, kBlock) ? &*it : nullptr;
}

inline int64_t& next_block_id() {
  static int64_t value = 1;
  return value;
}

inline void free_device_memory(void* address) {
  Lock lock(mutex());
  auto it = blocks().find(static_cast<char*>(address));
  if (it == blocks().end()) return;
  Block block = it->second;
  blocks().erase(it);
  Device& on = device(block.device_index);
  on.allocated.take(block.size);
  memset(address, kPoison, block.size);
  if (block.pool) {
    block.pool->give(static_cast<char*>(address), block.size);
    block.pool->release_if_unused();
    return;
  }
  on.main_live -= block.size;
  free(address);
}

inline char* new_device_memory(int index, size_t bytes) {
  Lock lock(mutex());
  const size_t size = std::max(rounded(bytes, kBlock), kBlock);
  Device& on = device(index);
  auto pool = capture_pool();
  char* start = nullptr;
  if (pool && pool->device_index == index) {
    start = pool->take(size);
    memset(start, kPoison, size);
  } else {
    pool = nullptr;
    const size_t needed = rounded(on.main_live + size, kSegment);
    if (needed > on.main_reserved) {
      reserve(index, bytes, [&] { return needed - on.main_reserved; });
      on.main_reserved = needed;
    }
    on.main_live += size;
    start = new_host_memory(size);
  }
  blocks()[start] = Block{size, next_block_id()++, index, pool, {}, {}};
  on.allocated.add(size);
  on.allocations++;
  return start;
}

int current_device();  // streams.h

struct DeviceAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override { return allocate_on(current_device(), bytes); }
  static c10::DataPtr allocate_on(int index, size_t bytes) {
    char* start = bytes ? new_device_memory(index, bytes) : nullptr;
    return {start, start, &free_device_memory, c10::Device(c10::kCUDA, static_cast<c10::DeviceIndex>(index))};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free_device_memory; }
  void copy_data(void* to, const void* from, size_t bytes) const override { memcpy(to, from, bytes); }
};

inline DeviceAllocator& device_allocator() {
  static auto* value = new DeviceAllocator;
  return *value;
}

// Pinned host memory -----------------------------------------------------------------------------------------

inline std::map<char*, size_t>& pinned() {
  static auto* value = new std::map<char*, size_t>;
  return *value;
}

inline void free_pinned_memory(void* address) {
  Lock lock(mutex());
  pinned().erase(static_cast<char*>(address));
  free(address);
}

struct PinnedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    Lock lock(mutex());
    char* start = new_host_memory(std::max<size_t>(bytes, 1));
    pinned()[start] = std::max<size_t>(bytes, 1);
    return {start, start, &free_pinned_memory, c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free_pinned_memory; }
  void copy_data(void* to, const void* from, size_t bytes) const override { memcpy(to, from, bytes); }
};

inline PinnedAllocator& pinned_allocator() {
  static auto* value = new PinnedAllocator;
  return *value;
}

inline bool is_pinned(const void* address) {
  Lock lock(mutex());
  auto it = pinned().upper_bound(static_cast<char*>(const_cast<void*>(address)));
  if (it == pinned().begin()) return false;
  --it;
  return static_cast<const char*>(address) < it->first + it->second;
}

}  // namespace simulated
