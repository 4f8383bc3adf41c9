// The file format of simulated artifacts: an OpenVINO model and its weights behind a header.
#pragma once

#include <cstddef>
#include <cstdint>

namespace simulator {

/// A view into a simulated artifact. It holds no memory: what it points to must outlive it.
///
/// Layout, little-endian: 8 bytes "VASIMRAI"; uint32 version 1; uint32 precision (0 float32, 1 bfloat16); uint64 offset
/// and uint64 length of the model's XML; uint64 offset and uint64 length of its weights, which start at a multiple of
/// 4096 so that a mapped file can be computed from as it lies.
struct Container {
  bool bfloat16 = false;
  const char* xml = nullptr;
  std::size_t xml_bytes = 0;
  const std::uint8_t* weights = nullptr;
  std::size_t weights_bytes = 0;

  /// Throws flexmlrt::client::LoaderException if the bytes are no simulated artifact, or a truncated one.
  static Container view(const std::uint8_t* data, std::size_t bytes);
};

}  // namespace simulator
