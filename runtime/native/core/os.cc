#include "os.h"

#include <utility>

#include "error.h"

#ifdef _WIN32
#define WIN32_LEAN_AND_MEAN
#define NOMINMAX
#include <windows.h>

#include <bitset>
#else
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#endif
#ifdef __linux__
#include <sched.h>
#endif

namespace mxforge {
namespace core {
namespace {

#ifdef _WIN32
std::string Reason() {
  const DWORD error = GetLastError();
  wchar_t text[512];
  const DWORD length =
      FormatMessageW(FORMAT_MESSAGE_FROM_SYSTEM | FORMAT_MESSAGE_IGNORE_INSERTS |
                         FORMAT_MESSAGE_MAX_WIDTH_MASK,  // in one line
                     nullptr, error, 0, text, sizeof(text) / sizeof(*text), nullptr);
  char reason[1024];
  const int bytes = WideCharToMultiByte(CP_UTF8, 0, text, static_cast<int>(length), reason,
                                        sizeof(reason), nullptr, nullptr);
  std::string told(reason, static_cast<size_t>(bytes));
  while (!told.empty() && (told.back() == ' ' || told.back() == '.')) told.pop_back();
  return told + " (error " + std::to_string(error) + ")";
}

std::wstring Wide(const std::string& path) {
  const int size = MultiByteToWideChar(CP_UTF8, 0, path.c_str(), -1, nullptr, 0);
  std::wstring wide(static_cast<size_t>(size), L'\0');
  MultiByteToWideChar(CP_UTF8, 0, path.c_str(), -1, wide.data(), size);
  return wide;
}

/*! \brief A whole path, with backslashes: what LoadLibrary asks for. */
std::wstring Full(const std::string& path) {
  const std::wstring wide = Wide(path);
  std::wstring full(GetFullPathNameW(wide.c_str(), 0, nullptr, nullptr), L'\0');
  GetFullPathNameW(wide.c_str(), static_cast<DWORD>(full.size()), full.data(), nullptr);
  return full;
}
#else
std::string Reason() { return std::strerror(errno); }
#endif

[[noreturn]] void Unreadable(const std::string& path, const std::string& reason) {
  throw Error(MXF_CORRUPT, path + " should be a file that can be mapped into memory, but: " +
                               reason + "; see whether it is still there.");
}

[[noreturn]] void NoMemory(size_t size) {
  throw Error(MXF_MEMORY, "There is no memory for " + std::to_string(size) +
                              " bytes; load the model with a shorter context or a smaller batch.");
}

}  // namespace

#ifdef _WIN32

MappedFile::MappedFile(const std::string& path) {
  const HANDLE file = CreateFileW(Wide(path).c_str(), GENERIC_READ, FILE_SHARE_READ, nullptr,
                                  OPEN_EXISTING, 0, nullptr);
  if (file == INVALID_HANDLE_VALUE) Unreadable(path, Reason());
  LARGE_INTEGER size{};
  GetFileSizeEx(file, &size);
  size_ = static_cast<size_t>(size.QuadPart);
  if (size_ != 0) {
    const HANDLE mapping = CreateFileMappingW(file, nullptr, PAGE_READONLY, 0, 0, nullptr);
    if (mapping != nullptr) {
      data_ = MapViewOfFile(mapping, FILE_MAP_READ, 0, 0, 0);
      CloseHandle(mapping);
    }
  }
  const std::string reason = Reason();
  CloseHandle(file);
  if (size_ != 0 && data_ == nullptr) Unreadable(path, reason);
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) UnmapViewOfFile(data_);
}

ZeroedMemory::ZeroedMemory(size_t size) : size_(size) {
  if (size == 0) return;
  data_ = VirtualAlloc(nullptr, size, MEM_COMMIT | MEM_RESERVE, PAGE_READWRITE);
  if (data_ == nullptr) NoMemory(size);
}

ZeroedMemory::~ZeroedMemory() {
  if (data_ != nullptr) VirtualFree(data_, 0, MEM_RELEASE);
}

// One view: Windows reads what is touched.
SparseFile::SparseFile(const std::string& path, uint64_t begin, uint64_t end) {
  const HANDLE file = CreateFileW(Wide(path).c_str(), GENERIC_READ, FILE_SHARE_READ, nullptr,
                                  OPEN_EXISTING, 0, nullptr);
  if (file == INVALID_HANDLE_VALUE) Unreadable(path, Reason());
  SYSTEM_INFO info;
  GetSystemInfo(&info);
  lead_ = static_cast<size_t>(begin % info.dwAllocationGranularity);
  const uint64_t offset = begin - lead_;
  size_ = static_cast<size_t>(end - offset);
  const HANDLE mapping = CreateFileMappingW(file, nullptr, PAGE_READONLY, 0, 0, nullptr);
  if (mapping != nullptr) {
    room_ = MapViewOfFile(mapping, FILE_MAP_READ, static_cast<DWORD>(offset >> 32),
                          static_cast<DWORD>(offset), size_);
    CloseHandle(mapping);
  }
  const std::string reason = Reason();
  CloseHandle(file);
  if (room_ == nullptr) Unreadable(path, reason);
}

SparseFile::~SparseFile() {
  if (room_ != nullptr) UnmapViewOfFile(room_);
}

bool Populate(const void*, size_t) { return false; }

SharedLibrary::SharedLibrary(const std::string& path) : handle_(LoadLibraryW(Full(path).c_str())) {
  if (handle_ == nullptr) {
    throw Error(MXF_TARGET, path + " should load here, but does not: " + Reason() + ".");
  }
}

SharedLibrary::~SharedLibrary() { FreeLibrary(static_cast<HMODULE>(handle_)); }

void* SharedLibrary::Find(const std::string& name) const {
  return reinterpret_cast<void*>(GetProcAddress(static_cast<HMODULE>(handle_), name.c_str()));
}

int UsableCores() {
  DWORD_PTR process, system;
  // 0 where the process runs on cores of several groups.
  if (GetProcessAffinityMask(GetCurrentProcess(), &process, &system) && process != 0) {
    return static_cast<int>(std::bitset<8 * sizeof(process)>(process).count());
  }
  return static_cast<int>(GetActiveProcessorCount(ALL_PROCESSOR_GROUPS));
}

void NameThread(std::thread*, const char*) {}

#else

MappedFile::MappedFile(const std::string& path) {
  const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (file < 0) Unreadable(path, Reason());
  struct stat status {};
  void* mapped = MAP_FAILED;
  if (fstat(file, &status) == 0) {
    size_ = static_cast<size_t>(status.st_size);
    mapped = size_ == 0 ? nullptr : mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, file, 0);
  }
  const std::string reason = Reason();
  close(file);
  if (mapped == MAP_FAILED) Unreadable(path, reason);
  data_ = mapped;
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) munmap(data_, size_);
}

ZeroedMemory::ZeroedMemory(size_t size) : size_(size) {
  if (size == 0) return;
  data_ = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data_ == MAP_FAILED) {
    data_ = nullptr;
    NoMemory(size);
  }
}

ZeroedMemory::~ZeroedMemory() {
  if (data_ != nullptr) munmap(data_, size_);
}

SparseFile::SparseFile(const std::string& path, uint64_t begin, uint64_t end) {
  constexpr uint64_t kHuge = 2 << 20;
  const auto page = static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
  const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (file < 0) Unreadable(path, Reason());
  const uint64_t first = begin - begin % page, mapped = end - first;
  // Room for the mapping wherever it begins in 2 MB.
  size_ = static_cast<size_t>(mapped + kHuge);
  room_ = mmap(nullptr, size_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  void* at = MAP_FAILED;
  if (room_ != MAP_FAILED) {
    const auto address = reinterpret_cast<uint64_t>(room_);
    const uint64_t skip = (first - address + kHuge / 2) % kHuge;
    lead_ = static_cast<size_t>(skip + begin - first);
    at = mmap(static_cast<char*>(room_) + skip, static_cast<size_t>(mapped), PROT_READ,
              MAP_PRIVATE | MAP_FIXED, file, static_cast<off_t>(first));
  }
  const std::string reason = Reason();
  close(file);
  if (at != MAP_FAILED) return;
  if (room_ != MAP_FAILED) munmap(room_, size_);
  Unreadable(path, reason);
}

SparseFile::~SparseFile() { munmap(room_, size_); }

bool Populate(const void* data, size_t size) {
#ifdef __linux__
  constexpr int kPopulateRead = 22;  // MADV_POPULATE_READ, Linux 5.14
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto begin = reinterpret_cast<uintptr_t>(data) / page * page;
  const size_t whole = size + (reinterpret_cast<uintptr_t>(data) - begin);
  return madvise(reinterpret_cast<void*>(begin), whole, kPopulateRead) == 0;
#else
  (void)data;
  (void)size;
  return false;
#endif
}

SharedLibrary::SharedLibrary(const std::string& path)
    : handle_(dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL)) {
  if (handle_ == nullptr) {
    throw Error(MXF_TARGET, path + " should load here, but does not: " + dlerror() + ".");
  }
}

SharedLibrary::~SharedLibrary() { dlclose(handle_); }

void* SharedLibrary::Find(const std::string& name) const { return dlsym(handle_, name.c_str()); }

int UsableCores() {
#ifdef __linux__
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return CPU_COUNT(&set);
#endif
  return static_cast<int>(sysconf(_SC_NPROCESSORS_ONLN));
}

void NameThread(std::thread* thread, const char* name) {
#ifdef __APPLE__  // where a thread can only name itself
  (void)thread, (void)name;
#else
  pthread_setname_np(thread->native_handle(), name);
#endif
}

#endif

ZeroedMemory::ZeroedMemory(ZeroedMemory&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}

ZeroedMemory& ZeroedMemory::operator=(ZeroedMemory&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  return *this;
}

}  // namespace core
}  // namespace mxforge
