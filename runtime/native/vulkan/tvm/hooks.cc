/*!
 * \file hooks.cc
 * \brief Every function that this library registers; README.md lists them for their users.
 */
#include <tvm/ffi/extra/json.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/reflection/registry.h>

#include <algorithm>
#include <chrono>

#include "../batch_limit.h"
#include "../describe.h"
#include "../device.h"
#include "border.h"
#include "device_api.h"
#include "module.h"

#ifndef MXFORGE_BUILD_ID
#define MXFORGE_BUILD_ID ""  // of what another hand has built
#endif

namespace mxforge {
namespace vulkan {
namespace {

namespace ffi = tvm::ffi;
namespace json = tvm::ffi::json;
using ffi::String;

int64_t Signed(uint64_t number) {
  return number > INT64_MAX ? INT64_MAX : static_cast<int64_t>(number);
}

template <typename Texts>
json::Array TextArray(const Texts& texts) {
  json::Array array;
  for (const std::string& text : texts) array.push_back(String(text));
  return array;
}

json::Array TextArray(const std::vector<MatrixProduct>& products) {
  json::Array array;
  for (const MatrixProduct& each : products) array.push_back(String(each.Text()));
  return array;
}

String Devices() { return DescribeDevices(); }

String StatisticsOf(int id) {
  Device* device = Device::Get(id);
  const std::lock_guard<std::mutex> lock(device->mutex());
  const Statistics& counted = device->core().statistics;
  const std::pair<const char*, uint64_t> numbers[] = {
      {"dispatches", counted.dispatches},
      {"copies", counted.copies},
      {"staged_bytes", counted.staged_bytes},
      {"direct_bytes", counted.direct_bytes},
      {"barriers", counted.barriers},
      {"submits", counted.submits},
      {"waits", counted.waits},
      {"semaphore_waits", counted.semaphore_waits},
      {"argument_buffers", counted.argument_buffers},
      {"allocations", counted.allocations},
      {"allocated_bytes", counted.allocated_bytes},
      {"reserved_bytes", counted.reserved_bytes},
      {"blocks", device->memory().blocks()},
      {"deferred_frees", counted.deferred_frees},
      {"reclaims", counted.reclaims},
      {"live_allocations", device->memory().live()},
      {"device_allocations", device->memory().allocations},
      {"pending_frees", device->memory().buried()},
      {"batches_in_flight", device->default_stream()->InFlight()},
      {"batch_limit", device->default_stream()->batch_limit()},
      {"streams", device->stream_count()},
      {"pipeline_cache_loaded_bytes", device->cache().loaded_bytes()},
      {"pipeline_cache_saves", device->cache().saves()},
  };
  json::Object statistics;
  for (const auto& [name, number] : numbers) statistics.Set(String(name), Signed(number));
  statistics.Set(String("pipeline_cache"), String(device->cache().path().string()));
  statistics.Set(String("pipeline_cache_status"), String(device->cache().status()));
  return json::Stringify(statistics);
}

void Configure(int id, const String& name, int64_t value) {
  Device* device = Device::Get(id);
  const std::lock_guard<std::mutex> lock(device->mutex());
  Settings& settings = device->core().settings;
  const std::string setting = name;
  const auto count = static_cast<uint32_t>(std::max<int64_t>(value, 1));
  if (setting == "direct_copies") {
    settings.direct_copies = value != 0;
  } else if (setting == "batch_commands") {
    settings.batch_commands = count;
  } else if (setting == "first_batch_commands") {
    settings.first_batch_commands = count;
  } else if (setting == "batch_milliseconds") {
    settings.batch_milliseconds = static_cast<uint32_t>(std::clamp<int64_t>(value, 0, UINT32_MAX));
  } else if (setting == "batches_in_flight") {
    settings.batches_in_flight = count;
  } else if (setting == "block_bytes") {
    settings.block_bytes = static_cast<uint64_t>(std::max<int64_t>(value, 0));
  } else if (setting == "staging_chunk_bytes") {
    settings.staging_chunk_bytes = (static_cast<uint64_t>(count) + 15) / 16 * 16;
  } else if (setting == "staging_chunks") {
    settings.staging_chunks = count;
  } else if (setting == "pipeline_threads") {
    settings.pipeline_threads = static_cast<uint32_t>(std::max<int64_t>(value, 0));
  } else {
    TVM_FFI_THROW(ValueError) << "There is no setting " << setting
                              << "; README.md lists those that there are.";
  }
}

void Simulate(int id, const String& event, int64_t count) {
  Device* device = Device::Get(id);
  const std::lock_guard<std::mutex> lock(device->mutex());
  if (event == "device_lost") {
    device->default_stream()->submit_to_simulate = count != 0 ? VK_ERROR_DEVICE_LOST : VK_SUCCESS;
  } else if (event == "device_lost_at_wait") {
    device->default_stream()->wait_to_simulate = count != 0 ? VK_ERROR_DEVICE_LOST : VK_SUCCESS;
  } else if (event == "out_of_memory_at_submit") {
    device->default_stream()->submit_to_simulate =
        count != 0 ? VK_ERROR_OUT_OF_DEVICE_MEMORY : VK_SUCCESS;
  } else if (event == "out_of_memory") {
    device->memory().failures_to_simulate = static_cast<uint32_t>(count);
  } else if (event == "allocation_limit") {
    const uint32_t limit = device->core().physical.limits.maxMemoryAllocationCount;
    device->memory().allocation_limit = count == 0 ? limit : static_cast<uint64_t>(count);
  } else {
    TVM_FFI_THROW(ValueError) << "There is no event " << event
                              << " to simulate; README.md lists those that there are.";
  }
}

/*! \brief Call with every module of kind "vulkan" among this one and those that it imports. */
template <typename Visit>
void VisitModules(const ffi::Module& module, const Visit& visit) {
  if (std::string(module->kind()) == "vulkan") {
    visit(static_cast<ModuleNode*>(const_cast<ffi::ModuleObj*>(module.operator->())));
  }
  for (const ffi::Any& each : module->imports()) VisitModules(each.cast<ffi::Module>(), visit);
}

/*! \brief Throw where the device cannot run kernels of the module, or of one that it imports. */
void Check(const ffi::Module& module, int id) {
  VisitModules(module, [id](ModuleNode* each) { each->Check(id); });
}

/*! \brief The kernels of which the host launches those that the device can run, and which it can. */
String Variants(const ffi::Module& module, int id) {
  const Core& core = Device::Get(id)->core();
  json::Array variants;
  VisitModules(module, [&](ModuleNode* each) {
    for (const KernelInfo& kernel : each->kernels()) {
      if (!kernel.IsVariant()) continue;
      json::Object variant;
      variant.Set(String("kernel"), String(kernel.name));
      variant.Set(String("matrices"), TextArray(kernel.products));
      variant.Set(String("subgroup_size"), static_cast<int64_t>(kernel.subgroup_size));
      variant.Set(String("why_not"), String(WhyNot(core, kernel)));
      variants.push_back(variant);
    }
  });
  return json::Stringify(variants);
}

void Profile(int id, bool on) {
  Device* device = Device::Get(id);
  const std::lock_guard<std::mutex> lock(device->mutex());
  device->default_stream()->Submit();  // a batch has timestamps from its beginning or not at all
  device->core().profiling = on;
  if (on) device->core().times.clear();
}

String ProfileRead(int id) {
  Device* device = Device::Get(id);
  device->Synchronize({nullptr, CurrentStream(device)});
  const std::lock_guard<std::mutex> lock(device->mutex());
  json::Object times;
  for (const auto& [name, time] : device->core().times) {
    json::Object each;
    each.Set(String("count"), Signed(time.count));
    each.Set(String("ns"), time.nanoseconds);
    times.Set(String(name), each);
  }
  return json::Stringify(times);
}

String ValidationMessages() {
  json::Object result;
  result.Set(String("watching"), Instance::Get().HasMessenger());
  result.Set(String("messages"), TextArray(Instance::Get().ValidationMessages()));
  return json::Stringify(result);
}

/*! \brief Feed a list of commands to a tracker alone, without a device; returns its log.
 *
 * Each is ["compute" | "transfer" | "recording", [[resource, "r" | "w", begin, end], ...]], or
 * ["host", [[...]]] (for each the barrier, a wait for everything, the access), or ["wait"].
 */
String SimulateHazards(const String& commands) {
  HazardTracker tracker;
  HazardLog log;
  tracker.LogTo(&log);
  for (const ffi::Any& each : json::Parse(commands).cast<json::Array>()) {
    const auto command = each.cast<json::Array>();
    const std::string kind = command[0].cast<String>();
    if (kind == "wait") {
      tracker.Waited(tracker.Position());
      continue;
    }
    std::vector<Access> accesses;
    for (const ffi::Any& value : command[1].cast<json::Array>()) {
      const auto access = value.cast<json::Array>();
      accesses.push_back({static_cast<uint32_t>(access[0].cast<int64_t>()),
                          access[1].cast<String>() == "w",
                          static_cast<uint64_t>(access[2].cast<int64_t>()),
                          static_cast<uint64_t>(access[3].cast<int64_t>())});
    }
    if (kind == "host") {
      for (const Access& access : accesses) {
        tracker.BeforeHost(access);
        tracker.Waited(tracker.Position());
        tracker.Host(access, kind);
      }
    } else {
      const Stage stage = kind == "transfer" ? Stage::kTransfer : Stage::kCompute;
      if (kind == "recording") tracker.Everything(stage);
      tracker.Command(stage, accesses.data(), accesses.size(), kind);
    }
  }
  return String(log.Json());
}

/*! \brief The types of memory for buffers of a kind, best first, on a device that is described by
 *  [[property flags of a type, ...], unified, "device" | "upload" | "readback"]. */
String PlanMemory(const String& described) {
  const auto values = json::Parse(described).cast<json::Array>();
  VkPhysicalDeviceMemoryProperties memory{};
  for (const ffi::Any& flags : values[0].cast<json::Array>()) {
    if (memory.memoryTypeCount == VK_MAX_MEMORY_TYPES) break;
    memory.memoryTypes[memory.memoryTypeCount++].propertyFlags =
        static_cast<VkMemoryPropertyFlags>(flags.cast<int64_t>());
  }
  const std::string kind = values[2].cast<String>();
  json::Array types;
  for (uint32_t type :
       MemoryTypes(memory, values[1].cast<bool>(),
                   kind == "device"   ? MemoryKind::kDevice
                   : kind == "upload" ? MemoryKind::kUpload
                                      : MemoryKind::kReadback)) {
    types.push_back(static_cast<int64_t>(type));
  }
  return json::Stringify(types);
}

/*! \brief [limit, target in ms, most, [[commands, ms], ...]] -> the limit after each batch. */
String SimulateBatchLimit(const String& described) {
  const auto values = json::Parse(described).cast<json::Array>();
  auto limit = static_cast<uint32_t>(values[0].cast<int64_t>());
  json::Array limits;
  for (const ffi::Any& each : values[3].cast<json::Array>()) {
    const auto batch = each.cast<json::Array>();
    limit = NextBatchLimit(limit, static_cast<uint32_t>(batch[0].cast<int64_t>()),
                           batch[1].cast<double>(), values[1].cast<double>(),
                           static_cast<uint32_t>(values[2].cast<int64_t>()));
    limits.push_back(static_cast<int64_t>(limit));
  }
  return json::Stringify(limits);
}

/*! \brief (function, n, arguments...) -> nanoseconds a call, without Python's share of it. */
void TimeCalls(ffi::PackedArgs arguments, ffi::Any* result) {
  const auto function = arguments[0].cast<ffi::Function>();
  const auto count = arguments[1].cast<int64_t>();
  ffi::Any ignored;
  const auto begin = std::chrono::steady_clock::now();
  for (int64_t i = 0; i < count; ++i) {
    function.CallPacked(arguments.Slice(2), &ignored);
  }
  const std::chrono::duration<double, std::nano> elapsed = std::chrono::steady_clock::now() - begin;
  *result = elapsed.count() / static_cast<double>(std::max<int64_t>(count, 1));
}

TVM_FFI_STATIC_INIT_BLOCK() {
  // Registering a name twice ends the process, and some other library may have brought Vulkan.
  if (ffi::Function::GetGlobal("device_api.vulkan").has_value()) return;
  // Called by tvm_ffi's own code, with bytes from anywhere.
  ffi::Function::SetGlobal("ffi.Module.load_from_bytes.vulkan",
                           AcrossBorder(ffi::Function::FromTyped(Hook(&LoadModule))));
  namespace refl = tvm::ffi::reflection;
  refl::GlobalDef()
      .def_packed("device_api.vulkan",
                  [](ffi::PackedArgs, ffi::Any* result) { *result = TheDeviceAPI(); })
      .def("mxforge.vulkan.module", Hook(&LoadModule))
      .def("mxforge.vulkan.check", Hook(&Check))
      .def("mxforge.vulkan.variants", Hook(&Variants))
      .def("mxforge.vulkan.multiplies",
           Hook([](const String& product, int64_t size) {
             const PhysicalDevice& device = Instance::Get().Chosen(CurrentId());
             return device.Multiplies(product, static_cast<uint32_t>(size)) ? 1 : 0;
           }))
      .def("mxforge.vulkan.devices", Hook(&Devices))
      .def("mxforge.vulkan.statistics", Hook(&StatisticsOf))
      .def("mxforge.vulkan.configure", Hook(&Configure))
      .def("mxforge.vulkan.simulate", Hook(&Simulate))
      .def("mxforge.vulkan.profile", Hook(&Profile))
      .def("mxforge.vulkan.profile_read", Hook(&ProfileRead))
      .def("mxforge.vulkan.hazard_log", Hook([](int id, bool on) { Device::Get(id)->LogHazards(on); }))
      .def("mxforge.vulkan.hazard_log_read",
           Hook([](int id) { return String(Device::Get(id)->HazardLogJson()); }))
      .def("mxforge.vulkan.hazard_simulate", Hook(&SimulateHazards))
      .def("mxforge.vulkan.batch_limit_simulate", Hook(&SimulateBatchLimit))
      .def("mxforge.vulkan.memory_plan", Hook(&PlanMemory))
      .def_packed("mxforge.vulkan.time_calls", &TimeCalls)
      .def("mxforge.vulkan.build_id", [] { return String(MXFORGE_BUILD_ID); })
      .def("mxforge.vulkan.validation_messages", Hook(&ValidationMessages));
}

}  // namespace
}  // namespace vulkan
}  // namespace mxforge
