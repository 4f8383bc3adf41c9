#include "small_model.h"

#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <fstream>
#include <stdexcept>

namespace {

std::string port(int id, const std::string& rows, const std::string& names = "") {
  return "<port id=\"" + std::to_string(id) + "\" precision=\"FP32\"" +
         (names.empty() ? "" : " names=\"" + names + "\"") + "><dim>" + rows + "</dim><dim>3</dim></port>";
}

std::string layer(
    int id, const std::string& name, const std::string& type, const std::string& data, const std::string& inputs,
    const std::string& output) {
  return "<layer id=\"" + std::to_string(id) + "\" name=\"" + name + "\" type=\"" + type + "\" version=\"opset1\">" +
         data + (inputs.empty() ? "" : "<input>" + inputs + "</input>") +
         (output.empty() ? "" : "<output>" + output + "</output>") + "</layer>";
}

std::string edge(int from, int from_port, int to, int to_port) {
  return "<edge from-layer=\"" + std::to_string(from) + "\" from-port=\"" + std::to_string(from_port) +
         "\" to-layer=\"" + std::to_string(to) + "\" to-port=\"" + std::to_string(to_port) + "\"/>";
}

std::string xml() {
  const std::string parameter = "<data shape=\"2,3\" element_type=\"f32\"/>";
  const std::string constant = "<data element_type=\"f32\" shape=\"1,3\" offset=\"0\" size=\"12\"/>";
  const std::string broadcast = "<data auto_broadcast=\"numpy\"/>";
  const std::string two = port(0, "2") + port(1, "2");
  return "<?xml version=\"1.0\"?><net name=\"small\" version=\"11\"><layers>" +
         layer(0, "left", "Parameter", parameter, "", port(0, "2", "left")) +
         layer(1, "right", "Parameter", parameter, "", port(0, "2", "right")) +
         layer(2, "bias", "Const", constant, "", port(0, "1")) +
         layer(3, "added", "Add", broadcast, two, port(2, "2")) +
         layer(4, "sum", "Add", broadcast, port(0, "2") + port(1, "1"), port(2, "2", "sum")) +
         layer(5, "product", "Multiply", broadcast, two, port(2, "2", "product")) +
         layer(6, "sum/result", "Result", "", port(0, "2"), "") +
         layer(7, "product/result", "Result", "", port(0, "2"), "") + "</layers><edges>" + edge(0, 0, 3, 0) +
         edge(1, 0, 3, 1) + edge(3, 2, 4, 0) + edge(2, 0, 4, 1) + edge(0, 0, 5, 0) + edge(1, 0, 5, 1) +
         edge(4, 2, 6, 0) + edge(5, 2, 7, 0) + "</edges></net>";
}

template <typename Number>
void put(std::vector<std::uint8_t>& bytes, std::size_t offset, Number number) {
  std::memcpy(bytes.data() + offset, &number, sizeof number);
}

void write(const std::filesystem::path& path, const void* data, std::size_t bytes) {
  std::ofstream file(path, std::ios::binary | std::ios::trunc);
  file.write(static_cast<const char*>(data), static_cast<std::streamsize>(bytes));
  if (!file) {
    throw std::runtime_error("cannot write " + path.string());
  }
}

}  // namespace

std::vector<std::uint8_t> small_artifact() {
  const std::string text = xml();
  const float bias[] = {10, 20, 30};
  constexpr std::size_t kWeights = 8192;
  std::vector<std::uint8_t> bytes(kWeights + sizeof bias);
  std::memcpy(bytes.data(), "VASIMRAI", 8);
  put<std::uint32_t>(bytes, 8, 1);
  put<std::uint32_t>(bytes, 12, 0);
  put<std::uint64_t>(bytes, 16, 48);
  put<std::uint64_t>(bytes, 24, text.size());
  put<std::uint64_t>(bytes, 32, kWeights);
  put<std::uint64_t>(bytes, 40, sizeof bias);
  std::memcpy(bytes.data() + 48, text.data(), text.size());
  std::memcpy(bytes.data() + kWeights, bias, sizeof bias);
  return bytes;
}

std::vector<visionaccel::TensorSpec> small_inputs() {
  return {{"left", "float32", {2, 3}}, {"right", "float32", {2, 3}}};
}

std::vector<visionaccel::TensorSpec> small_outputs() {
  return {{"sum", "float32", {2, 3}}, {"product", "float32", {2, 3}}};
}

Workshop::Workshop() {
  std::string name = (std::filesystem::temp_directory_path() / "flexmlrt-XXXXXX").string();
  if (mkdtemp(name.data()) == nullptr) {
    throw std::runtime_error("no temporary folder");
  }
  folder = name;
  std::filesystem::create_directory(folder / "vaiml_par_0");
  const auto bytes = small_artifact();
  write(folder / "small.rai", bytes.data(), bytes.size());
  write(folder / "vaiml_par_0" / "simulator.rai", bytes.data(), bytes.size());
  setenv("FLEXMLRT_SIMULATOR_SCRIPT", (folder / "script").c_str(), 1);
  script("");
}

Workshop::~Workshop() {
  unsetenv("FLEXMLRT_SIMULATOR_SCRIPT");
  std::filesystem::remove_all(folder);
}

void Workshop::script(const std::string& text) const { write(folder / "script", text.data(), text.size()); }

visionaccel::OpenOptions Workshop::directory() const {
  visionaccel::OpenOptions options;
  options.path = (folder / "vaiml_par_0").string();
  options.single_file = false;
  options.device_name = "stx";
  options.subgraph = "0";
  return options;
}

visionaccel::OpenOptions Workshop::single_file() const {
  visionaccel::OpenOptions options;
  options.path = (folder / "small.rai").string();
  options.device_name = "stx";
  options.subgraph = "vaiml_par_0";
  options.cache_dir = folder.string();
  return options;
}

visionaccel::OpenOptions Workshop::options() const {
#ifdef FLEXMLRT_HAS_EXT_OPTIONS
  return single_file();
#else
  return directory();
#endif
}
