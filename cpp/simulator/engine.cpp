#include "engine.h"

#include <FlexMLClient.h>
#include <dlfcn.h>
#include <openvino/c/openvino.h>

namespace simulator {

namespace {

std::string& library_path() {
  static std::string path = "libopenvino_c.so";
  return path;
}

/// The functions of OpenVINO's C interface, which unlike the C++ one is the same in its releases. The library is loaded
/// at run time, so that the simulator imports without it, and never unloaded: it has threads of its own.
struct Api {
#define OPENVINO_FUNCTIONS(use)                                                                                      \
  use(ov_core_create) use(ov_core_read_model_from_memory_buffer) use(ov_core_compile_model) use(ov_model_inputs_size) \
  use(ov_model_outputs_size) use(ov_model_const_input_by_index) use(ov_model_const_output_by_index)                   \
  use(ov_model_free) use(ov_const_port_get_shape) use(ov_port_get_any_name) use(ov_port_get_element_type)             \
  use(ov_output_const_port_free) use(ov_compiled_model_create_infer_request) use(ov_compiled_model_free)              \
  use(ov_compiled_model_get_property) use(ov_infer_request_set_tensor) use(ov_infer_request_infer) use(ov_infer_request_free) use(ov_tensor_free)         \
  use(ov_tensor_create_from_host_ptr) use(ov_shape_free) use(ov_free) use(ov_get_last_err_msg)
#define DECLARE(name) decltype(&::name) name = nullptr;
  OPENVINO_FUNCTIONS(DECLARE)
#undef DECLARE
  ov_core_t* core = nullptr;
};

[[noreturn]] void refuse(const std::string& text) {
  throw flexmlrt::client::LoaderException("the simulator needs OpenVINO: " + text);
}

const Api& api() {
  static const Api loaded = [] {
    Api functions;
    void* library = dlopen(library_path().c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
      const char* reason = dlerror();
      refuse(reason != nullptr ? reason : library_path());
    }
#define LOAD(name)                                                                  \
  functions.name = reinterpret_cast<decltype(functions.name)>(dlsym(library, #name)); \
  if (functions.name == nullptr) refuse(library_path() + " has no " #name);
    OPENVINO_FUNCTIONS(LOAD)
#undef LOAD
    if (functions.ov_core_create(&functions.core) != OK) {
      refuse("its core cannot be created");
    }
    return functions;
  }();
  return loaded;
}

template <typename Error = flexmlrt::client::Exception>
void check(ov_status_e status, const char* what) {
  if (status != OK) {
    const char* text = api().ov_get_last_err_msg();
    throw Error(std::string("simulator: OpenVINO cannot ") + what + ": " + (text != nullptr ? text : "no reason given"));
  }
}

/// An owned handle of OpenVINO.
template <typename Handle>
using Owned = std::unique_ptr<Handle, void (*)(Handle*)>;

struct Element {
  ov_element_type_e type;
  const char* name;
  std::size_t bytes;
};
constexpr Element kElements[] = {
    {F32, "float32", 4}, {BF16, "bfloat16", 2}, {F16, "float16", 2}, {I64, "int64", 8},   {I32, "int32", 4},
    {I16, "int16", 2},   {I8, "int8", 1},       {U8, "uint8", 1},    {U16, "uint16", 2},
};

template <typename Found>
const Element& element(const char* what, Found matches) {
  for (const Element& each : kElements) {
    if (matches(each)) {
      return each;
    }
  }
  throw flexmlrt::client::LoaderException(std::string("simulator: unknown element type of ") + what);
}

Port describe(ov_output_const_port_t* raw) {
  const Owned<ov_output_const_port_t> port(raw, api().ov_output_const_port_free);
  char* name = nullptr;
  check(api().ov_port_get_any_name(port.get(), &name), "name a tensor");
  Port found;
  found.name = name;
  api().ov_free(name);
  ov_element_type_e type{};
  check(api().ov_port_get_element_type(port.get(), &type), "read a tensor's type");
  const Element& known = element(found.name.c_str(), [&](const Element& each) { return each.type == type; });
  found.type = known.name;
  ov_shape_t shape{};
  check(api().ov_const_port_get_shape(port.get(), &shape), "read a tensor's shape");
  found.shape.assign(shape.dims, shape.dims + shape.rank);
  api().ov_shape_free(&shape);
  found.bytes = known.bytes;
  for (const auto size : found.shape) {
    found.bytes *= static_cast<std::size_t>(size);
  }
  return found;
}

Owned<ov_tensor_t> wrap(const Port& port, void* data) {
  ov_tensor_t* tensor = nullptr;
  auto dims = port.shape;
  const ov_shape_t shape{static_cast<std::int64_t>(dims.size()), dims.data()};
  const Element& known = element(port.name.c_str(), [&](const Element& each) { return each.name == port.type; });
  check(api().ov_tensor_create_from_host_ptr(known.type, shape, data, &tensor), "wrap a buffer");
  return {tensor, api().ov_tensor_free};
}

}  // namespace

void use_openvino(const std::string& library) { library_path() = library; }

struct Engine::Handles {
  Owned<ov_tensor_t> weights{nullptr, nullptr};
  Owned<ov_compiled_model_t> compiled{nullptr, nullptr};
  Owned<ov_infer_request_t> request{nullptr, nullptr};
};

Engine::Engine(const Container& container) : handles_(std::make_unique<Handles>()) {
  using flexmlrt::client::LoaderException;
  std::int64_t size = static_cast<std::int64_t>(container.weights_bytes);
  if (size > 0) {
    ov_tensor_t* weights = nullptr;
    // OpenVINO takes a pointer to what may be written, and only reads it: the file is mapped read-only.
    void* data = const_cast<std::uint8_t*>(container.weights);
    check<LoaderException>(api().ov_tensor_create_from_host_ptr(U8, ov_shape_t{1, &size}, data, &weights), "map weights");
    handles_->weights = {weights, api().ov_tensor_free};
  }
  ov_model_t* read = nullptr;
  check<LoaderException>(
      api().ov_core_read_model_from_memory_buffer(
          api().core, container.xml, container.xml_bytes, handles_->weights.get(), &read),
      "read the model");
  const Owned<ov_model_t> model(read, api().ov_model_free);
  std::size_t inputs = 0;
  std::size_t outputs = 0;
  check<LoaderException>(api().ov_model_inputs_size(model.get(), &inputs), "count inputs");
  check<LoaderException>(api().ov_model_outputs_size(model.get(), &outputs), "count outputs");
  for (std::size_t i = 0; i < inputs; ++i) {
    ov_output_const_port_t* port = nullptr;
    check<LoaderException>(api().ov_model_const_input_by_index(model.get(), i, &port), "find an input");
    inputs_.push_back(describe(port));
  }
  for (std::size_t i = 0; i < outputs; ++i) {
    ov_output_const_port_t* port = nullptr;
    check<LoaderException>(api().ov_model_const_output_by_index(model.get(), i, &port), "find an output");
    outputs_.push_back(describe(port));
  }
  ov_compiled_model_t* compiled = nullptr;
  // Snippets, which fuse operators, have computed some bfloat16 attention wrongly in some releases.
  check<LoaderException>(
      api().ov_core_compile_model(
          api().core, model.get(), "CPU", 6, &compiled, "INFERENCE_PRECISION_HINT",
          container.bfloat16 ? "bf16" : "f32", "PERFORMANCE_HINT", "LATENCY", "SNIPPETS_MODE", "DISABLE"),
      "compile the model");
  handles_->compiled = {compiled, api().ov_compiled_model_free};
  char* precision = nullptr;
  check<LoaderException>(
      api().ov_compiled_model_get_property(compiled, "INFERENCE_PRECISION_HINT", &precision), "tell its precision");
  const bool as_asked = std::string(precision) == (container.bfloat16 ? "bf16" : "f32");
  api().ov_free(precision);
  if (!as_asked) {
    throw LoaderException(
        "simulator: this processor does not compute in bfloat16; make the artifact with --precision float32");
  }
  ov_infer_request_t* request = nullptr;
  check<LoaderException>(api().ov_compiled_model_create_infer_request(compiled, &request), "create a request");
  handles_->request = {request, api().ov_infer_request_free};
}

Engine::~Engine() = default;

void Engine::infer(const std::vector<void*>& inputs, const std::vector<void*>& outputs) {
  std::vector<Owned<ov_tensor_t>> bound;
  const auto bind = [&](const Port& port, void* data) {
    bound.push_back(wrap(port, data));
    check(api().ov_infer_request_set_tensor(handles_->request.get(), port.name.c_str(), bound.back().get()), "bind");
  };
  for (std::size_t i = 0; i < inputs_.size(); ++i) {
    bind(inputs_[i], inputs.at(i));
  }
  for (std::size_t i = 0; i < outputs_.size(); ++i) {
    bind(outputs_[i], outputs.at(i));
  }
  check(api().ov_infer_request_infer(handles_->request.get()), "infer");
}

}  // namespace simulator
