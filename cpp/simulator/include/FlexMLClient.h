// The interface of AMD's FlexMLRT client, as far as the bridge uses it, implemented by the simulator.
//
// It follows what is publicly known of two generations of the SDK: by default that of 1.7 and later; with
// FLEXMLRT_SIMULATOR_2024 that of 2024, which has no good(), getIOTensors(), subgraphName or extOptions and states
// shapes as vector<size_t>. With FLEXMLRT_SIMULATOR_STATUS forward() returns a status code instead of nothing.
// Nothing here talks to a device.
#pragma once

#include <any>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace flexmlrt::client {

/// What the library throws at run time.
class Exception : public std::exception {
 public:
  explicit Exception(std::string message) : message_(std::move(message)) {}
  const char* what() const noexcept override { return message_.c_str(); }

 private:
  std::string message_;
};

/// The library or the model cannot be loaded.
class LoaderException : public Exception {
 public:
  using Exception::Exception;
};

/// Arguments of forward() do not fit the model: 1 an input, 2 an output, 3 the number of inputs, 4 of outputs.
class BadArgsException : public Exception {
 public:
  explicit BadArgsException(int code);
};

/// One input or output buffer. `data` belongs to the caller.
struct ErtIoTypeNew {
  void* data = nullptr;
  std::string name;
  int idx = 0;
  std::size_t size = 0;  ///< bytes
  std::string type;      ///< such as "float32"
#ifdef FLEXMLRT_SIMULATOR_2024
  std::vector<std::size_t> shape;
#else
  std::vector<std::int64_t> shape;
#endif
};

struct Options {
  std::string modelPath;
  std::string deviceName;
  bool debug = false;
  bool profileSummary = false;
  std::uint32_t executeMode = 1;
  std::uint32_t apiVersion = 2;
#ifndef FLEXMLRT_SIMULATOR_2024
  std::string subgraphName;
  std::map<std::string, std::any> extOptions;  ///< values are read with exactly the types that the SDK documents
#endif
};

#ifndef FLEXMLRT_SIMULATOR_2024
enum class DataType { Float32, Int8, UInt8, Int16, UInt16, BFloat16, Bool, Float16, Int32, UInt32 };

struct TensorMetadata {
  std::string name;
  DataType type = DataType::Float32;
  std::vector<std::uint32_t> shape;
  std::size_t size = 0;  ///< bytes
};

/// A tensor of the model with its metadata; `data` belongs to the caller.
class ErtTensorType {
 public:
  explicit ErtTensorType(TensorMetadata metadata) : metadata_(std::move(metadata)) {}
  const TensorMetadata& getMetadata() const { return metadata_; }

  void* data = nullptr;

 private:
  TensorMetadata metadata_;
};
#endif

/// A model on the (simulated) device.
class Model {
 public:
#ifdef FLEXMLRT_SIMULATOR_STATUS
  using Result = int;
#else
  using Result = void;
#endif

  explicit Model(const Options& options);
  /// The SDK's model can be copied, and is then destroyed twice. Here a copy ends the process, so that tests see it.
  Model(const Model& other);
  Model& operator=(const Model&) = delete;
  ~Model();

  Result forward(std::vector<ErtIoTypeNew>& ifms, std::vector<ErtIoTypeNew>& ofms, std::vector<ErtIoTypeNew>& wts);

#ifndef FLEXMLRT_SIMULATOR_2024
  bool good() const;
  /// Tensors of `direction` "input" or "output", in no order that means anything.
  std::vector<ErtTensorType> getIOTensors(const std::string& direction, bool hwTensor);
#endif

 private:
  class State;
  std::unique_ptr<State> state_;
};

}  // namespace flexmlrt::client
