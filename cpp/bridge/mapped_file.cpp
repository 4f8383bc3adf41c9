#include "mapped_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "errors.h"

namespace visionaccel {

MappedFile::MappedFile(const std::string& path) {
  const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (file < 0) {
    throw BridgeError("cannot open " + path + ": " + std::strerror(errno));
  }
  struct stat status {};
  const bool usable = fstat(file, &status) == 0 && S_ISREG(status.st_mode) && status.st_size > 0;
  if (usable) {
    bytes_ = static_cast<std::size_t>(status.st_size);
    data_ = mmap(nullptr, bytes_, PROT_READ, MAP_PRIVATE, file, 0);
  }
  const int error = errno;
  close(file);  // the map stays
  if (!usable) {
    throw BridgeError(path + " is no file with anything in it");
  }
  if (data_ == MAP_FAILED) {
    throw BridgeError("cannot map " + path + ": " + std::strerror(error));
  }
}

MappedFile::~MappedFile() { munmap(data_, bytes_); }

}  // namespace visionaccel
