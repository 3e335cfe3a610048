// A libcuda.so.1 whose GPU is the harness: what the core's CUDA backend calls, and no more.
//
// Nothing happens before the host waits for it: a stream keeps what it is asked, so that a wait
// that is missing shows. A module is a fatbin's header and text (driver.py writes it): where the
// harness's runtime is, and each kernel with the dtypes of what it takes. Kernels are compiled when
// they are first launched, by whom `fake_cuda_compiler` names. What a real driver forgives is
// refused here: a copy from or to memory of the host that is not pinned, a wait during a capture.
#include <dlfcn.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

#define EVERY extern "C" __attribute__((visibility("default")))

namespace {

enum Error {
  SUCCESS = 0,
  INVALID_VALUE = 1,
  OUT_OF_MEMORY = 2,
  INVALID_DEVICE = 101,
  INVALID_IMAGE = 200,
  INVALID_CONTEXT = 201,
  NO_BINARY = 209,
  NOT_FOUND = 500,
  ILLEGAL_ADDRESS = 700,
  CAPTURE_UNSUPPORTED = 900,
};
const std::map<int, std::pair<const char*, const char*>> ERRORS = {
    {INVALID_VALUE, {"CUDA_ERROR_INVALID_VALUE", "invalid argument"}},
    {OUT_OF_MEMORY, {"CUDA_ERROR_OUT_OF_MEMORY", "out of memory"}},
    {INVALID_DEVICE, {"CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"}},
    {INVALID_IMAGE, {"CUDA_ERROR_INVALID_IMAGE", "device kernel image is invalid"}},
    {INVALID_CONTEXT, {"CUDA_ERROR_INVALID_CONTEXT", "invalid device context"}},
    {NO_BINARY,
     {"CUDA_ERROR_NO_BINARY_FOR_GPU", "no kernel image is available for execution on the device"}},
    {NOT_FOUND, {"CUDA_ERROR_NOT_FOUND", "named symbol not found"}},
    {ILLEGAL_ADDRESS,
     {"CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"}},
    {CAPTURE_UNSUPPORTED,
     {"CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED",
      "operation not permitted when stream is capturing"}},
};

// What a test sets, and what it counts: calls by their names, and "waits" of those that had work.
std::map<std::string, int64_t> settings = {
    {"major", 9}, {"minor", 0}, {"shared", 227 << 10}, {"pools", 1}, {"memory", 1 << 30},
    {"lost_after", -1},  // operations of streams
};
std::map<std::string, int64_t> counts;
int lost = SUCCESS;  // the error that sticks

using Operation = std::function<void()>;

struct Stream {
  std::deque<Operation> queue;
  uint64_t asked = 0, done = 0;
  std::vector<Operation>* captured = nullptr;  // while it is capturing
};
struct Event {
  Stream* stream;
  uint64_t position;
};
using Graph = std::vector<Operation>;
std::vector<Stream*> streams;

struct Any {  // as translate.py has it
  int32_t type, padding;
  union {
    int64_t integer;
    void* pointer;
  };
};
using Entry = int (*)(void*, const Any*, int, Any*);

struct Kernel {
  std::string name;
  std::vector<std::string> parameters;  // dtypes
  Entry entry;
  int shared;  // most dynamic
};
struct Module {
  std::map<std::string, Kernel> kernels;
};

// ---- the harness

void* (*simt_allocate)(uint64_t);
void (*simt_release)(void*);
const char* (*simt_end)();
const char* (*compiler)(const char* name);  // of the kernel: the path of its shared library

bool load_harness(const char* path) {
  if (simt_end) return true;
  void* harness = dlopen(path, RTLD_NOW | RTLD_GLOBAL);
  if (!harness) return fprintf(stderr, "%s\n", dlerror()), false;
  auto begin = (void (*)(int, uint64_t, int, int))dlsym(harness, "simt_begin");
  simt_allocate = (void* (*)(uint64_t))dlsym(harness, "simt_allocate");
  simt_release = (void (*)(void*))dlsym(harness, "simt_release");
  simt_end = (const char* (*)())dlsym(harness, "simt_end");
  begin(2, 7, 0, -1);  // random order of threads
  return true;
}

bool compile(Kernel* kernel) {
  if (kernel->entry) return true;
  const char* path = compiler ? compiler(kernel->name.c_str()) : nullptr;
  void* library = path ? dlopen(path, RTLD_NOW) : nullptr;
  if (!library) return false;
  kernel->entry = (Entry)dlsym(library, ("__tvm_ffi_" + kernel->name).c_str());
  return kernel->entry;
}

void fail(const std::string& text) {
  fprintf(stderr, "fake CUDA: %s\n", text.c_str());
  lost = ILLEGAL_ADDRESS;
}

// ---- memory

std::map<uintptr_t, size_t> device, host;  // by where it begins

bool holds(const std::map<uintptr_t, size_t>& memory, const void* at, size_t bytes) {
  auto next = memory.upper_bound((uintptr_t)at);
  if (next == memory.begin()) return false;
  auto [begin, size] = *--next;
  return (uintptr_t)at - begin <= size && bytes <= size - ((uintptr_t)at - begin);
}

int64_t in_use() {
  int64_t bytes = 0;
  for (auto [begin, size] : device) bytes += size;
  return bytes;
}

void release(uint64_t address) {
  if (!device.erase(address)) return fail("memory is freed that is none");
  simt_release((void*)address);
}

// ---- calls

thread_local std::vector<void*> contexts;

// What every call begins with: the error that it has to return, or SUCCESS.
int begin(const char* name, bool needs_context = true) {
  ++counts[name];
  if (lost) return lost;
  auto failing = settings.find(std::string("fail ") + name);
  if (failing != settings.end() && failing->second) return (int)failing->second;
  return needs_context && contexts.empty() ? INVALID_CONTEXT : SUCCESS;
}

#define BEGIN(...) \
  if (int error = begin(__VA_ARGS__)) return error

int ask(Stream* stream, Operation operation) {
  if (stream->captured) return CAPTURE_UNSUPPORTED;
  stream->queue.push_back(std::move(operation));
  ++stream->asked;
  return SUCCESS;
}

int run_until(Stream* stream, uint64_t position) {
  if (stream->done < position) ++counts["waits"];
  while (!lost && stream->done < position) {
    if (settings["lost_after"] >= 0 && settings["lost_after"]-- == 0) {
      lost = ILLEGAL_ADDRESS;
      break;
    }
    stream->queue.front()();
    stream->queue.pop_front();
    ++stream->done;
  }
  return lost;
}

struct Attribute {
  int id;
  char padding[4];
  int value;
  char rest[60];
};
struct Config {
  unsigned grid[3], block[3], shared;
  Stream* stream;
  Attribute* attributes;
  unsigned count;
};

std::vector<Any> arguments_of(const Kernel& kernel, const Config& config, void** given) {
  std::vector<Any> all;
  for (size_t i = 0; i < kernel.parameters.size(); i++) {
    const std::string& dtype = kernel.parameters[i];
    Any any{};
    if (dtype == "int32")
      any.integer = *(int32_t*)given[i];
    else
      memcpy(&any.integer, given[i], 8);
    all.push_back(any);
  }
  for (int64_t extent : {config.grid[0], config.grid[1], config.grid[2], config.block[0],
                         config.block[1], config.block[2], config.shared}) {
    Any any{};
    any.integer = extent;
    all.push_back(any);
  }
  return all;
}

std::vector<std::string> words_of(const std::string& text) {
  std::vector<std::string> words;
  std::istringstream stream(text);
  for (std::string word; std::getline(stream, word, ',');) words.push_back(word);
  return words;
}

}  // namespace

// ---- what tests call

EVERY void fake_cuda_set(const char* name, int64_t value) { settings[name] = value; }
EVERY int64_t fake_cuda_count(const char* name) { return counts[name]; }
EVERY void fake_cuda_compiler(const char* (*given)(const char*)) { compiler = given; }
// Make NaN of what has so many bytes.
EVERY void fake_cuda_spoil(size_t bytes) {
  for (auto [begin, size] : device)
    if (size == bytes) memset((void*)begin, 0xFF, size);
}
EVERY int64_t fake_cuda_live() { return device.size() + host.size() + counts["live"]; }

// ---- the driver

EVERY int cuInit(unsigned) { return SUCCESS; }
EVERY int cuGetErrorName(int error, const char** name) {
  auto known = ERRORS.find(error);
  *name = known == ERRORS.end() ? nullptr : known->second.first;
  return *name ? SUCCESS : INVALID_VALUE;
}
EVERY int cuGetErrorString(int error, const char** text) {
  auto known = ERRORS.find(error);
  *text = known == ERRORS.end() ? nullptr : known->second.second;
  return *text ? SUCCESS : INVALID_VALUE;
}
EVERY int cuDeviceGetCount(int* count) { return *count = 1, SUCCESS; }
EVERY int cuDeviceGet(int* device, int index) {
  *device = index;
  return index == 0 ? SUCCESS : INVALID_DEVICE;
}
EVERY int cuDeviceTotalMem_v2(size_t* bytes, int) {
  *bytes = size_t{8} << 30;
  return 0;
}

EVERY int cuDeviceGetName(char* name, int size, int) {
  return strncpy(name, "Fake GPU", size), SUCCESS;
}
EVERY int cuDeviceGetAttribute(int* value, int attribute, int) {
  const std::map<int, const char*> known = {
      {75, "major"}, {76, "minor"}, {97, "shared"}, {115, "pools"}};
  *value = (int)settings[known.at(attribute)];
  return SUCCESS;
}
EVERY int cuDevicePrimaryCtxRetain(void** context, int) {
  BEGIN("cuDevicePrimaryCtxRetain", false);
  ++counts["live"];
  *context = &counts;
  return SUCCESS;
}
EVERY int cuDevicePrimaryCtxRelease_v2(int) { return --counts["live"], SUCCESS; }
EVERY int cuCtxPushCurrent_v2(void* context) { return contexts.push_back(context), SUCCESS; }
EVERY int cuCtxPopCurrent_v2(void** context) {
  if (contexts.empty()) return INVALID_CONTEXT;
  *context = contexts.back();
  contexts.pop_back();
  return SUCCESS;
}

EVERY int cuMemGetInfo_v2(size_t* left, size_t* all) {
  BEGIN("cuMemGetInfo");
  *all = settings["memory"];
  *left = *all - in_use();
  return SUCCESS;
}
EVERY int cuMemAlloc_v2(uint64_t* address, size_t bytes) {
  BEGIN("cuMemAlloc");
  if (bytes == 0) return INVALID_VALUE;
  if (in_use() + (int64_t)bytes > settings["memory"]) return OUT_OF_MEMORY;
  void* begin = simt_allocate(bytes);
  if (!begin) return OUT_OF_MEMORY;
  device[*address = (uint64_t)begin] = bytes;
  return SUCCESS;
}
EVERY int cuMemFree_v2(uint64_t address) {
  BEGIN("cuMemFree");
  for (Stream* stream : streams) run_until(stream, stream->asked);  // as the real one does
  release(address);
  return lost;
}
EVERY int cuMemFreeAsync(uint64_t address, Stream* stream) {
  BEGIN("cuMemFreeAsync");
  return ask(stream, [=] { release(address); });
}
EVERY int cuMemHostAlloc(void** memory, size_t bytes, unsigned) {
  BEGIN("cuMemHostAlloc");
  *memory = malloc(bytes);
  memset(*memory, 0xFF, bytes);
  host[(uintptr_t)*memory] = bytes;
  return SUCCESS;
}
EVERY int cuMemFreeHost(void* memory) {
  if (!host.erase((uintptr_t)memory)) return INVALID_VALUE;
  free(memory);
  BEGIN("cuMemFreeHost");
  return SUCCESS;
}
EVERY int cuMemcpyHtoDAsync_v2(uint64_t to, const void* from, size_t bytes, Stream* stream) {
  BEGIN("cuMemcpyHtoDAsync");
  if (!holds(device, (void*)to, bytes) || !holds(host, from, bytes)) return INVALID_VALUE;
  return ask(stream, [=] { memcpy((void*)to, from, bytes); });
}
EVERY int cuMemcpyDtoHAsync_v2(void* to, uint64_t from, size_t bytes, Stream* stream) {
  BEGIN("cuMemcpyDtoHAsync");
  if (!holds(device, (void*)from, bytes) || !holds(host, to, bytes)) return INVALID_VALUE;
  return ask(stream, [=] { memcpy(to, (void*)from, bytes); });
}
EVERY int cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t bytes, Stream* stream) {
  BEGIN("cuMemcpyDtoDAsync");
  if (!holds(device, (void*)to, bytes) || !holds(device, (void*)from, bytes)) return INVALID_VALUE;
  return ask(stream, [=] { memcpy((void*)to, (void*)from, bytes); });
}

EVERY int cuStreamCreate(Stream** stream, unsigned) {
  BEGIN("cuStreamCreate");
  ++counts["live"];
  streams.push_back(*stream = new Stream);
  return SUCCESS;
}
EVERY int cuStreamDestroy_v2(Stream* stream) {
  --counts["live"];
  streams.erase(std::find(streams.begin(), streams.end(), stream));
  delete stream;
  BEGIN("cuStreamDestroy");
  return SUCCESS;
}
EVERY int cuStreamSynchronize(Stream* stream) {
  BEGIN("cuStreamSynchronize");
  return stream->captured ? CAPTURE_UNSUPPORTED : run_until(stream, stream->asked);
}
EVERY int cuStreamBeginCapture_v2(Stream* stream, int) {
  BEGIN("cuStreamBeginCapture");
  if (stream->captured) return CAPTURE_UNSUPPORTED;
  stream->captured = new Graph;
  return SUCCESS;
}
EVERY int cuStreamEndCapture(Stream* stream, Graph** graph) {
  *graph = stream->captured;
  ++counts["live"];
  stream->captured = nullptr;
  BEGIN("cuStreamEndCapture");
  return SUCCESS;
}
EVERY int cuGraphInstantiateWithFlags(Graph** run, Graph* graph, unsigned long long) {
  BEGIN("cuGraphInstantiate");
  ++counts["live"];
  *run = new Graph(*graph);
  return SUCCESS;
}
EVERY int cuGraphLaunch(Graph* run, Stream* stream) {
  BEGIN("cuGraphLaunch");
  if (stream->captured) return CAPTURE_UNSUPPORTED;
  for (const Operation& operation : *run) ask(stream, operation);
  return SUCCESS;
}
EVERY int cuGraphDestroy(Graph* graph) {
  --counts["live"];
  delete graph;
  return SUCCESS;
}
EVERY int cuGraphExecDestroy(Graph* run) {
  --counts["live"];
  delete run;
  return SUCCESS;
}

EVERY int cuEventCreate(Event** event, unsigned) {
  BEGIN("cuEventCreate");
  ++counts["live"];
  *event = new Event{nullptr, 0};
  return SUCCESS;
}
EVERY int cuEventRecord(Event* event, Stream* stream) {
  BEGIN("cuEventRecord");
  if (stream->captured) return CAPTURE_UNSUPPORTED;
  *event = {stream, stream->asked};
  return SUCCESS;
}
EVERY int cuEventSynchronize(Event* event) {
  BEGIN("cuEventSynchronize");
  return event->stream ? run_until(event->stream, event->position) : SUCCESS;
}
EVERY int cuEventDestroy_v2(Event* event) {
  --counts["live"];
  delete event;
  return SUCCESS;
}

EVERY int cuModuleLoadData(Module** module, const void* image) {
  BEGIN("cuModuleLoadData");
  uint64_t size;
  memcpy(&size, (const char*)image + 8, 8);
  std::istringstream lines(std::string((const char*)image + 16, size));
  auto made = std::make_unique<Module>();
  std::string harness, name, parameters;
  lines >> harness;
  if (!load_harness(harness.c_str())) return INVALID_IMAGE;
  while (lines >> name >> parameters)
    made->kernels[name] = {name, words_of(parameters), nullptr, 48 << 10};
  ++counts["live"];
  *module = made.release();
  return SUCCESS;
}
EVERY int cuModuleUnload(Module* module) {
  --counts["live"];
  delete module;
  BEGIN("cuModuleUnload");
  return SUCCESS;
}
EVERY int cuModuleGetFunction(Kernel** kernel, Module* module, const char* name) {
  BEGIN("cuModuleGetFunction");
  auto found = module->kernels.find(name);
  if (found == module->kernels.end()) return NOT_FOUND;
  *kernel = &found->second;
  return SUCCESS;
}
EVERY int cuFuncSetAttribute(Kernel* kernel, int attribute, int value) {
  BEGIN("cuFuncSetAttribute");
  if (attribute != 8 || value > settings["shared"]) return INVALID_VALUE;
  kernel->shared = value;
  return SUCCESS;
}
EVERY int cuLaunchKernelEx(const Config* config, Kernel* kernel, void** given, void**) {
  BEGIN("cuLaunchKernelEx");
  uint64_t threads = 1, blocks = 1;
  for (int axis = 0; axis < 3; axis++) {
    threads *= config->block[axis];
    blocks *= config->grid[axis];
  }
  if (!threads || threads > 1024 || !blocks || (int)config->shared > kernel->shared)
    return INVALID_VALUE;
  for (unsigned i = 0; i < config->count; i++)
    if (config->attributes[i].id == 6 && config->attributes[i].value) ++counts["overlapping"];
  Operation operation = [kernel, arguments = arguments_of(*kernel, *config, given)] {
    ++counts["kernels"];
    if (!compile(kernel)) return fail("no code of " + kernel->name);
    Any result;
    kernel->entry(nullptr, arguments.data(), (int)arguments.size(), &result);
    if (*simt_end()) fail(kernel->name + ": " + simt_end());
  };
  if (!config->stream->captured) return ask(config->stream, std::move(operation));
  config->stream->captured->push_back(std::move(operation));
  return SUCCESS;
}
