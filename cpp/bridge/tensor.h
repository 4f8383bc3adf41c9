// Named tensors as the bridge checks them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace visionaccel {

/// A tensor that the caller promises or expects.
struct TensorSpec {
  std::string name;
  std::string dtype;  ///< numpy's name, which is FlexMLRT's too but for bool, its int1
  std::vector<std::int64_t> shape;

  /// Bytes of all elements. Throws BridgeError for a dtype that FlexMLRT has no name for, or an impossible shape.
  std::size_t bytes() const;

  /// FlexMLRT's name of the dtype.
  std::string type() const;

  /// Such as `name: float32[4, 2]`.
  std::string text() const;
};

/// The shape without its sizes of one, which compilers add and drop.
std::vector<std::int64_t> squeezed(const std::vector<std::int64_t>& shape);

}  // namespace visionaccel
