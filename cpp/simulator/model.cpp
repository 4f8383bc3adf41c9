#include <FlexMLClient.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <mutex>
#include <thread>

#include "container.h"
#include "engine.h"
#include "script.h"
#include "simulator.h"

namespace flexmlrt::client {

namespace {

using simulator::Engine;
using simulator::Port;
using simulator::Script;

std::mutex models_guard;
std::vector<const void*> models;  // that live in this process, the oldest first
double seconds_in_forward = 0;

[[noreturn]] void hang() {
  while (true) {
    std::this_thread::sleep_for(std::chrono::hours(1));
  }
}

void print(const Script& script) {
  if (!script.print.empty()) {
    std::fprintf(stdout, "%s on stdout\n", script.print.c_str());
    std::fflush(stdout);
    std::fprintf(stderr, "%s on stderr\n", script.print.c_str());
  }
}

const char* meaning(int code) {
  switch (code) {
    case 1:
      return "incompatible input shape";
    case 2:
      return "incompatible output shape";
    case 3:
      return "wrong number of inputs";
    default:
      return "wrong number of outputs";
  }
}

/// A file of the directory layout, mapped by the library itself.
class Map {
 public:
  Map() = default;
  explicit Map(const std::string& path) {
    const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC);
    struct stat status {};
    if (file < 0 || fstat(file, &status) != 0 || status.st_size <= 0) {
      if (file >= 0) {
        close(file);
      }
      throw LoaderException("cannot open " + path);
    }
    bytes_ = static_cast<std::size_t>(status.st_size);
    data_ = mmap(nullptr, bytes_, PROT_READ, MAP_PRIVATE, file, 0);
    close(file);
    if (data_ == MAP_FAILED) {
      throw LoaderException("cannot map " + path);
    }
  }
  ~Map() {
    if (bytes_ > 0) {
      munmap(data_, bytes_);
    }
  }
  Map(const Map&) = delete;
  Map& operator=(const Map&) = delete;

  const std::uint8_t* data() const { return static_cast<const std::uint8_t*>(data_); }
  std::size_t bytes() const { return bytes_; }

 private:
  void* data_ = nullptr;
  std::size_t bytes_ = 0;
};

void fill_nan(const Port& port, void* data) {
  if (port.type == "float32") {
    std::fill_n(static_cast<float*>(data), port.bytes / sizeof(float), std::numeric_limits<float>::quiet_NaN());
  } else {
    std::memset(data, 0x7F, port.bytes);  // NaN in bfloat16 and float16
  }
}

}  // namespace

BadArgsException::BadArgsException(int code) : Exception(std::string("model argument error: ") + meaning(code)) {}

class Model::State {
 public:
  explicit State(const Options& options) {
    const Script script = simulator::read_script();
    print(script);
    if (script.constructor == "throw") {
      throw LoaderException("simulated: the device refused the model");
    }
    if (script.constructor == "hang") {
      hang();
    }
    if (script.constructor == "abort") {
      std::abort();
    }
    good_ = script.constructor != "bad";
    if (options.executeMode != 2) {
      throw LoaderException("simulator: executeMode must be 2, as in every known caller");
    }
    if (good_) {
      engine_ = std::make_unique<Engine>(container(options));
    }
    const std::lock_guard<std::mutex> lock(models_guard);
    models.push_back(this);
  }

  ~State() {
    const std::lock_guard<std::mutex> lock(models_guard);
    models.erase(std::remove(models.begin(), models.end(), this), models.end());
  }

  State(const State&) = delete;
  State& operator=(const State&) = delete;

  bool good() const { return good_; }
  const Engine& engine() const { return *engine_; }

  int forward(const std::vector<ErtIoTypeNew>& ifms, std::vector<ErtIoTypeNew>& ofms) {
    if (engine_ == nullptr) {
      throw Exception("simulator: the model is not good");
    }
    const Script script = simulator::read_script();
    const auto inputs = bind(ifms, engine_->inputs(), 1);
    const auto outputs = bind(ofms, engine_->outputs(), 2);
    ++calls_;
    const std::string fault = script.at == 0 || script.at == calls_ ? script.forward : "ok";
    print(script);
    std::this_thread::sleep_for(std::chrono::milliseconds(script.latency_ms));
    if (fault == "throw") {
      throw Exception("simulated: DRM_IOCTL_AMDXDNA_EXEC_CMD failed");
    } else if (fault == "hang") {
      hang();
    } else if (fault == "abort") {
      std::abort();
    } else if (fault == "segv") {
      std::raise(SIGSEGV);
    } else if (fault == "status") {
      return 5;
    } else if (fault == "unwritten") {
      return 0;
    }
    compute(fault, script, inputs, outputs);
    return 0;
  }

 private:
  simulator::Container container(const Options& options) {
#ifndef FLEXMLRT_SIMULATOR_2024
    const auto buffer = options.extOptions.find("fbs_buffer");
    if (buffer != options.extOptions.end()) {
      // Exactly these types, as in the SDK: another one is std::bad_any_cast.
      (void)std::any_cast<std::string>(options.extOptions.at("cache_dir"));
      return simulator::Container::view(
          std::any_cast<std::uint8_t*>(buffer->second), std::any_cast<std::size_t>(options.extOptions.at("fbs_buffer_size")));
    }
    if (options.subgraphName != "0") {
      throw LoaderException("simulator: a directory has subgraph '0', not '" + options.subgraphName + "'");
    }
#endif
    map_ = std::make_unique<Map>(options.modelPath + "/simulator.rai");
    return simulator::Container::view(map_->data(), map_->bytes());
  }

  static std::vector<void*> bind(const std::vector<ErtIoTypeNew>& given, const std::vector<Port>& ports, int code) {
    if (given.size() != ports.size()) {
      throw BadArgsException(code + 2);
    }
    std::vector<void*> bound;
    for (const Port& port : ports) {
      const auto found =
          std::find_if(given.begin(), given.end(), [&](const ErtIoTypeNew& each) { return each.name == port.name; });
      if (found == given.end() || found->size != port.bytes || found->type != port.type || found->data == nullptr) {
        throw BadArgsException(code);
      }
      bound.push_back(found->data);
    }
    return bound;
  }

  void compute(
      const std::string& fault, const Script& script, const std::vector<void*>& inputs, const std::vector<void*>& outputs) {
    const auto started = std::chrono::steady_clock::now();
    const auto& ports = engine_->outputs();
    std::vector<std::vector<std::uint8_t>> kept;
    for (std::size_t i = 0; fault == "partial" && i < ports.size(); ++i) {
      const std::size_t row = ports[i].bytes / static_cast<std::size_t>(ports[i].shape.at(0));
      const auto* end = static_cast<const std::uint8_t*>(outputs[i]) + ports[i].bytes;
      kept.emplace_back(end - row, end);
    }
    engine_->infer(inputs, outputs);
    const bool spoilt = script.second_spoils && spoilt_by_another();
    for (std::size_t i = 0; i < ports.size(); ++i) {
      if (fault == "nan" || spoilt) {
        fill_nan(ports[i], outputs[i]);
      } else if (fault == "zeros") {
        std::memset(outputs[i], 0, ports[i].bytes);
      } else if (fault == "partial") {
        auto* end = static_cast<std::uint8_t*>(outputs[i]) + ports[i].bytes;
        std::copy(kept[i].begin(), kept[i].end(), end - kept[i].size());
      }
    }
    seconds_in_forward = std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count();
  }

  bool spoilt_by_another() const {
    const std::lock_guard<std::mutex> lock(models_guard);
    return models.size() > 1 && models.front() == this;
  }

  bool good_ = true;
  long calls_ = 0;
  std::unique_ptr<Map> map_;  // outlives the engine, whose weights lie in it
  std::unique_ptr<Engine> engine_;
};

Model::Model(const Options& options) : state_(std::make_unique<State>(options)) {}

Model::Model(const Model&) {
  std::fprintf(stderr, "simulator: a model was copied, which the SDK's does not survive\n");
  std::abort();
}

Model::~Model() = default;

Model::Result Model::forward(
    std::vector<ErtIoTypeNew>& ifms, std::vector<ErtIoTypeNew>& ofms, std::vector<ErtIoTypeNew>& /*wts*/) {
  const int status = state_->forward(ifms, ofms);
#ifdef FLEXMLRT_SIMULATOR_STATUS
  return status;
#else
  if (status != 0) {
    throw Exception("simulated: status " + std::to_string(status));
  }
#endif
}

#ifndef FLEXMLRT_SIMULATOR_2024
bool Model::good() const { return state_->good(); }

std::vector<ErtTensorType> Model::getIOTensors(const std::string& direction, bool /*hwTensor*/) {
  static const std::map<std::string, DataType> types = {
      {"float32", DataType::Float32}, {"bfloat16", DataType::BFloat16}, {"float16", DataType::Float16},
      {"int32", DataType::Int32},     {"int16", DataType::Int16},       {"int8", DataType::Int8},
      {"uint8", DataType::UInt8},     {"uint16", DataType::UInt16},
  };
  const auto& ports = direction == "input" ? state_->engine().inputs() : state_->engine().outputs();
  std::vector<ErtTensorType> tensors;
  for (const Port& port : ports) {
    const auto type = types.find(port.type);
    if (type == types.end()) {
      throw Exception("simulator: FlexMLRT has no " + port.type + " tensors");
    }
    tensors.emplace_back(TensorMetadata{port.name, type->second, {port.shape.begin(), port.shape.end()}, port.bytes});
  }
  if (simulator::read_script().shuffled) {
    std::reverse(tensors.begin(), tensors.end());
  }
  return tensors;
}
#endif

}  // namespace flexmlrt::client

namespace simulator {

double last_forward_seconds() { return flexmlrt::client::seconds_in_forward; }

}  // namespace simulator
