// Output buffers that are poisoned before the device gets them.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace visionaccel {

/// Buffers of one size. They are handed out with all bits set, which is NaN in every floating dtype and one that no
/// processor computes, so that what a device leaves unwritten can be told. They come back when their reader is done
/// with them, and are poisoned again by a thread of the pool meanwhile: a call neither copies its output, nor waits for
/// the system to find pages, nor for the poison. Safe to use from several threads.
class OutputPool {
 public:
  /// A pool that is not destroyed in a fork of this process, which has a copy of it without its thread and would wait for
  /// that for good.
  static std::shared_ptr<OutputPool> create(std::size_t bytes);

  /// Allocates and poisons the first buffers. Throws std::bad_alloc.
  explicit OutputPool(std::size_t bytes);
  /// Buffers must have come back before.
  ~OutputPool();
  OutputPool(const OutputPool&) = delete;
  OutputPool& operator=(const OutputPool&) = delete;

  /// A poisoned buffer, aligned to a page. Throws std::bad_alloc.
  void* take();

  /// Give a buffer back that came from `take`.
  void give_back(void* buffer) noexcept;

 private:
  void* allocate() const;
  void poison_what_comes_back();

  const std::size_t bytes_;
  std::mutex guard_;
  std::condition_variable changed_;
  bool ending_ = false;
  bool poisoning_ = false;
  std::vector<void*> ready_;
  std::vector<void*> spoilt_;
  std::thread poisoner_;
};

}  // namespace visionaccel
