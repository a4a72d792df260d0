// A process group in NCCL's place: another one (gloo) works on aliases of the devices' memory.
#pragma once

#include <torch/csrc/distributed/c10d/Backend.hpp>

#include "dispatch.h"

namespace simulated {

struct Collectives final : c10d::Backend {
  using Tensors = std::vector<Tensor>;
  using Lists = std::vector<Tensors>;
  using WorkPtr = c10::intrusive_ptr<c10d::Work>;

  c10::intrusive_ptr<c10d::Backend> inner;

  explicit Collectives(c10::intrusive_ptr<c10d::Backend> inner)
      : c10d::Backend(inner->getRank(), inner->getSize()), inner(std::move(inner)) {}

  const std::string getBackendName() const override { return "nccl"; }
  void setTimeout(std::chrono::milliseconds timeout) override { inner->setTimeout(timeout); }
  bool supportsCoalescing() const override { return false; }
  void setSequenceNumberForGroup() override {}
  uint64_t getSequenceNumberForGroup() override { return 0; }

  static Tensor on_host(const Tensor& tensor, bool writes, const char* name) {
    TORCH_CHECK(tensor.is_cuda() && tensor.is_non_overlapping_and_dense(), "NCCL (simulated) takes dense CUDA tensors");
    refuse_in_capture(name);
    use(*tensor.storage().unsafeGetStorageImpl(), writes, name, nullptr);
    return host_alias(tensor);
  }
  static Tensors on_host(const Tensors& tensors, bool writes, const char* name) {
    Tensors result;
    for (auto& tensor : tensors) result.push_back(on_host(tensor, writes, name));
    return result;
  }
  static Lists on_host(const Lists& lists, bool writes, const char* name) {
    Lists result;
    for (auto& list : lists) result.push_back(on_host(list, writes, name));
    return result;
  }

  WorkPtr broadcast(Tensors& tensors, const c10d::BroadcastOptions& options) override {
    auto host = on_host(tensors, true, "broadcast");
    return inner->broadcast(host, options);
  }
  WorkPtr allreduce(Tensors& tensors, const c10d::AllreduceOptions& options) override {
    auto host = on_host(tensors, true, "allreduce");
    return inner->allreduce(host, options);
  }
  WorkPtr reduce(Tensors& tensors, const c10d::ReduceOptions& options) override {
    auto host = on_host(tensors, true, "reduce");
    return inner->reduce(host, options);
  }
  WorkPtr allgather(Lists& outputs, Tensors& inputs, const c10d::AllgatherOptions& options) override {
    auto to = on_host(outputs, true, "allgather");
    auto from = on_host(inputs, false, "allgather");
    return inner->allgather(to, from, options);
  }
  WorkPtr _allgather_base(Tensor& output, Tensor& input, const c10d::AllgatherOptions& options) override {
    auto to = on_host(output, true, "allgather");
    auto from = on_host(input, false, "allgather");
    return inner->_allgather_base(to, from, options);
  }
  WorkPtr _reduce_scatter_base(Tensor& output, Tensor& input, const c10d::ReduceScatterOptions& options) override {
    auto to = on_host(output, true, "reduce_scatter");
    auto from = on_host(input, false, "reduce_scatter");
    return inner->_reduce_scatter_base(to, from, options);
  }
  WorkPtr barrier(const c10d::BarrierOptions&) override {
    refuse_in_capture("barrier");
    return inner->barrier();
  }
};

}  // namespace simulated
