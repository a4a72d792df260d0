// CUDA graphs: operations are taped with the addresses that they had, and done by replays alone.
//
// A capture does nothing: memory outside of its pool that an operation writes is restored when it ends, and what it allocated is
// poisoned. A replay raises where memory outside of the pool that it reads or writes was freed since.
#pragma once

#include <functional>

#include "streams.h"

namespace simulated {

struct Graph;

inline Graph*& capturing_graph() {
  static Graph* value = nullptr;
  return value;
}
inline bool is_capturing() { return capturing_graph() != nullptr; }

using PoolId = std::pair<int64_t, int64_t>;

inline std::map<PoolId, std::weak_ptr<Pool>>& pools() {
  static auto* value = new std::map<PoolId, std::weak_ptr<Pool>>;
  return *value;
}
inline int64_t next_pool_number() {
  static int64_t next = 1;
  return next++;
}

struct Outside {  // a block that the capture did not allocate
  char* start;
  int64_t id;
  bool writes;
};

struct Step {
  std::string name;
  std::vector<Outside> outside;
  std::function<void()> run;
};

struct Graph {
  std::vector<Step> steps;
  std::shared_ptr<Pool> pool;
  PoolId pool_id{0, 0};
  std::map<char*, std::pair<int64_t, std::vector<char>>> before;  // what blocks held when the capture began
  int64_t first_id = 0;  // of the blocks that the capture allocates

  ~Graph() { reset(); }

  void begin(PoolId id) {
    Lock lock(mutex());
    TORCH_CHECK(!is_capturing(), "CUDA error: a graph is being captured already (simulated)");
    reset();
    pool_id = id == PoolId{0, 0} ? PoolId{next_pool_number(), 0} : id;
    pool = pools()[pool_id].lock();
    if (!pool) pools()[pool_id] = pool = std::make_shared<Pool>(current_device());
    pool->graphs++;
    first_id = next_block_id();
    capture_pool() = pool;
    capturing_graph() = this;
  }

  void end() {
    Lock lock(mutex());
    TORCH_CHECK(capturing_graph() == this, "CUDA error: this graph is not being captured (simulated)");
    capturing_graph() = nullptr;
    capture_pool() = nullptr;
    for (auto& [start, saved] : before) {
      auto it = blocks().find(start);
      if (it != blocks().end() && it->second.id == saved.first) memcpy(start, saved.second.data(), saved.second.size());
    }
    before.clear();
    for (auto& [start, block] : blocks())
      if (block.pool == pool && block.id >= first_id) memset(start, kPoison, block.size);
  }

  void replay() {
    TORCH_CHECK(!steps.empty(), "Called CUDAGraph::replay without a preceding successful capture.");
    refuse_in_capture("graph replay");
    for (auto& step : steps) {
      {
        Lock lock(mutex());
        for (auto& [start, id, writes] : step.outside) {
          auto it = blocks().find(start);
          TORCH_CHECK(
              it != blocks().end() && it->second.id == id,
              "simulated CUDA graph: ", step.name, " uses memory that was freed after the capture");
          access(start, it->second, writes, step.name);
        }
      }
      step.run();
    }
  }

  void reset() {
    Lock lock(mutex());
    steps.clear();
    if (pool) {
      pool->graphs--;
      pool->release_if_unused();
      pool = nullptr;
    }
  }

  // An operation of the capture is about to use a block.
  void touches(char* start, Block& block, bool writes, Step& step) {
    if (block.pool == pool && block.id >= first_id) return;
    step.outside.push_back({start, block.id, writes});
    if (writes && !before.count(start)) before[start] = {block.id, std::vector<char>(start, start + block.size)};
  }
};

// Notes that an operation uses a storage: checks its order against other streams' work, or remembers it for a graph's replays.
inline void use(const c10::StorageImpl& storage, bool writes, const std::string& name, Step* step) {
  if (!storage.nbytes()) return;
  Lock lock(mutex());
  auto* block = block_at(storage.data());
  if (!block) return;
  if (step)
    capturing_graph()->touches(block->first, block->second, writes, *step);
  else
    access(block->first, block->second, writes, name);
}

}  // namespace simulated
