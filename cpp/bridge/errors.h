// The one exception of the bridge.
#pragma once

#include <stdexcept>

namespace visionaccel {

/// Whatever goes wrong at the SDK, with the SDK's own text in it.
class BridgeError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

}  // namespace visionaccel
