// Computes a simulated artifact on the CPU with OpenVINO.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "container.h"

namespace simulator {

/// Where OpenVINO's C library lies; without a call the dynamic linker looks for it. Takes effect before the first model.
void use_openvino(const std::string& library);

/// An input or output of a model.
struct Port {
  std::string name;
  std::string type;  ///< as FlexMLRT names it, such as "float32"
  std::vector<std::int64_t> shape;
  std::size_t bytes = 0;
};

/// A compiled model. The weights of the container are used where they lie.
class Engine {
 public:
  /// Throws flexmlrt::client::LoaderException if OpenVINO is missing or refuses the model.
  explicit Engine(const Container& container);
  ~Engine();
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  const std::vector<Port>& inputs() const { return inputs_; }
  const std::vector<Port>& outputs() const { return outputs_; }

  /// Computes once. Buffers are in the order of inputs() and outputs() and belong to the caller.
  /// Throws flexmlrt::client::Exception if OpenVINO fails.
  void infer(const std::vector<void*>& inputs, const std::vector<void*>& outputs);

 private:
  struct Handles;
  std::unique_ptr<Handles> handles_;
  std::vector<Port> inputs_;
  std::vector<Port> outputs_;
};

}  // namespace simulator
