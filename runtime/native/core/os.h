/*!
 * \file os.h
 * \brief What differs between systems: files in memory, libraries, memory, cores.
 */
#ifndef MXFORGE_CORE_OS_H_
#define MXFORGE_CORE_OS_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <thread>

namespace mxforge {
namespace core {

/*! \brief A file's bytes, mapped to be read. Error (MXF_CORRUPT) where there is no such file. */
class MappedFile {
 public:
  explicit MappedFile(const std::string& path);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  const void* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

/*!
 * \brief Bytes [begin, end) of a file of which few are read, so that the others do not become
 * resident.
 *
 * Linux keeps a cached file in chunks of up to 2 MB, and maps all of a chunk for one byte of it
 * where the file's offset and the address agree within 2 MB. Here they do not, and a read brings
 * 64 KB.
 */
class SparseFile {
 public:
  /*! \brief Error (MXF_CORRUPT) where the file does not hold these bytes. */
  SparseFile(const std::string& path, uint64_t begin, uint64_t end);
  ~SparseFile();
  SparseFile(const SparseFile&) = delete;
  SparseFile& operator=(const SparseFile&) = delete;

  /*! \brief The byte at `begin`. */
  const void* data() const { return static_cast<const char*>(room_) + lead_; }

 private:
  void* room_ = nullptr;  // of the address space, which the mapping lies in
  size_t size_ = 0, lead_ = 0;
};

/*!
 * \brief Bring mapped bytes to where they can be read without a fault.
 *
 * False where the system cannot, or has no memory left.
 */
bool Populate(const void* data, size_t size);

/*! \brief Memory of zeros that is there when it is touched; a page's alignment at least. */
class ZeroedMemory {
 public:
  ZeroedMemory() = default;
  /*! \brief Error (MXF_MEMORY) where the system has not so much. */
  explicit ZeroedMemory(size_t size);
  ZeroedMemory(ZeroedMemory&& other) noexcept;
  ZeroedMemory& operator=(ZeroedMemory&& other) noexcept;
  ~ZeroedMemory();

  void* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

/*! \brief A shared library; it stays loaded until nobody has it. */
class SharedLibrary {
 public:
  /*! \brief Error (MXF_TARGET), with the system's reason. */
  explicit SharedLibrary(const std::string& path);
  ~SharedLibrary();
  SharedLibrary(const SharedLibrary&) = delete;
  SharedLibrary& operator=(const SharedLibrary&) = delete;

  /*! \brief nullptr where there is none. */
  void* Find(const std::string& name) const;

 private:
  void* handle_;
};

/*! \brief How many cores this process may use. */
int UsableCores();

/*! \brief Name a thread, with at most 15 characters, where the system shows names. */
void NameThread(std::thread* thread, const char* name);

}  // namespace core
}  // namespace mxforge

#endif  // MXFORGE_CORE_OS_H_
