#include "output_pool.h"

#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <new>

namespace visionaccel {

namespace {

constexpr std::size_t kAlignment = 4096;
constexpr std::size_t kMostIdle = 2;  // one that is being read while the next call writes the other
constexpr int kPoison = 0xFF;

}  // namespace

std::shared_ptr<OutputPool> OutputPool::create(std::size_t bytes) {
  return {new OutputPool(bytes), [owner = getpid()](OutputPool* pool) {
            if (getpid() == owner) {
              delete pool;
            }
          }};
}

OutputPool::OutputPool(std::size_t bytes) : bytes_(bytes) {
  ready_.reserve(kMostIdle + 1);
  spoilt_.reserve(kMostIdle + 1);
  for (std::size_t i = 0; i < kMostIdle; ++i) {
    ready_.push_back(allocate());
  }
  poisoner_ = std::thread([this] { poison_what_comes_back(); });
}

OutputPool::~OutputPool() {
  {
    const std::lock_guard<std::mutex> lock(guard_);
    ending_ = true;
  }
  changed_.notify_all();
  poisoner_.join();
  for (auto* buffers : {&ready_, &spoilt_}) {
    for (void* buffer : *buffers) {
      std::free(buffer);
    }
  }
}

void* OutputPool::take() {
  {
    std::unique_lock<std::mutex> lock(guard_);
    // To wait for one that is nearly ready is sooner than to have the system find pages for another.
    changed_.wait(lock, [this] { return !ready_.empty() || (spoilt_.empty() && !poisoning_); });
    if (!ready_.empty()) {
      void* buffer = ready_.back();
      ready_.pop_back();
      return buffer;
    }
  }
  return allocate();
}

void OutputPool::give_back(void* buffer) noexcept {
  {
    const std::lock_guard<std::mutex> lock(guard_);
    if (ready_.size() + spoilt_.size() + (poisoning_ ? 1 : 0) < kMostIdle) {
      spoilt_.push_back(buffer);
      buffer = nullptr;
    }
  }
  if (buffer != nullptr) {
    std::free(buffer);
  } else {
    changed_.notify_all();
  }
}

void* OutputPool::allocate() const {
  void* buffer = std::aligned_alloc(kAlignment, (bytes_ + kAlignment - 1) / kAlignment * kAlignment);
  if (buffer == nullptr) {
    throw std::bad_alloc();
  }
  return std::memset(buffer, kPoison, bytes_);
}

void OutputPool::poison_what_comes_back() {
  std::unique_lock<std::mutex> lock(guard_);
  while (true) {
    changed_.wait(lock, [this] { return ending_ || !spoilt_.empty(); });
    if (ending_) {
      return;
    }
    void* buffer = spoilt_.back();
    spoilt_.pop_back();
    poisoning_ = true;
    lock.unlock();
    std::memset(buffer, kPoison, bytes_);
    lock.lock();
    poisoning_ = false;
    ready_.push_back(buffer);
    changed_.notify_all();
  }
}

}  // namespace visionaccel
