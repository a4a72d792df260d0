// Operations that are written for the device: memory, copies, storages.
#pragma once

#include "dispatch.h"

namespace simulated {

using OptionalType = std::optional<at::ScalarType>;

inline c10::DeviceIndex index_of(std::optional<at::Device> on) {
  return static_cast<c10::DeviceIndex>(on ? Guard::index_of(*on) : current_device());
}

inline Tensor empty(
    c10::SymIntArrayRef size, OptionalType type, std::optional<at::Layout>, std::optional<at::Device> on, std::optional<bool> pin,
    std::optional<at::MemoryFormat> format) {
  TORCH_CHECK(!pin.value_or(false), "Only dense CPU tensors can be pinned");
  c10::DeviceGuard guard(c10::Device(c10::kCUDA, index_of(on)));
  return at::detail::empty_generic_symint(
      size, &device_allocator(), c10::DispatchKeySet(c10::DispatchKey::CUDA), c10::dtype_or_default(type), format);
}

inline Tensor empty_strided(
    c10::SymIntArrayRef size, c10::SymIntArrayRef stride, OptionalType type, std::optional<at::Layout>, std::optional<at::Device> on,
    std::optional<bool>) {
  c10::DeviceGuard guard(c10::Device(c10::kCUDA, index_of(on)));
  return at::detail::empty_strided_symint_generic(
      size, stride, &device_allocator(), c10::DispatchKeySet(c10::DispatchKey::CUDA), c10::dtype_or_default(type));
}

inline void note(const Tensor& tensor, bool writes, const char* name, Step* step) {
  use(*tensor.storage().unsafeGetStorageImpl(), writes, name, step);
}

inline void copy_within(Tensor& self, const Tensor& source, Step* step) {
  count("copy_ (device to device)");
  note(self, true, "copy_", step);
  note(source, false, "copy_", step);
}

inline void copy_to_device(Tensor& self, const Tensor& source, bool non_blocking, Step* step) {
  const bool from_pinned_memory = is_pinned(source.storage().data());
  count("copy_ (host to device)");
  if (!from_pinned_memory) report("pageable", non_blocking ? "non-blocking copy to the device" : "copy to the device");
  if (!non_blocking) wait_for_all("wait", "copy to the device");
  TORCH_CHECK(
      !is_capturing() || from_pinned_memory, "CUDA error: operation not permitted when stream is capturing (simulated): ",
      "copy from pageable memory");
  note(self, true, "copy_", step);
}

constexpr size_t kWatched = size_t{1} << 20;  // bytes of a pinned source that are compared once the copy is done

inline void watch(const Tensor& self, const Tensor& source) {
  Lock lock(mutex());
  const size_t bytes = source.storage().nbytes();
  if (bytes > kWatched) return;
  const char* start = static_cast<const char*>(source.storage().data());
  const int64_t stream = current_stream_key(self.get_device());
  from_pinned().push_back({source.storage(), std::vector<char>(start, start + bytes), stream, tick(stream)});
}

// The target holds garbage until the copy has been waited for.
inline void begin_copy_to_host(const Tensor& self, const Tensor& source, Tensor target, const Tensor& values) {
  TORCH_CHECK(!is_capturing(), "simulated device: a copy to the host within a capture");
  note(source, false, "copy_", nullptr);
  Tensor arriving = at::empty_like(values, at::MemoryFormat::Contiguous).copy_(values);
  Tensor garbage = at::empty(target.sizes(), target.options());
  memset(garbage.data_ptr(), kPoison, garbage.numel() * garbage.itemsize());
  target.copy_(garbage);
  Lock lock(mutex());
  const int64_t stream = current_stream_key(source.get_device());
  to_host().push_back({self.storage(), target, arriving, stream, tick(stream)});
}

inline Tensor& copy_(Tensor& self, const Tensor& source, bool non_blocking) {
  at::AutoDispatchBelowADInplaceOrView guard;
  if (self.is_same(source) || self.numel() == 0 || source.is_meta()) return self;
  const bool to = self.is_cuda(), from = source.is_cuda();
  Tensor expanded = source.expand_as(self);
  Tensor target = host_alias(self), values = host_alias(expanded);
  Step step{"copy_", {}, {}};
  Step* captured = is_capturing() ? &step : nullptr;
  if (!to) {
    count("copy_ (device to host)");
    if (non_blocking && is_pinned(self.storage().data())) {
      begin_copy_to_host(self, source, target, values);
      return self;
    }
    if (!is_pinned(self.storage().data())) report("pageable", "copy to the host");
    wait_for_all("wait", "copy to the host");
    note(source, false, "copy_", nullptr);
    target.copy_(values);
    return self;
  }
  from ? copy_within(self, source, captured) : copy_to_device(self, source, non_blocking, captured);
  target.copy_(values);
  if (captured) {
    step.run = [target, values, held = c10::Storage(source.is_cuda() ? c10::Storage() : source.storage())]() mutable {
      at::AutoDispatchBelowADInplaceOrView inner;
      target.copy_(values);
    };
    capturing_graph()->steps.push_back(std::move(step));
  } else if (!from && non_blocking && is_pinned(source.storage().data())) {
    watch(self, source);
  }
  return self;
}

inline Tensor copy_from(const Tensor& self, const Tensor& target, bool non_blocking) {
  Tensor result = target;
  copy_(result, self, non_blocking);
  return result;
}

// Storages -----------------------------------------------------------------------------------------------------

inline Tensor& set_storage(Tensor& self, at::Storage source, c10::SymInt offset, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  TORCH_CHECK(source.device().is_cuda(), "Attempted to set the storage of a tensor on device cuda to a storage on another device");
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(source));
  auto sizes = C10_AS_INTARRAYREF_SLOW(size);
  auto strides = C10_AS_INTARRAYREF_SLOW(stride);
  const int64_t start = offset.guard_int(__FILE__, __LINE__);
  if (strides.empty() && !sizes.empty()) {
    impl->set_storage_offset(start);
    impl->set_sizes_contiguous(sizes);
  } else {
    impl->set_sizes_and_strides(sizes, strides, start);
  }
  return self;
}
inline Tensor& set_whole_storage(Tensor& self, at::Storage source) {
  const std::vector<c10::SymInt> size{static_cast<int64_t>(source.nbytes() / self.itemsize())};
  return set_storage(self, std::move(source), 0, size, {});
}
inline Tensor& set_tensor(Tensor& self, const Tensor& source) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(source.storage());
  impl->set_sizes_and_strides(source.sizes(), source.strides(), source.storage_offset());
  return self;
}

inline void set_storage_size(c10::StorageImpl* storage, size_t bytes) {
  const int index = storage->device().index();
  auto fresh = DeviceAllocator::allocate_on(index, bytes);
  if (storage->nbytes() && bytes) memcpy(fresh.get(), storage->data_ptr().get(), std::min(storage->nbytes(), bytes));
  storage->set_data_ptr_noswap(std::move(fresh));
  storage->set_nbytes(bytes);
}
inline const Tensor& resize_(const Tensor& self, c10::SymIntArrayRef size, std::optional<at::MemoryFormat>) {
  auto sizes = C10_AS_INTARRAYREF_SLOW(size);
  const size_t bytes = (self.storage_offset() + c10::multiply_integers(sizes)) * self.itemsize();
  auto* storage = self.storage().unsafeGetStorageImpl();
  if (bytes > storage->nbytes()) set_storage_size(storage, bytes);
  self.unsafeGetTensorImpl()->set_sizes_contiguous(sizes);
  return self;
}

inline void record_stream(Tensor&, at::Stream) {}

}  // namespace simulated
