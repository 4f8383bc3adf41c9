#include "bridge.h"

#include <FlexMLClient.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <mutex>
#include <numeric>
#include <optional>
#include <type_traits>
#include <utility>

#include "file_content.h"

namespace visionaccel {

namespace {

namespace sdk = flexmlrt::client;

std::atomic<int> living_models{0};
std::atomic<bool> had_a_model{false};

/// Holds the process's one place for a model.
class OnlyModel {
 public:
  OnlyModel() {
    if (living_models.fetch_add(1) > 0) {
      living_models.fetch_sub(1);
      throw BridgeError("this process has a FlexMLRT model already, and a second one would spoil its output");
    }
  }
  ~OnlyModel() { living_models.fetch_sub(1); }
  OnlyModel(const OnlyModel&) = delete;
  OnlyModel& operator=(const OnlyModel&) = delete;
};

/// Runs a call of the SDK; whatever it throws becomes a BridgeError with its text.
template <typename Call>
decltype(auto) translated(const std::string& what, Call&& call) {
  try {
    return std::forward<Call>(call)();
  } catch (const BridgeError&) {
    throw;
  } catch (const std::exception& error) {
    throw BridgeError("FlexMLRT failed to " + what + ": " + error.what());
  } catch (...) {
    throw BridgeError("FlexMLRT failed to " + what + ", with an exception of unknown type");
  }
}

/// Calls forward() whatever it returns: nothing, or a status that is 0 or true for success.
template <typename Model, typename Tensors>
void forward(Model& model, Tensors& inputs, Tensors& outputs, Tensors& weights) {
  using Result = decltype(model.forward(inputs, outputs, weights));
  if constexpr (std::is_void_v<Result>) {
    model.forward(inputs, outputs, weights);
  } else {
    const Result status = model.forward(inputs, outputs, weights);
    if constexpr (std::is_same_v<Result, bool>) {
      if (!status) {
        throw BridgeError("FlexMLRT failed to run the model: forward() returned false");
      }
    } else if (static_cast<long>(status) != 0) {
      throw BridgeError("FlexMLRT failed to run the model: status " + std::to_string(static_cast<long>(status)));
    }
  }
}

sdk::Options sdk_options(const OpenOptions& options, const FileContent* file) {
  sdk::Options made;
  made.modelPath = options.path;
  made.deviceName = options.device_name;
  made.executeMode = options.execute_mode;
#ifdef FLEXMLRT_HAS_SUBGRAPH_NAME
  made.subgraphName = options.subgraph;
#endif
#ifdef FLEXMLRT_HAS_EXT_OPTIONS
  if (file != nullptr) {
    // The SDK casts the values back to exactly these types.
    made.extOptions["fbs_buffer"] = file->data();
    made.extOptions["fbs_buffer_size"] = std::size_t{file->bytes()};
    made.extOptions["cache_dir"] = std::string(options.cache_dir);
  }
  if (options.preemption.has_value()) {
    made.extOptions["enable_preemption"] = bool{*options.preemption};
  }
#else
  if (file != nullptr) {
    throw BridgeError("this FlexMLRT SDK takes no .rai files (its options have no extOptions); use a newer one");
  }
#endif
  return made;
}

#ifdef FLEXMLRT_HAS_GET_IO_TENSORS
template <typename Type>
std::string dtype_of(Type type) {
  switch (type) {
    case Type::Float32:
      return "float32";
    case Type::Int8:
      return "int8";
    case Type::UInt8:
      return "uint8";
    case Type::Int16:
      return "int16";
    case Type::UInt16:
      return "uint16";
    case Type::BFloat16:
      return "bfloat16";
    case Type::Bool:
      return "bool";
    case Type::Float16:
      return "float16";
    case Type::Int32:
      return "int32";
    case Type::UInt32:
      return "uint32";
    default:  // of a later SDK
      return "unknown";
  }
}

/// What the model says of its inputs or outputs, in its own order, as the host sees them.
std::vector<TensorSpec> model_tensors(sdk::Model& model, const char* direction, std::vector<std::size_t>& sizes) {
  std::vector<TensorSpec> found;
  for (auto&& tensor : model.getIOTensors(direction, false)) {
    const auto& about = tensor.getMetadata();
    TensorSpec spec;
    spec.name = about.name;
    spec.dtype = dtype_of(about.type);
    spec.shape.assign(about.shape.begin(), about.shape.end());
    found.push_back(std::move(spec));
    sizes.push_back(about.size);
  }
  return found;
}

std::string listed(const std::vector<TensorSpec>& specs) {
  std::string text;
  for (const auto& spec : specs) {
    text += (text.empty() ? "" : "; ") + spec.text();
  }
  return text.empty() ? "none" : text;
}

/// The place of each expected tensor in the model's own order. Throws BridgeError if they are not the same tensors.
std::vector<int> matched(sdk::Model& model, const char* direction, const std::vector<TensorSpec>& expected) {
  std::vector<std::size_t> sizes;
  const auto found = model_tensors(model, direction, sizes);
  const auto refuse = [&](const std::string& reason) {
    throw BridgeError(reason + "; the model's " + direction + "s are: " + listed(found));
  };
  if (found.size() != expected.size()) {
    refuse(
        "the model has " + std::to_string(found.size()) + " " + direction + "s, and " +
        std::to_string(expected.size()) + " are expected");
  }
  std::vector<int> places;
  for (const auto& spec : expected) {
    const auto same_name = [&](const TensorSpec& each) { return each.name == spec.name; };
    const auto place = std::find_if(found.begin(), found.end(), same_name);
    if (place == found.end()) {
      refuse("the model has no " + std::string(direction) + " " + spec.text());
    }
    const auto index = static_cast<std::size_t>(place - found.begin());
    if (place->dtype != spec.dtype || squeezed(place->shape) != squeezed(spec.shape) || sizes[index] != spec.bytes()) {
      refuse(
          "the model has " + place->text() + " of " + std::to_string(sizes[index]) + " bytes where " + spec.text() +
          " of " + std::to_string(spec.bytes()) + " bytes is expected");
    }
    places.push_back(static_cast<int>(index));
  }
  return places;
}
#endif

#ifndef FLEXMLRT_HAS_GET_IO_TENSORS
std::vector<int> in_order(std::size_t count) {
  std::vector<int> places(count);
  std::iota(places.begin(), places.end(), 0);
  return places;
}
#endif

/// The SDK's descriptions of tensors, without their buffers.
std::vector<sdk::ErtIoTypeNew> described(const std::vector<TensorSpec>& specs, const std::vector<int>& places) {
  std::vector<sdk::ErtIoTypeNew> tensors(specs.size());
  for (std::size_t i = 0; i < specs.size(); ++i) {
    tensors[i].data = nullptr;
    tensors[i].name = specs[i].name;
    tensors[i].idx = places[i];
    tensors[i].size = specs[i].bytes();
    tensors[i].type = specs[i].type();
    // Of size_t in one generation of the SDK and of int64_t in another.
    tensors[i].shape.assign(specs[i].shape.begin(), specs[i].shape.end());
  }
  return tensors;
}

}  // namespace

std::string sdk_features() {
  std::string features;
  const auto add = [&](const char* name) { features += (features.empty() ? "" : ", ") + std::string(name); };
#ifdef FLEXMLRT_HAS_GOOD
  add("good");
#endif
#ifdef FLEXMLRT_HAS_GET_IO_TENSORS
  add("getIOTensors");
#endif
#ifdef FLEXMLRT_HAS_SUBGRAPH_NAME
  add("subgraphName");
#endif
#ifdef FLEXMLRT_HAS_EXT_OPTIONS
  add("extOptions");
#endif
  (void)add;
  return features.empty() ? "none of the optional ones" : features;
}

class Bridge::Impl {
 public:
  Impl(const OpenOptions& options, const std::vector<TensorSpec>& inputs, const std::vector<TensorSpec>& outputs) {
    if (options.single_file) {
      file_.emplace(options.path);
    }
    const auto made = sdk_options(options, file_ ? &*file_ : nullptr);
    model_ = translated("open " + options.path, [&] { return std::make_unique<sdk::Model>(made); });
#ifdef FLEXMLRT_HAS_GOOD
    if (!translated("open the model", [&] { return model_->good(); })) {
      throw BridgeError("FlexMLRT opened " + options.path + " and says that it is not good()");
    }
#endif
#ifdef FLEXMLRT_HAS_GET_IO_TENSORS
    const auto places = [&](const char* direction, const std::vector<TensorSpec>& specs) {
      return translated("list the model's tensors", [&] { return matched(*model_, direction, specs); });
    };
#else
    const auto places = [](const char*, const std::vector<TensorSpec>& specs) { return in_order(specs.size()); };
#endif
    inputs_ = described(inputs, places("input", inputs));
    outputs_ = described(outputs, places("output", outputs));
  }

  void run(const std::vector<const void*>& inputs, const std::vector<void*>& outputs) {
    // The SDK may keep what it is given until the next call, and change it: each call has its own descriptions.
    auto ifms = inputs_;
    auto ofms = outputs_;
    std::vector<sdk::ErtIoTypeNew> weights;
    for (std::size_t i = 0; i < ifms.size(); ++i) {
      ifms[i].data = const_cast<void*>(inputs.at(i));  // the SDK's type; it reads inputs only
    }
    for (std::size_t i = 0; i < ofms.size(); ++i) {
      ofms[i].data = outputs.at(i);
    }
    translated("run the model", [&] { forward(*model_, ifms, ofms, weights); });
  }

 private:
  // Destroyed from the last to the first: the model before the file that it reads from, and the place in the process
  // after both.
  OnlyModel only_;
  std::optional<FileContent> file_;
  std::unique_ptr<sdk::Model> model_;
  std::vector<sdk::ErtIoTypeNew> inputs_;
  std::vector<sdk::ErtIoTypeNew> outputs_;
};

Bridge::Bridge(
    const OpenOptions& options, std::vector<TensorSpec> inputs, std::vector<TensorSpec> outputs, const LogSink& log)
    : owner_(getpid()), inputs_(std::move(inputs)), outputs_(std::move(outputs)) {
  for (const auto* specs : {&inputs_, &outputs_}) {
    for (const auto& spec : *specs) {
      static_cast<void>(spec.bytes());  // before the device is asked for anything
    }
  }
  if (had_a_model) {
    log(LogLevel::kWarning,
        "this process had a FlexMLRT model before; the SDK is known to crash when one is opened after another");
  }
  log(LogLevel::kDebug, "opening " + options.path + "; the SDK has " + sdk_features());
  impl_ = std::make_unique<Impl>(options, inputs_, outputs_);
  had_a_model = true;
  log(LogLevel::kInfo, "opened " + options.path);
}

Bridge::~Bridge() { close(); }

void Bridge::run(const std::vector<const void*>& inputs, const std::vector<void*>& outputs) {
  check_process();
  const std::lock_guard<std::mutex> turn(turn_);
  if (impl_ == nullptr) {
    throw BridgeError("the FlexMLRT model is closed");
  }
  impl_->run(inputs, outputs);
}

void Bridge::check_process() const {
  if (getpid() != owner_) {
    throw BridgeError("the FlexMLRT model was opened by another process; open it after the fork");
  }
}

void Bridge::close() {
  if (getpid() != owner_) {
    static_cast<void>(impl_.release());
    return;
  }
  const std::lock_guard<std::mutex> turn(turn_);
  impl_.reset();
}

}  // namespace visionaccel
