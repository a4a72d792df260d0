// Operations at the CUDA dispatch key: each runs its CPU kernel on aliases of the same memory.
#pragma once

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Context.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <set>

#include "graphs.h"

namespace simulated {

using at::Tensor;
using c10::IValue;

// Generators ---------------------------------------------------------------------------------------------------

// A CUDA generator, whose numbers are those of a CPU generator.
struct Generator final : c10::GeneratorImpl {
  at::Generator inner;
  Generator(int index, uint64_t seed)
      : c10::GeneratorImpl(c10::Device(c10::kCUDA, static_cast<c10::DeviceIndex>(index)), c10::DispatchKeySet(c10::DispatchKey::CUDA)),
        inner(at::make_generator<at::CPUGeneratorImpl>(seed)) {}
  void set_current_seed(uint64_t seed) override { inner.set_current_seed(seed); }
  void set_offset(uint64_t) override {}
  uint64_t get_offset() const override { return 0; }
  uint64_t current_seed() const override { return inner.current_seed(); }
  uint64_t seed() override { return inner.seed(); }
  void set_state(const c10::TensorImpl& state) override { inner.set_state(Tensor(state_of(state))); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return inner.get_state().getIntrusivePtr(); }
  c10::GeneratorImpl* clone_impl() const override {
    auto* copy = new Generator(device().index(), 0);
    copy->inner = inner.clone();
    return copy;
  }

 private:
  static c10::intrusive_ptr<c10::TensorImpl> state_of(const c10::TensorImpl& state) {
    return c10::intrusive_ptr<c10::TensorImpl>::unsafe_reclaim_from_nonowning(const_cast<c10::TensorImpl*>(&state));
  }
};

inline at::Generator& default_generator(int index) {
  static auto* value = [] {
    auto* all = new std::vector<at::Generator>;
    for (int i = 0; i < kMostDevices; ++i) all->push_back(at::make_generator<Generator>(i, 1234));
    return all;
  }();
  return value->at(index);
}
inline at::Generator host_generator(const at::Generator& generator) {
  return static_cast<Generator*>(generator.unsafeGetGeneratorImpl())->inner;
}

// What CUDA refuses or waits for -------------------------------------------------------------------------------

using Names = std::set<std::string>;

inline const Names& waiting_operations() {  // their results, or their results' sizes, are needed on the host
  static const Names names{
      "_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique", "_unique2", "unique_dim", "unique_consecutive",
      "unique_dim_consecutive", "bincount", "histc", "is_nonzero", "_linalg_check_errors", "nonzero_static"};
  return names;
}
inline const Names& mixing_operations() {  // take some arguments on the host
  static const Names names{"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put", "set_"};
  return names;
}
inline const Names& products() {
  static const Names names{"mm", "addmm", "bmm", "baddbmm", "addmv", "mv", "dot", "addbmm", "_addmm_activation"};
  return names;
}
inline const Names& nondeterministic_operations() {  // as torch.use_deterministic_algorithms lists them for CUDA
  static const Names names{
      "cumsum", "put_", "histc", "kthvalue", "median", "grid_sampler_2d_backward", "upsample_bilinear2d_backward",
      "upsample_bicubic2d_backward", "upsample_linear1d_backward", "_adaptive_avg_pool2d_backward", "avg_pool3d_backward",
      "max_unpool2d", "nll_loss2d_forward", "reflection_pad1d_backward", "replication_pad2d_backward"};
  return names;
}

inline bool is_dense_integer(at::ScalarType type) { return !at::isFloatingType(type) && !at::isComplexType(type); }

// What an operation is called with, its tensors replaced by aliases on the host ------------------------------------

struct Aliases {
  std::map<c10::StorageImpl*, c10::Storage> storages;  // device -> host
  std::vector<std::pair<Tensor, Tensor>> pairs;        // device, host

  static c10::Storage host_storage(c10::StorageImpl* storage) {
    return c10::Storage(c10::make_intrusive<c10::StorageImpl>(
        c10::StorageImpl::use_byte_size_t(), storage->nbytes(), c10::DataPtr(storage->mutable_data_ptr().get(), c10::Device(c10::kCPU)),
        c10::GetCPUAllocator(), true));
  }
  static Tensor alias(const Tensor& tensor, const c10::Storage& storage) {
    auto host = at::detail::make_tensor<c10::TensorImpl>(
        c10::Storage(storage), c10::DispatchKeySet(c10::DispatchKey::CPU), tensor.dtype());
    host.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
    return host;
  }
  Tensor of(const Tensor& tensor) {
    for (auto& [device, host] : pairs)
      if (device.is_same(tensor)) return host;
    auto* storage = tensor.storage().unsafeGetStorageImpl();
    auto it = storages.find(storage);
    if (it == storages.end()) it = storages.emplace(storage, host_storage(storage)).first;
    pairs.emplace_back(tensor, alias(tensor, it->second));
    return pairs.back().second;
  }
};

inline Tensor host_alias(const Tensor& tensor) {
  return Aliases::alias(tensor, Aliases::host_storage(tensor.storage().unsafeGetStorageImpl()));
}

inline Tensor new_device_tensor(const Tensor& values, int index) {
  Tensor dense = values.is_non_overlapping_and_dense() ? values : values.contiguous();
  const size_t bytes = dense.numel() * dense.itemsize();
  c10::Storage storage(c10::make_intrusive<c10::StorageImpl>(
      c10::StorageImpl::use_byte_size_t(), bytes, DeviceAllocator::allocate_on(index, bytes), &device_allocator(), true));
  if (bytes) memcpy(storage.mutable_data(), dense.data_ptr(), bytes);
  auto tensor = at::detail::make_tensor<c10::TensorImpl>(
      std::move(storage), c10::DispatchKeySet(c10::DispatchKey::CUDA), values.dtype());
  tensor.unsafeGetTensorImpl()->set_sizes_and_strides(dense.sizes(), dense.strides(), 0);
  return tensor;
}

inline std::map<std::string, int64_t>& operation_counts() {
  static auto* value = new std::map<std::string, int64_t>;
  return *value;
}
inline void count(const std::string& name) {
  Lock lock(mutex());
  operation_counts()[name]++;
}

// The arguments of one call: which devices they are on, and what CUDA would say to them.
struct Call {
  const c10::OperatorHandle& op;
  std::string name, full;
  Aliases aliases;
  int device_index = -1;
  bool on_host = false;        // a tensor with dimensions
  bool host_index = false;     // an index on the host
  bool mask_index = false;     // a boolean index

  explicit Call(const c10::OperatorHandle& op) : op(op) {
    const auto& schema = op.schema();
    TORCH_CHECK_NOT_IMPLEMENTED(
        schema.name().rfind("aten::", 0) == 0 || schema.name().rfind("prims::", 0) == 0, "Could not run '", schema.name(),
        "' with arguments from the 'CUDA' backend (simulated: it has no CUDA kernel)");
    name = schema.name().substr(schema.name().find("::") + 2);
    full = name + (schema.overload_name().empty() ? "" : "." + schema.overload_name());
  }

  void on_device(int index) {
    TORCH_CHECK(
        device_index < 0 || device_index == index, "Expected all tensors to be on the same device, but found at least two devices, cuda:",
        device_index, " and cuda:", index, "! (simulated, when calling ", full, ")");
    device_index = index;
  }
  Tensor take(const Tensor& tensor) {
    if (!tensor.defined()) return tensor;
    if (tensor.is_cuda()) {
      on_device(tensor.get_device());
      return aliases.of(tensor);
    }
    on_host = on_host || (tensor.dim() > 0 && tensor.is_cpu());
    return tensor;
  }
  std::optional<Tensor> take_index(const std::optional<Tensor>& index) {
    if (!index || !index->defined()) return index;
    mask_index = mask_index || index->scalar_type() == at::kBool || index->scalar_type() == at::kByte;
    host_index = host_index || !index->is_cuda();
    return index->is_cuda() ? take(*index) : *index;
  }
  void take_arguments(torch::jit::Stack& stack, size_t begin) {
    const auto& arguments = op.schema().arguments();
    for (size_t i = 0; i < arguments.size(); ++i) {
      IValue& value = stack[begin + i];
      if (value.isTensor()) {
        value = take(value.toTensor());
      } else if (value.isTensorList()) {
        auto list = value.toTensorVector();
        for (auto& tensor : list) tensor = take(tensor);
        value = list;
      } else if (value.isOptionalTensorList()) {
        c10::List<std::optional<Tensor>> list;
        for (auto&& tensor : value.toOptionalTensorVector()) list.push_back(take_index(tensor));
        value = list;
      } else if (value.isDevice() && value.toDevice().is_cuda()) {
        on_device(Guard::index_of(value.toDevice()));
        value = c10::Device(c10::kCPU);
      } else if (value.isGenerator() && value.toGenerator().device().is_cuda()) {
        value = host_generator(value.toGenerator());
      }
    }
    for (size_t i = 0; i < arguments.size(); ++i)
      if (stack[begin + i].isNone() && arguments[i].name() == "generator")
        stack[begin + i] = host_generator(default_generator(std::max(device_index, 0)));
  }

  bool fills_by_mask(const torch::jit::Stack& stack, size_t begin) const {  // then CUDA takes masked_fill, without a wait
    if (name != "index_put_" && name != "_index_put_impl_" && name != "index_put") return false;
    const IValue& values = stack[begin + 2];
    return values.isTensor() && values.toTensor().numel() == 1 && !stack[begin + 3].toBool() && stack[begin + 1].toOptionalTensorVector().size() == 1;
  }

  void check(const torch::jit::Stack& stack, size_t begin) const {
    TORCH_CHECK(
        !on_host || mixing_operations().count(name),
        "Expected all tensors to be on the same device, but found at least two devices, cuda:", device_index,
        " and cpu! (simulated, when calling ", full, ")");
    if (products().count(name))
      for (auto& [device, host] : aliases.pairs)
        TORCH_CHECK(!is_dense_integer(device.scalar_type()), "\"", name, "_cuda\" not implemented for '", device.scalar_type(), "'");
    if (waiting_operations().count(name)) wait_for_all("wait", full);
    if (full == "repeat_interleave.Tensor" && stack[begin + 1].isNone()) wait_for_all("wait", full + " without output_size");
    // index.Tensor_out comes behind a call of nonzero, which has waited.
    if (mask_index && full != "index.Tensor_out" && !fills_by_mask(stack, begin)) wait_for_all("wait", full + " with a boolean mask");
    if (host_index) wait_for_all("wait", full + " with indices on the host");
    if (at::globalContext().deterministicAlgorithms()) check_deterministic();
  }
  void check_deterministic() const {
    if (products().count(name)) {
      const char* config = std::getenv("CUBLAS_WORKSPACE_CONFIG");
      const std::string value = config ? config : "";
      TORCH_CHECK(
          value == ":4096:8" || value == ":16:8",
          "Deterministic behavior was enabled, but this operation is not deterministic because it uses CuBLAS: set "
          "CUBLAS_WORKSPACE_CONFIG=:4096:8 (simulated)");
    }
    const bool integers = !aliases.pairs.empty() && is_dense_integer(aliases.pairs[0].first.scalar_type());
    if (nondeterministic_operations().count(name) && !integers) at::globalContext().alertNotDeterministic(full + "_cuda (simulated)");
  }

  void note_accesses(Step* step) const {
    std::set<c10::StorageImpl*> seen;
    for (auto& [device, host] : aliases.pairs) {
      auto* storage = device.storage().unsafeGetStorageImpl();
      if (seen.insert(storage).second) use(*storage, written.count(storage) > 0, full, step);
    }
  }
  std::set<c10::StorageImpl*> written;  // of arguments that the schema writes
  void note_written(const torch::jit::Stack& stack, size_t begin) {
    const auto& arguments = op.schema().arguments();
    auto add = [&](const Tensor& tensor) {
      if (tensor.defined() && tensor.is_cuda()) written.insert(tensor.storage().unsafeGetStorageImpl());
    };
    for (size_t i = 0; i < arguments.size(); ++i) {
      if (!arguments[i].alias_info() || !arguments[i].alias_info()->isWrite()) continue;
      if (stack[begin + i].isTensor()) add(stack[begin + i].toTensor());
      if (stack[begin + i].isTensorList())
        for (const auto& tensor : stack[begin + i].toTensorVector()) add(tensor);
    }
  }
};

// What comes back ----------------------------------------------------------------------------------------------

struct Copied {  // host memory to be copied to device memory after each replay
  Tensor host;
  char* to;
  size_t bytes;
};

// In-place operations and those with out= may have changed sizes, or exchanged a storage to make it larger.
inline void follow_resizes(Call& call, std::vector<Copied>& resized) {
  for (auto& [device, host] : call.aliases.pairs) {
    auto* from = host.storage().unsafeGetStorageImpl();
    auto* to = device.storage().unsafeGetStorageImpl();
    if (from->data_ptr().get() != to->data_ptr().get()) {
      auto alias = call.aliases.storages.find(to);
      TORCH_CHECK(
          alias != call.aliases.storages.end() && alias->second.unsafeGetStorageImpl() == from,
          "simulated device: storage exchanged by ", call.full);
      auto fresh = DeviceAllocator::allocate_on(device.get_device(), from->nbytes());
      if (from->nbytes()) memcpy(fresh.get(), from->data_ptr().get(), from->nbytes());
      resized.push_back({host, static_cast<char*>(fresh.get()), from->nbytes()});
      to->set_data_ptr_noswap(std::move(fresh));
      to->set_nbytes(from->nbytes());
    }
    if (!(host.sizes() == device.sizes() && host.strides() == device.strides() && host.storage_offset() == device.storage_offset()))
      device.unsafeGetTensorImpl()->set_sizes_and_strides(host.sizes(), host.strides(), host.storage_offset());
  }
}

// The device's counterpart of an output: an argument, a view of one, or new memory, which `fresh` lists.
inline Tensor give_back(Call& call, const Tensor& out, std::vector<std::pair<char*, size_t>>& fresh) {
  if (!out.defined() || call.device_index < 0) return out;
  for (auto& [device, host] : call.aliases.pairs)
    if (host.is_same(out)) return device;
  for (auto& [device, host] : call.aliases.pairs)
    if (host.storage().unsafeGetStorageImpl() == out.storage().unsafeGetStorageImpl()) {
      auto view = at::detail::make_tensor<c10::TensorImpl>(
          c10::TensorImpl::VIEW, c10::Storage(device.storage()), device.key_set(), out.dtype());
      view.unsafeGetTensorImpl()->set_sizes_and_strides(out.sizes(), out.strides(), out.storage_offset());
      return view;
    }
  Tensor made = new_device_tensor(out, call.device_index);
  if (made.numel()) fresh.emplace_back(static_cast<char*>(made.data_ptr()), made.numel() * made.itemsize());
  return made;
}

template <typename Visit>
void visit_tensors(const torch::jit::Stack& stack, size_t from, Visit visit) {
  for (size_t i = from; i < stack.size(); ++i) {
    if (stack[i].isTensor()) visit(stack[i].toTensor());
    if (stack[i].isTensorList())
      for (const auto& tensor : stack[i].toTensorVector()) visit(tensor);
  }
}

// Adds an operation that was just run to the graph that is being captured.
inline void tape(
    Step step, const Call& call, torch::jit::Stack arguments, std::vector<std::pair<char*, size_t>> fresh, std::vector<Copied> resized) {
  std::set<c10::StorageImpl*> aliased;
  for (auto& [device, host] : call.aliases.storages) aliased.insert(host.unsafeGetStorageImpl());
  const size_t returns = call.op.schema().returns().size();
  step.run = [op = call.op, arguments, fresh, resized, aliased, returns]() {
    at::AutoDispatchBelowADInplaceOrView guard;
    torch::jit::Stack stack(arguments.begin(), arguments.end());
    op.callBoxed(&stack);
    for (auto& copied : resized)
      if (copied.bytes) memcpy(copied.to, copied.host.storage().data(), copied.bytes);
    size_t next = 0;
    visit_tensors(stack, stack.size() - returns, [&](const Tensor& out) {
      if (!out.defined() || !out.numel() || aliased.count(out.storage().unsafeGetStorageImpl())) return;
      Tensor dense = out.is_non_overlapping_and_dense() ? out : out.contiguous();
      TORCH_CHECK(
          next < fresh.size() && fresh[next].second == static_cast<size_t>(dense.numel()) * dense.itemsize(),
          "simulated CUDA graph: an output has another size in the replay than in the capture");
      memcpy(fresh[next].first, dense.data_ptr(), fresh[next].second);
      ++next;
    });
  };
  capturing_graph()->steps.push_back(std::move(step));
}

inline void fallback(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  Call call(op);
  count(call.full);
  at::AutoDispatchBelowADInplaceOrView guard;
  const size_t begin = stack->size() - op.schema().arguments().size();
  call.note_written(*stack, begin);
  call.take_arguments(*stack, begin);
  call.check(*stack, begin);
  Step step{call.full, {}, {}};
  call.note_accesses(is_capturing() ? &step : nullptr);
  torch::jit::Stack arguments;
  if (is_capturing()) arguments.assign(stack->begin() + begin, stack->end());
  op.callBoxed(stack);
  std::vector<Copied> resized;
  follow_resizes(call, resized);
  std::vector<std::pair<char*, size_t>> fresh;
  const size_t from = stack->size() - op.schema().returns().size();
  for (size_t i = from; i < stack->size(); ++i) {
    IValue& value = (*stack)[i];
    if (value.isTensor()) {
      value = give_back(call, value.toTensor(), fresh);
    } else if (value.isTensorList()) {
      auto list = value.toTensorVector();
      for (auto& tensor : list) tensor = give_back(call, tensor, fresh);
      value = list;
    }
  }
  if (is_capturing()) tape(std::move(step), call, std::move(arguments), std::move(fresh), std::move(resized));
}

}  // namespace simulated
