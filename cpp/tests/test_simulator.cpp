#include <FlexMLClient.h>
#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <fstream>
#include <random>

#include "container.h"
#include "script.h"
#include "simulator.h"
#include "small_model.h"

namespace sdk = flexmlrt::client;

namespace {

sdk::Options options_of(const Workshop& workshop) {
  sdk::Options options;
  options.modelPath = workshop.directory().path;
  options.executeMode = 2;
#ifdef FLEXMLRT_HAS_SUBGRAPH_NAME
  options.subgraphName = "0";
#endif
  return options;
}

struct Call {
  std::array<float, 6> left{1, 2, 3, 4, 5, 6};
  std::array<float, 6> right{1, 1, 1, 2, 2, 2};
  std::array<float, 6> sum{};
  std::array<float, 6> product{};
  std::vector<sdk::ErtIoTypeNew> inputs;
  std::vector<sdk::ErtIoTypeNew> outputs;

  Call() {
    inputs = {tensor("left", left), tensor("right", right)};
    outputs = {tensor("sum", sum), tensor("product", product)};
  }

  static sdk::ErtIoTypeNew tensor(const char* name, std::array<float, 6>& values) {
    sdk::ErtIoTypeNew described;
    described.data = values.data();
    described.name = name;
    described.size = sizeof values;
    described.type = "float32";
    described.shape = {2, 3};
    return described;
  }

  void run(sdk::Model& model) {
    std::vector<sdk::ErtIoTypeNew> weights;
    static_cast<void>(model.forward(inputs, outputs, weights));
  }
};

}  // namespace

TEST_CASE("a second model in a process spoils the first one's output where the script says so") {
  const Workshop workshop;
  workshop.script("second nan");
  sdk::Model first(options_of(workshop));
  Call call;
  call.run(first);
  CHECK(call.sum[0] == 12);
  {
    sdk::Model second(options_of(workshop));
    Call other;
    other.run(second);
    CHECK(other.sum[0] == 12);
    call.run(first);
    CHECK(std::isnan(call.sum[0]));
  }
  call.run(first);
  CHECK(call.sum[0] == 12);
}

TEST_CASE("scripted outputs are as scripted, and only at the call that they are for") {
  const Workshop workshop;
  sdk::Model model(options_of(workshop));
  Call call;
  workshop.script("forward zeros\nat 2");
  call.run(model);
  CHECK(call.sum[5] == 38);
  call.run(model);
  CHECK(std::all_of(call.sum.begin(), call.sum.end(), [](float value) { return value == 0; }));
  call.run(model);
  CHECK(call.sum[5] == 38);
  workshop.script("forward nan");
  call.run(model);
  CHECK(std::isnan(call.product[3]));
  CHECK(simulator::last_forward_seconds() > 0);
}

TEST_CASE("wrong arguments are told apart as the SDK does") {
  const Workshop workshop;
  sdk::Model model(options_of(workshop));
  const auto text = [&](auto&& spoil) {
    Call call;
    spoil(call);
    try {
      call.run(model);
    } catch (const sdk::BadArgsException& error) {
      return std::string(error.what());
    }
    return std::string();
  };
  CHECK(text([](Call& call) { call.inputs[0].size = 4; }) == "model argument error: incompatible input shape");
  CHECK(text([](Call& call) { call.outputs[0].name = "x"; }) == "model argument error: incompatible output shape");
  CHECK(text([](Call& call) { call.inputs.pop_back(); }) == "model argument error: wrong number of inputs");
  CHECK(text([](Call& call) { call.outputs.pop_back(); }) == "model argument error: wrong number of outputs");
}

TEST_CASE("a script that is misspelt is an error, not a good device") {
  const Workshop workshop;
  for (const char* text : {"forwad throw", "forward thorw", "order any"}) {
    workshop.script(text);
    CHECK_THROWS_AS(simulator::read_script(), sdk::Exception);
  }
}

#ifdef FLEXMLRT_HAS_EXT_OPTIONS
TEST_CASE("options of another type than the SDK's are refused as by std::any") {
  const Workshop workshop;
  auto bytes = small_artifact();
  sdk::Options options = options_of(workshop);
  options.extOptions["fbs_buffer"] = bytes.data();
  options.extOptions["fbs_buffer_size"] = static_cast<int>(bytes.size());
  options.extOptions["cache_dir"] = std::string(".");
  CHECK_THROWS_AS(sdk::Model{options}, std::bad_any_cast);
}
#endif

TEST_CASE("a damaged container is refused, and never read beyond its end") {
  const auto whole = small_artifact();
  for (std::size_t length = 0; length < whole.size(); length += length < 64 ? 1 : 97) {
    const std::vector<std::uint8_t> cut(whole.begin(), whole.begin() + static_cast<std::ptrdiff_t>(length));
    CHECK_THROWS_AS(simulator::Container::view(cut.data(), cut.size()), sdk::LoaderException);
  }
  std::mt19937 random(1);
  for (int trial = 0; trial < 20000; ++trial) {
    auto changed = whole;
    for (int flips = 1 + trial % 4; flips > 0; --flips) {
      changed[random() % 48] = static_cast<std::uint8_t>(random());
    }
    try {
      const auto found = simulator::Container::view(changed.data(), changed.size());
      const auto* end = changed.data() + changed.size();
      CHECK(reinterpret_cast<const std::uint8_t*>(found.xml) + found.xml_bytes <= end);
      CHECK(found.weights + found.weights_bytes <= end);
    } catch (const sdk::LoaderException&) {
      continue;
    }
  }
}

TEST_CASE("a damaged artifact opens or is refused, wherever it is damaged") {
  const Workshop workshop;
  const auto whole = small_artifact();
  const auto path = std::filesystem::path(workshop.directory().path) / "simulator.rai";
  std::mt19937 random(2);
  int opened = 0;
  int refused = 0;
  for (int trial = 0; trial < 300; ++trial) {
    auto changed = whole;
    // The header, the model's text behind it, or any place, of which most are padding; a part that is cut off, too.
    const std::size_t end = trial % 3 == 0 ? 48 : trial % 3 == 1 ? 2500 : changed.size();
    for (int flips = 1 + trial % 3; flips > 0; --flips) {
      changed[random() % end] = static_cast<std::uint8_t>(random());
    }
    if (trial % 10 == 9) {
      changed.resize(random() % changed.size());
    }
    {
      std::ofstream file(path, std::ios::binary | std::ios::trunc);
      file.write(reinterpret_cast<const char*>(changed.data()), static_cast<std::streamsize>(changed.size()));
    }
    try {
      const sdk::Model model(options_of(workshop));
      ++opened;
    } catch (const sdk::Exception&) {
      ++refused;
    }
  }
  CHECK(opened > 10);
  CHECK(refused > 10);
}
