// A CUDA device guard and CUDA hooks for a torch without CUDA: two devices, and a current stream of each in each thread.
// autograd's engine then starts its device threads and changes streams as it does on a GPU. No kernel runs on them.

#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {

constexpr c10::DeviceIndex kDevices = 2;
thread_local c10::DeviceIndex current = 0;
thread_local c10::StreamId streams[kDevices] = {};

c10::Device device(c10::DeviceIndex index) {
  return c10::Device(c10::DeviceType::CUDA, index < 0 ? current : index);
}

c10::Stream stream(c10::Device of, c10::StreamId id) {
  return c10::Stream(c10::Stream::UNSAFE, device(of.index()), id);
}

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return c10::DeviceType::CUDA; }
  c10::DeviceIndex deviceCount() const noexcept override { return kDevices; }
  c10::Device getDevice() const override { return device(current); }
  void setDevice(c10::Device to) const override { current = device(to.index()).index(); }
  void uncheckedSetDevice(c10::Device to) const noexcept override { setDevice(to); }
  c10::Device exchangeDevice(c10::Device to) const override {
    auto before = getDevice();
    setDevice(to);
    return before;
  }
  c10::Stream getStream(c10::Device of) const noexcept override { return stream(of, streams[device(of.index()).index()]); }
  c10::Stream getDefaultStream(c10::Device of) const override { return stream(of, 0); }
  c10::Stream getNewStream(c10::Device of, int) const override { return stream(of, 1); }
  c10::Stream exchangeStream(c10::Stream to) const noexcept override {
    auto before = getStream(to.device());
    streams[to.device_index()] = to.id();
    return before;
  }
  void record(void** event, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {
    static int any;
    *event = &any;
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
};

struct Hooks final : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return kDevices; }
  c10::DeviceIndex current_device() const override { return current; }
  c10::DeviceIndex getCurrentDevice() const override { return current; }
  bool isPinnedPtr(const void*) const override { return false; }
  c10::Allocator* getPinnedMemoryAllocator() const override { return c10::GetCPUAllocator(); }
};

C10_REGISTER_GUARD_IMPL(CUDA, Guard);

} // namespace

namespace at {
using at::CUDAHooksRegistry;
C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, Hooks)
} // namespace at

extern "C" int64_t pretended_stream(int index) { return streams[index]; }
extern "C" void pretended_set_stream(int index, int64_t id) { streams[index] = id; }
