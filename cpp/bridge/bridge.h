// The bridge: one model of the FlexMLRT SDK, opened, checked and run. Knows nothing of Python.
//
// The same source is built against AMD's SDK and against the simulator; which one only the include path decides.
// CMake's feature tests say what the header at hand has (FLEXMLRT_HAS_GOOD and so on).
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "errors.h"
#include "tensor.h"

namespace visionaccel {

/// How a model is opened.
struct OpenOptions {
  std::string path;         ///< the `.rai` file, or the folder of a partition
  bool single_file = true;  ///< `path` is a `.rai` file
  std::string device_name;  ///< empty: not set
  std::string subgraph;     ///< empty: not set
  std::string cache_dir;    ///< where the SDK may write, for a `.rai` file
  std::uint32_t execute_mode = 2;
  std::optional<bool> preemption;  ///< not given: the SDK's default
};

enum class LogLevel { kDebug = 10, kInfo = 20, kWarning = 30 };
using LogSink = std::function<void(LogLevel, const std::string&)>;

/// What the SDK that this was built against offers, such as "good, getIOTensors"; for reports.
std::string sdk_features();

/// A model on the device. Calls of `run` from several threads are made one after another, as the SDK promises nothing.
///
/// The SDK holds one model in a process: a second one while the first lives is refused, since it would turn the
/// first one's output into NaN.
class Bridge {
 public:
  /// Opens the model and checks that its tensors are the expected ones, by name, dtype, squeezed shape and size.
  ///
  /// Throws BridgeError, with the SDK's text, if the SDK refuses or the tensors are others. `log` is called from the
  /// thread that opens.
  Bridge(const OpenOptions& options, std::vector<TensorSpec> inputs, std::vector<TensorSpec> outputs,
         const LogSink& log);
  ~Bridge();
  Bridge(const Bridge&) = delete;
  Bridge& operator=(const Bridge&) = delete;

  const std::vector<TensorSpec>& inputs() const { return inputs_; }
  const std::vector<TensorSpec>& outputs() const { return outputs_; }

  /// Runs once. Buffers are in the order of inputs() and outputs(), have their sizes and belong to the caller; inputs
  /// are only read. What the SDK leaves unwritten in an output stays as it was.
  ///
  /// Throws BridgeError if the SDK throws or reports a status, the bridge is closed, or this is a fork of the process
  /// that opened it.
  void run(const std::vector<const void*>& inputs, const std::vector<void*>& outputs);

  /// Throws BridgeError in a fork of the process that opened the model.
  void check_process() const;

  /// Gives the model back, then unmaps its file. Waits for a run in progress. May be called again. In a fork it does
  /// nothing: the model's threads are in the process that opened it.
  void close();

 private:
  class Impl;
  const pid_t owner_;
  std::mutex turn_;
  std::vector<TensorSpec> inputs_;
  std::vector<TensorSpec> outputs_;
  std::unique_ptr<Impl> impl_;
};

}  // namespace visionaccel
