// The Python module over the bridge. Built once against the simulator as `_simulator`, and where AMD's SDK is found
// once more against it as `_sdk`; the two differ in name and in what they are linked to.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bridge.h"
#include "output_pool.h"
#ifdef VISIONACCEL_SIMULATOR
#include "engine.h"
#include "simulator.h"
#endif

namespace py = pybind11;

namespace visionaccel {

namespace {

/// Buffers of one call that go back to their pools unless Python gets them.
class Taken {
 public:
  ~Taken() {
    for (auto& [pool, buffer] : buffers_) {
      pool->give_back(buffer);
    }
  }
  Taken() = default;
  Taken(const Taken&) = delete;
  Taken& operator=(const Taken&) = delete;

  void* take(const std::shared_ptr<OutputPool>& pool) {
    buffers_.emplace_back(pool, pool->take());
    return buffers_.back().second;
  }

  /// Arrays over the buffers, each of which gives its buffer back to its pool when it is garbage.
  py::list as_arrays(const std::vector<TensorSpec>& specs, const std::vector<py::dtype>& dtypes) {
    struct Lease {
      std::shared_ptr<OutputPool> pool;
      void* buffer;
    };
    py::list arrays;
    // From the last, so that what is left when something fails is what this object still gives back.
    for (std::size_t i = buffers_.size(); i-- > 0;) {
      auto lease = std::make_unique<Lease>(Lease{buffers_[i].first, buffers_[i].second});
      const py::capsule owner(lease.get(), [](void* held) {
        const std::unique_ptr<Lease> ended(static_cast<Lease*>(held));
        ended->pool->give_back(ended->buffer);
      });
      lease.release();
      void* buffer = buffers_[i].second;
      buffers_.pop_back();
      arrays.insert(0, py::array(dtypes[i], specs[i].shape, buffer, owner));
    }
    return arrays;
  }

 private:
  std::vector<std::pair<std::shared_ptr<OutputPool>, void*>> buffers_;
};

using Tensor = std::tuple<std::string, std::string, std::vector<std::int64_t>>;

std::vector<TensorSpec> specs_of(const std::vector<Tensor>& tensors) {
  std::vector<TensorSpec> specs;
  for (const auto& [name, dtype, shape] : tensors) {
    specs.push_back({name, dtype, shape});
  }
  return specs;
}

/// numpy's dtype; bfloat16 comes from ml_dtypes, which numpy knows by name only once that is imported.
py::dtype numpy_dtype(const std::string& name) {
  if (name == "bfloat16") {
    return py::dtype::from_args(py::module_::import("ml_dtypes").attr(name.c_str()));
  }
  return py::dtype(name);
}

/// Logs to Python's logger of this package; the calling thread need not hold the GIL.
void log(LogLevel level, const std::string& text) {
  const py::gil_scoped_acquire held;
  py::module_::import("logging").attr("getLogger")("visionaccel.flexmlrt").attr("log")(static_cast<int>(level), text);
}

class Model {
 public:
  Model(
      std::string path, bool single_file, const std::vector<Tensor>& inputs, const std::vector<Tensor>& outputs,
      std::string device_name, std::string subgraph, std::string cache_dir, std::uint32_t execute_mode,
      std::optional<bool> preemption) {
    OpenOptions options;
    options.path = std::move(path);
    options.single_file = single_file;
    options.device_name = std::move(device_name);
    options.subgraph = std::move(subgraph);
    options.cache_dir = std::move(cache_dir);
    options.execute_mode = execute_mode;
    options.preemption = preemption;
    auto ins = specs_of(inputs);
    auto outs = specs_of(outputs);
    for (const auto& spec : ins) {
      input_dtypes_.push_back(numpy_dtype(spec.dtype));
    }
    for (const auto& spec : outs) {
      output_dtypes_.push_back(numpy_dtype(spec.dtype));
      pools_.push_back(OutputPool::create(spec.bytes()));
    }
    const py::gil_scoped_release released;
    bridge_ = std::make_unique<Bridge>(options, std::move(ins), std::move(outs), log);
  }

  ~Model() { close(); }
  Model(const Model&) = delete;
  Model& operator=(const Model&) = delete;

  py::list run(const std::vector<py::array>& inputs) {
    bridge_->check_process();  // before a buffer is taken from a pool whose thread a fork does not have
    const auto& specs = bridge_->inputs();
    if (inputs.size() != specs.size()) {
      throw py::value_error("expected " + std::to_string(specs.size()) + " inputs");
    }
    std::vector<const void*> given;
    for (std::size_t i = 0; i < specs.size(); ++i) {
      check(inputs[i], specs[i], input_dtypes_[i]);
      given.push_back(inputs[i].data());
    }
    Taken outputs;
    {
      const py::gil_scoped_release released;
      std::vector<void*> buffers;
      for (const auto& pool : pools_) {
        buffers.push_back(outputs.take(pool));
      }
      bridge_->run(given, buffers);
    }
    return outputs.as_arrays(bridge_->outputs(), output_dtypes_);
  }

  void close() {
    const py::gil_scoped_release released;
    if (bridge_ != nullptr) {
      bridge_->close();
    }
  }

 private:
  static void check(const py::array& array, const TensorSpec& spec, const py::dtype& dtype) {
    const std::vector<std::int64_t> shape(array.shape(), array.shape() + array.ndim());
    if (shape != spec.shape || !array.dtype().equal(dtype)) {
      throw py::value_error("expected " + spec.text());
    }
    if ((array.flags() & py::array::c_style) == 0) {
      throw py::value_error("expected " + spec.name + " as a C-contiguous array");
    }
  }

  std::vector<py::dtype> input_dtypes_;
  std::vector<py::dtype> output_dtypes_;
  std::vector<std::shared_ptr<OutputPool>> pools_;
  std::unique_ptr<Bridge> bridge_;
};

}  // namespace

}  // namespace visionaccel

PYBIND11_MODULE(VISIONACCEL_MODULE, module) {
  using namespace visionaccel;
  module.doc() = "FlexMLRT models, behind visionaccel_flexmlrt.";
  py::register_local_exception<BridgeError>(module, "BridgeError", PyExc_RuntimeError).doc() =
      "The SDK refused or failed; its own text is in the message.";
  py::class_<Model>(
      module, "Model", py::module_local(),
      "A model on the device. Tensors are (name, dtype, shape); a single file is a `.rai` file, otherwise `path` is the\n"
      "folder of a partition. Raises BridgeError. The GIL is released while the device works.")
      .def(
          py::init<
              std::string, bool, const std::vector<Tensor>&, const std::vector<Tensor>&, std::string, std::string,
              std::string, std::uint32_t, std::optional<bool>>(),
          py::kw_only(), py::arg("path"), py::arg("single_file"), py::arg("inputs"), py::arg("outputs"),
          py::arg("device_name"), py::arg("subgraph"), py::arg("cache_dir"), py::arg("execute_mode"),
          py::arg("preemption"))
      .def(
          "run", &Model::run, py::arg("inputs"),
          "Run once. Takes C-contiguous arrays of exactly the declared dtypes and shapes, in their order; returns fresh\n"
          "arrays. What the device left unwritten has all bits set. Raises ValueError for other arrays.")
      .def("close", &Model::close, "Give the model back; waits for a run in progress. May be called again.");
  module.attr("features") = sdk_features();
#ifdef VISIONACCEL_SDK_VERSION
  module.attr("sdk_version") = VISIONACCEL_SDK_VERSION;
#endif
#ifdef VISIONACCEL_SIMULATOR
  module.def("use_openvino", &simulator::use_openvino, py::arg("library"), "Where OpenVINO's C library lies.");
  module.def("last_forward_seconds", &simulator::last_forward_seconds, "Seconds that the last run computed.");
#endif
}
