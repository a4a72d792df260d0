// Order of work: streams, events, what the host has waited for, and copies that are under way.
//
// Work is done at once, so its results never depend on order. What a GPU would punish is checked instead: a host buffer holds
// garbage until the copy into it has been waited for; a pinned source must not change before its copy is done; memory that one
// stream writes and another reads, or the other way round, needs a wait between the two.
#pragma once

#include <ATen/core/Tensor.h>
#include <Python.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/Stream.h>
#include <pybind11/pybind11.h>

#include "memory.h"

namespace simulated {

// Reports to Python --------------------------------------------------------------------------------------------

inline PyObject*& callback() {
  static PyObject* value = nullptr;
  return value;
}

// Calls Python with a kind and a description; what Python raises is raised here.
inline void report(const char* kind, const std::string& what) {
  if (!callback() || !Py_IsInitialized()) return;
  pybind11::gil_scoped_acquire gil;
  PyObject* result = PyObject_CallFunction(callback(), "ss", kind, what.c_str());
  if (!result) throw pybind11::error_already_set();
  Py_DECREF(result);
}

// Streams ------------------------------------------------------------------------------------------------------

inline int& number_of_devices() {
  static int value = 1;
  return value;
}
inline int& thread_device() {
  thread_local int value = 0;
  return value;
}
inline int current_device() { return thread_device(); }
inline void set_current_device(int index) {
  TORCH_CHECK(index >= 0 && index < number_of_devices(), "CUDA error: invalid device ordinal");
  thread_device() = index;
}

inline int64_t& thread_stream(int index) {  // the id of a device's current stream; 0: its default stream
  thread_local int64_t value[kMostDevices] = {};
  return value[index];
}
inline int64_t key_of(int index, int64_t stream) { return (static_cast<int64_t>(index) << 32) | stream; }
inline int64_t current_stream_key(int index) { return key_of(index, thread_stream(index)); }

using Clock = std::map<int64_t, int64_t>;  // stream -> number of its latest work that is known to be done before

inline std::map<int64_t, Clock>& clocks() {
  static auto* value = new std::map<int64_t, Clock>;
  return *value;
}
inline Clock& host_clock() {  // what the host has waited for, and so everything that it launches from now on
  static auto* value = new Clock;
  return *value;
}
inline bool& several_streams() {
  static bool value = false;
  return value;
}
inline void merge(Clock& into, const Clock& from) {
  for (auto& [stream, number] : from) into[stream] = std::max(into[stream], number);
}
inline int64_t tick(int64_t stream) {
  static int64_t number = 0;
  return clocks()[stream][stream] = ++number;
}
inline int64_t new_stream() {
  static int64_t next = 1;
  Lock lock(mutex());
  several_streams() = true;
  return next++;
}

// One operation's accesses on the current stream: raises where another stream's are not waited for.
inline void access(char* start, Block& block, bool writes, const std::string& name) {
  if (!several_streams()) return;
  const int64_t stream = current_stream_key(block.device_index);
  Clock& clock = clocks()[stream];
  merge(clock, host_clock());
  auto known = [&](const Access& other) {
    if (other.stream < 0 || other.stream == stream) return true;
    auto it = clock.find(other.stream);
    return it != clock.end() && it->second >= other.number;
  };
  bool ordered = known(block.written);
  if (writes)
    for (auto& other : block.read) ordered = ordered && known(other);
  TORCH_CHECK(
      ordered, "simulated device: ", name, writes ? " writes" : " reads", " memory on one stream that another stream uses, without ",
      "waiting for it");
  const Access mine{stream, tick(stream)};
  if (writes) {
    block.written = mine;
    block.read.clear();
  } else {
    for (auto& other : block.read)
      if (other.stream == stream) {
        other.number = mine.number;
        return;
      }
    block.read.push_back(mine);
  }
}

// Copies under way ---------------------------------------------------------------------------------------------

struct ToHost {
  c10::Storage held;  // the target's
  at::Tensor target, arriving;
  int64_t stream, number;
};
struct FromPinned {
  c10::Storage source;
  std::vector<char> bytes;
  int64_t stream, number;
};
inline std::vector<ToHost>& to_host() {
  static auto* value = new std::vector<ToHost>;
  return *value;
}
inline std::vector<FromPinned>& from_pinned() {
  static auto* value = new std::vector<FromPinned>;
  return *value;
}

template <typename T>
std::vector<T> split_off(std::vector<T>& all, const Clock& until) {
  std::vector<T> done, rest;
  for (auto& one : all) {
    auto it = until.find(one.stream);
    (it != until.end() && one.number <= it->second ? done : rest).push_back(std::move(one));
  }
  all = std::move(rest);
  return done;
}

// The host has waited for the work that a clock names.
inline void arrive(const Clock& until) {
  std::vector<ToHost> arrived;
  std::vector<FromPinned> sent;
  {
    Lock lock(mutex());
    merge(host_clock(), until);
    arrived = split_off(to_host(), until);
    sent = split_off(from_pinned(), until);
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  for (auto& one : arrived) one.target.copy_(one.arriving);
  for (auto& one : sent)
    if (memcmp(one.source.data(), one.bytes.data(), one.bytes.size()) != 0)
      report("error", "a pinned source was changed before its copy to the device was done");
}

inline bool pending_for(const Clock& until) {
  Lock lock(mutex());
  for (auto& one : to_host()) {
    auto it = until.find(one.stream);
    if (it != until.end() && one.number <= it->second) return true;
  }
  return false;
}

inline Clock everything() {
  Lock lock(mutex());
  Clock all;
  for (auto& [stream, clock] : clocks()) merge(all, clock);
  return all;
}

bool is_capturing();  // graphs.h

inline void refuse_in_capture(const std::string& what) {
  TORCH_CHECK(!is_capturing(), "CUDA error: operation not permitted when stream is capturing (simulated): ", what);
}

// The host waits for all work of the devices.
inline void wait_for_all(const char* kind, const std::string& what) {
  refuse_in_capture(what);
  report(kind, what);
  arrive(everything());
}

// Events -------------------------------------------------------------------------------------------------------

struct Event {
  Clock clock;
  bool recorded = false;
  int polls = 0;

  void record(int64_t stream) {
    refuse_in_capture("event recorded");
    Lock lock(mutex());
    tick(stream);
    clock = clocks()[stream];
    recorded = true;
    polls = 0;
  }
  void block(int64_t stream) {
    Lock lock(mutex());
    if (recorded) merge(clocks()[stream], clock);
  }
  // Two polls of three come too early, as they would on a device at work.
  bool query() {
    if (!recorded) return true;
    if (++polls < 3) return false;
    arrive(clock);
    return true;
  }
  void synchronize() {
    refuse_in_capture("event.synchronize");
    report("event", "event.synchronize");
    if (recorded) arrive(clock);
  }
};

inline void synchronize_stream(int64_t stream) {
  refuse_in_capture("stream.synchronize");
  report("synchronize", "stream");
  Clock until;
  {
    Lock lock(mutex());
    until = clocks()[stream];
  }
  arrive(until);
}

// The guard by which ATen and autograd know devices, streams and events.
struct Guard final : c10::impl::DeviceGuardImplInterface {
  using Index = c10::DeviceIndex;
  static c10::Stream stream_of(int index, int64_t id) {
    return c10::Stream(c10::Stream::UNSAFE, c10::Device(c10::kCUDA, static_cast<Index>(index)), id);
  }
  static int index_of(c10::Device on) { return on.has_index() ? on.index() : current_device(); }
  c10::DeviceType type() const override { return c10::kCUDA; }
  c10::Device exchangeDevice(c10::Device to) const override {
    const c10::Device before = getDevice();
    setDevice(to);
    return before;
  }
  c10::Device getDevice() const override { return {c10::kCUDA, static_cast<Index>(current_device())}; }
  void setDevice(c10::Device to) const override {
    if (to.has_index()) set_current_device(to.index());
  }
  void uncheckedSetDevice(c10::Device to) const noexcept override {
    if (to.has_index()) thread_device() = to.index();
  }
  c10::Stream getStream(c10::Device on) const override { return stream_of(index_of(on), thread_stream(index_of(on))); }
  c10::Stream getDefaultStream(c10::Device on) const override { return stream_of(index_of(on), 0); }
  c10::Stream getNewStream(c10::Device on, int) const override { return stream_of(index_of(on), new_stream()); }
  c10::Stream getStreamFromGlobalPool(c10::Device on, bool) const override { return stream_of(index_of(on), new_stream()); }
  c10::Stream exchangeStream(c10::Stream to) const override {
    const c10::Stream before = getStream(to.device());
    thread_stream(to.device_index()) = to.id();
    return before;
  }
  void record(void** event, const c10::Stream& stream, const Index, const c10::EventFlag) const override {
    if (!*event) *event = new Event;
    static_cast<Event*>(*event)->record(key_of(stream.device_index(), stream.id()));
  }
  void block(void* event, const c10::Stream& stream) const override {
    if (event) static_cast<Event*>(event)->block(key_of(stream.device_index(), stream.id()));
  }
  bool queryEvent(void* event) const override { return !event || static_cast<Event*>(event)->query(); }
  void destroyEvent(void* event, const Index) const noexcept override { delete static_cast<Event*>(event); }
  Index deviceCount() const noexcept override { return static_cast<Index>(number_of_devices()); }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream& stream) const override {
    synchronize_stream(key_of(stream.device_index(), stream.id()));
  }
  void synchronizeEvent(void* event) const override {
    if (event) static_cast<Event*>(event)->synchronize();
  }
  void synchronizeDevice(const Index) const override { wait_for_all("synchronize", "device"); }
  bool isStreamCapturing(const c10::Stream&) const override { return is_capturing(); }
};

}  // namespace simulated
