#include "file_content.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "errors.h"

namespace visionaccel {

namespace {

/// Reads until the bytes are there or the file ends; 0, or the error's number. A file that ends too early is ESTALE.
int read_whole(int file, std::uint8_t* data, std::size_t bytes) {
  while (bytes > 0) {
    const ssize_t got = read(file, data, bytes);
    if (got < 0 && errno == EINTR) {
      continue;
    }
    if (got <= 0) {
      return got < 0 ? errno : ESTALE;
    }
    data += got;
    bytes -= static_cast<std::size_t>(got);
  }
  return 0;
}

}  // namespace

FileContent::FileContent(const std::string& path) {
  const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (file < 0) {
    throw BridgeError("cannot open " + path + ": " + std::strerror(errno));
  }
  struct stat status {};
  const bool usable = fstat(file, &status) == 0 && S_ISREG(status.st_mode) && status.st_size > 0;
  int error = 0;
  if (usable) {
    bytes_ = static_cast<std::size_t>(status.st_size);
    data_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    error = data_ == MAP_FAILED ? errno : read_whole(file, data(), bytes_);
  }
  close(file);
  if (!usable) {
    throw BridgeError(path + " is not a file, or is empty");
  }
  if (error != 0) {
    if (data_ != MAP_FAILED) {
      munmap(data_, bytes_);
    }
    throw BridgeError("cannot read " + path + ": " + std::strerror(error));
  }
}

FileContent::~FileContent() { munmap(data_, bytes_); }

}  // namespace visionaccel
