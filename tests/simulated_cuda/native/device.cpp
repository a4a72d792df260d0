// A simulated CUDA device for a CPU build of PyTorch: see ../README.md.
#include <ATen/detail/CUDAHooksInterface.h>
#include <torch/csrc/profiler/stubs/base.h>
#include <torch/extension.h>

#include "collectives.h"
#include "kernels.h"

namespace simulated {

C10_REGISTER_GUARD_IMPL(CUDA, Guard);

struct Hooks : at::CUDAHooksInterface {
  using Index = c10::DeviceIndex;
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(Index) const override { return true; }
  Index current_device() const override { return static_cast<Index>(simulated::current_device()); }
  Index getCurrentDevice() const override { return static_cast<Index>(simulated::current_device()); }
  Index deviceCount() const override { return static_cast<Index>(number_of_devices()); }
  void setCurrentDevice(Index index) const override { set_current_device(index); }
  Index exchangeDevice(Index index) const override {
    const Index before = getCurrentDevice();
    if (index >= 0) set_current_device(index);
    return before;
  }
  Index maybeExchangeDevice(Index index) const override { return exchangeDevice(index); }
  int getNumGPUs() const override { return number_of_devices(); }
  bool isPinnedPtr(const void* address) const override { return is_pinned(address); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator(); }
  c10::Allocator* getCUDADeviceAllocator() const override { return &device_allocator(); }
  c10::Device getDeviceFromPtr(void* address) const override {
    Lock lock(mutex());
    auto* block = block_at(address);
    TORCH_CHECK(block, "CUDA error: the address is no device memory (simulated)");
    return {c10::kCUDA, static_cast<Index>(block->second.device_index)};
  }
  const at::Generator& getDefaultGenerator(Index index) const override {
    return default_generator(index < 0 ? simulated::current_device() : index);
  }
  at::Generator getNewGenerator(Index index) const override {
    return at::make_generator<Generator>(index < 0 ? simulated::current_device() : index, c10::default_rng_seed_val);
  }
  void deviceSynchronize(Index) const override { wait_for_all("synchronize", "device"); }
};

// Without these, the profiler raises and catches an error for every operation, which takes it minutes. It has no times to tell.
struct ProfilerStubs final : torch::profiler::impl::ProfilerStubs {
  using Event = torch::profiler::impl::ProfilerVoidEventStub;
  void record(c10::DeviceIndex* index, Event*, int64_t* nanoseconds) const override {
    if (index) *index = static_cast<c10::DeviceIndex>(simulated::current_device());
    if (nanoseconds) *nanoseconds = 0;
  }
  float elapsed(const Event*, const Event*) const override { return 0; }
  void mark(const char*) const override {}
  void rangePush(const char*) const override {}
  void rangePop() const override {}
  bool enabled() const override { return true; }
  void onEachDevice(std::function<void(int)> work) const override {
    for (int i = 0; i < number_of_devices(); ++i) work(i);
  }
  void synchronize() const override {}
};

}  // namespace simulated

namespace at {
namespace {
using simulated::Hooks;
C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, Hooks)
}  // namespace
}  // namespace at

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&simulated::fallback>()); }
TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", TORCH_FN(simulated::empty));
  m.impl("empty_strided", TORCH_FN(simulated::empty_strided));
  m.impl("copy_", TORCH_FN(simulated::copy_));
  m.impl("_copy_from", TORCH_FN(simulated::copy_from));
  m.impl("set_.source_Storage_storage_offset", TORCH_FN(simulated::set_storage));
  m.impl("set_.source_Storage", TORCH_FN(simulated::set_whole_storage));
  m.impl("set_.source_Tensor", TORCH_FN(simulated::set_tensor));
  m.impl("resize_", TORCH_FN(simulated::resize_));
  m.impl("record_stream", TORCH_FN(simulated::record_stream));
}

namespace {

using namespace simulated;
namespace py = pybind11;
using Unlocked = py::call_guard<py::gil_scoped_release>;

// torch has asked for the hooks while it was imported, and keeps the object that it got: that object gets our virtual functions.
void take_over_hooks() {
  static Hooks ours{at::CUDAHooksArgs{}};
  auto* theirs = const_cast<at::CUDAHooksInterface*>(&at::detail::getCUDAHooks());
  static_assert(sizeof(Hooks) == sizeof(void*), "an object without data of its own");
  if (!theirs->hasCUDA()) *reinterpret_cast<void**>(theirs) = *reinterpret_cast<void**>(&ours);
}

std::map<std::string, int64_t> memory_figures(int index) {
  Lock lock(mutex());
  const Device& on = device(index);
  auto number = [](size_t value) { return value == SIZE_MAX ? int64_t{-1} : static_cast<int64_t>(value); };
  return {
      {"allocated", number(on.allocated.now)}, {"allocated_peak", number(on.allocated.peak)}, {"reserved", number(on.reserved.now)},
      {"reserved_peak", number(on.reserved.peak)}, {"total", number(on.total)}, {"limit", number(on.limit)},
      {"allocations", on.allocations}, {"retries", on.retries}, {"out_of_memory", on.out_of_memory}};
}

void record_python(py::object work, std::vector<Tensor> tensors) {  // Python code that is part of a captured graph
  if (!is_capturing()) return;
  auto held = std::shared_ptr<py::object>(new py::object(std::move(work)), [](py::object* object) {
    py::gil_scoped_acquire gil;
    delete object;
  });
  Step step{"python", {}, {}};
  for (auto& tensor : tensors)
    if (tensor.is_cuda()) use(*tensor.storage().unsafeGetStorageImpl(), true, "a kernel", &step);
  step.run = [held] {
    py::gil_scoped_acquire gil;
    (*held)();
  };
  capturing_graph()->steps.push_back(std::move(step));
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  c10::SetAllocator(c10::kCUDA, &device_allocator());
  take_over_hooks();
  static ProfilerStubs profiler;
  torch::profiler::impl::registerCUDAMethods(&profiler);
  py::module_::import("torch.distributed");

  m.def("set_callback", [](py::object function) { callback() = function.release().ptr(); });
  m.def("set_devices", [](int count) { number_of_devices() = count; });
  m.def("get_device", [] { return current_device(); });
  m.def("set_device", [](int index) { set_current_device(index); });

  m.def("memory", &memory_figures);
  m.def("reset_peaks", [](int index) {
    Lock lock(mutex());
    device(index).allocated.peak = device(index).allocated.now;
    device(index).reserved.peak = device(index).reserved.now;
  });
  m.def("set_limit", [](int index, int64_t bytes) { device(index).limit = bytes < 0 ? SIZE_MAX : static_cast<size_t>(bytes); });
  m.def("set_total", [](int index, int64_t bytes) { device(index).total = static_cast<size_t>(bytes); });
  m.def("empty_cache", [] {
    Lock lock(mutex());
    for (int i = 0; i < number_of_devices(); ++i) trim(device(i));
  });
  m.def("resize_storage", [](at::Storage storage, int64_t bytes) { set_storage_size(storage.unsafeGetStorageImpl(), static_cast<size_t>(bytes)); });
  m.def("live_blocks", [] {
    Lock lock(mutex());
    std::vector<std::pair<int64_t, int64_t>> result;
    for (auto& [start, block] : blocks()) result.emplace_back(block.id, block.size);
    return result;
  });

  m.def("wait", [](std::string kind, std::string what) { wait_for_all(kind.c_str(), what); }, Unlocked());
  m.def("current_stream", [](int index) { return thread_stream(index); });
  m.def("set_stream", [](int index, int64_t stream) { thread_stream(index) = stream; });
  m.def("new_stream", &new_stream);
  m.def("synchronize_stream", [](int index, int64_t stream) { synchronize_stream(key_of(index, stream)); }, Unlocked());
  m.def("wait_stream", [](int index, int64_t waiting, int64_t other) {
    Lock lock(mutex());
    merge(clocks()[key_of(index, waiting)], clocks()[key_of(index, other)]);
  });
  m.def("use", [](const Tensor& tensor, bool writes, std::string name) {
    if (tensor.is_cuda()) use(*tensor.storage().unsafeGetStorageImpl(), writes, name, nullptr);
  });
  py::class_<Event>(m, "Event")
      .def(py::init<>())
      .def("record", [](Event& event, int index, int64_t stream) { event.record(key_of(index, stream)); })
      .def("block", [](Event& event, int index, int64_t stream) { event.block(key_of(index, stream)); })
      .def("query", &Event::query, Unlocked())
      .def("synchronize", &Event::synchronize, Unlocked());

  m.def("is_capturing", &is_capturing);
  m.def("new_pool", [] { return PoolId{0, next_pool_number()}; });
  m.def("record_python", &record_python);
  py::class_<Graph>(m, "Graph")
      .def(py::init<>())
      .def("begin", &Graph::begin)
      .def("end", &Graph::end)
      .def("replay", &Graph::replay, Unlocked())
      .def("reset", &Graph::reset)
      .def("pool", [](const Graph& graph) { return graph.pool_id; })
      .def("length", [](const Graph& graph) { return graph.steps.size(); });

  m.def("operation_counts", [] { return operation_counts(); });
  m.def("default_generator", &default_generator);
  py::class_<Collectives, c10d::Backend, c10::intrusive_ptr<Collectives>>(m, "Collectives")
      .def(py::init([](c10::intrusive_ptr<c10d::Backend> inner) { return c10::make_intrusive<Collectives>(std::move(inner)); }));
}
