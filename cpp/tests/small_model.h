// A model of two inputs and two outputs as a simulated artifact, and what surrounds a test of it.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "bridge.h"

/// A folder that is removed at the end of a test, and the simulator's script in it.
class Workshop {
 public:
  Workshop();
  ~Workshop();
  Workshop(const Workshop&) = delete;
  Workshop& operator=(const Workshop&) = delete;

  /// Tell the simulator what to do wrong from now on; "" for nothing.
  void script(const std::string& text) const;

  /// The model as a folder of a partition, or as a `.rai` file: the layout that this generation of the SDK can open.
  visionaccel::OpenOptions options() const;
  visionaccel::OpenOptions directory() const;
  visionaccel::OpenOptions single_file() const;

  std::filesystem::path folder;
};

/// Bytes of the artifact. `sum` [2, 3] is `left` + `right` + (10, 20, 30); `product` [2, 3] is `left` * `right`.
std::vector<std::uint8_t> small_artifact();

/// Its tensors, all float32 [2, 3].
std::vector<visionaccel::TensorSpec> small_inputs();
std::vector<visionaccel::TensorSpec> small_outputs();
