// A file's bytes in memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace visionaccel {

/// A copy of a whole file, page-aligned. The SDK reads from it in every run: a mapping of the file would change with it,
/// and end the process once the file is cut short.
class FileContent {
 public:
  /// Throws BridgeError if the file cannot be read or is empty.
  explicit FileContent(const std::string& path);
  ~FileContent();
  FileContent(const FileContent&) = delete;
  FileContent& operator=(const FileContent&) = delete;

  std::uint8_t* data() const { return static_cast<std::uint8_t*>(data_); }
  std::size_t bytes() const { return bytes_; }

 private:
  void* data_ = nullptr;
  std::size_t bytes_ = 0;
};

}  // namespace visionaccel
