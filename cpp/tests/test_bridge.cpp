#include <doctest/doctest.h>

#include <array>
#include <atomic>
#include <cmath>
#include <cstring>
#include <fstream>
#include <thread>
#include <type_traits>

#include "bridge.h"
#include "output_pool.h"
#include "small_model.h"

using visionaccel::Bridge;
using visionaccel::BridgeError;
using visionaccel::LogLevel;
using visionaccel::OpenOptions;
using visionaccel::TensorSpec;

namespace {

using Values = std::array<float, 6>;

const Values kLeft{1, 2, 3, 4, 5, 6};
const Values kRight{1, 1, 1, 2, 2, 2};
const Values kSum{12, 23, 34, 16, 27, 38};
const Values kProduct{1, 2, 3, 8, 10, 12};

void quiet(LogLevel, const std::string&) {}

struct Answer {
  Values sum;
  Values product;
};

/// Runs with outputs whose every bit is set before.
Answer run(Bridge& bridge) {
  Answer answer;
  std::memset(&answer, 0xFF, sizeof answer);
  bridge.run({kLeft.data(), kRight.data()}, {answer.sum.data(), answer.product.data()});
  return answer;
}

std::string refusal(const OpenOptions& options, std::vector<TensorSpec> inputs, std::vector<TensorSpec> outputs) {
  try {
    const Bridge bridge(options, std::move(inputs), std::move(outputs), quiet);
  } catch (const BridgeError& error) {
    return error.what();
  }
  return "";
}

std::string failure(Bridge& bridge) {
  try {
    run(bridge);
  } catch (const BridgeError& error) {
    return error.what();
  }
  return "";
}

bool has(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

}  // namespace

static_assert(!std::is_copy_constructible_v<Bridge>, "the SDK's model does not survive to be copied");
static_assert(!std::is_copy_assignable_v<Bridge>);

TEST_CASE("a folder of a partition runs") {
  const Workshop workshop;
  Bridge bridge(workshop.directory(), small_inputs(), small_outputs(), quiet);
  const Answer answer = run(bridge);
  CHECK(answer.sum == kSum);
  CHECK(answer.product == kProduct);
}

TEST_CASE("a single file runs, or is refused where the SDK takes none") {
  const Workshop workshop;
#ifdef FLEXMLRT_HAS_EXT_OPTIONS
  Bridge bridge(workshop.single_file(), small_inputs(), small_outputs(), quiet);
  // Read once: the file may be rewritten, cut short or removed while the model computes from it.
  const std::filesystem::path file = workshop.single_file().path;
  std::ofstream(file, std::ios::in | std::ios::binary) << std::string(std::filesystem::file_size(file), 'x');
  CHECK(run(bridge).sum == kSum);
  std::filesystem::resize_file(file, 1);
  CHECK(run(bridge).sum == kSum);
  std::filesystem::remove(file);
  CHECK(run(bridge).sum == kSum);
#else
  CHECK(has(refusal(workshop.single_file(), small_inputs(), small_outputs()), "takes no .rai files"));
#endif
}

#ifdef FLEXMLRT_HAS_EXT_OPTIONS
TEST_CASE("a file that is missing, empty or something else is refused with its name") {
  const Workshop workshop;
  OpenOptions options = workshop.single_file();
  std::ofstream(workshop.folder / "empty.rai").flush();
  std::ofstream(workshop.folder / "foreign.rai") << std::string(10000, 'x');
  for (const char* name : {"absent.rai", "empty.rai", "foreign.rai", "vaiml_par_0"}) {
    options.path = (workshop.folder / name).string();
    CHECK(has(refusal(options, small_inputs(), small_outputs()), name));
  }
}
#endif

TEST_CASE("a folder that holds no model is refused with its name") {
  const Workshop workshop;
  OpenOptions options = workshop.directory();
  options.path = (workshop.folder / "absent").string();
  CHECK(has(refusal(options, small_inputs(), small_outputs()), "absent"));
}

TEST_CASE("tensors are bound by name whatever order the SDK and the caller have them in") {
  const Workshop workshop;
  for (const char* script : {"", "order shuffled"}) {
    workshop.script(script);
    Bridge bridge(
        workshop.options(), {small_inputs()[1], small_inputs()[0]}, {small_outputs()[1], small_outputs()[0]}, quiet);
    Values sum{};
    Values product{};
    bridge.run({kRight.data(), kLeft.data()}, {product.data(), sum.data()});
    CHECK(sum == kSum);
    CHECK(product == kProduct);
  }
}

TEST_CASE("tensors that are not the model's are refused, before or at the first run") {
  const Workshop workshop;
  const auto inputs = small_inputs();
  const std::vector<std::vector<TensorSpec>> wrong = {
      {inputs[0], {"other", "float32", {2, 3}}},
      {inputs[0], {"right", "int32", {2, 3}}},
      {inputs[0], {"right", "float32", {2, 4}}},
      {inputs[0]},
      {inputs[0], inputs[1], {"third", "float32", {1}}},
  };
  for (const auto& specs : wrong) {
#ifdef FLEXMLRT_HAS_GET_IO_TENSORS
    const std::string text = refusal(workshop.options(), specs, small_outputs());
    CHECK(has(text, "the model's inputs are: left: float32[2, 3]; right: float32[2, 3]"));
#else
    Bridge bridge(workshop.options(), specs, small_outputs(), quiet);
    std::vector<const void*> given(specs.size(), kLeft.data());
    Answer answer{};
    CHECK_THROWS_AS(bridge.run(given, {answer.sum.data(), answer.product.data()}), BridgeError);
#endif
  }
#ifdef FLEXMLRT_HAS_GET_IO_TENSORS
  // The same number of bytes in another shape is another tensor.
  CHECK(has(refusal(workshop.options(), {inputs[0], {"right", "float32", {3, 2}}}, small_outputs()), "[2, 3]"));
#endif
}

TEST_CASE("sizes of one do not make another shape") {
  const Workshop workshop;
  Bridge bridge(
      workshop.options(), {{"left", "float32", {1, 2, 3}}, {"right", "float32", {2, 1, 3, 1}}}, small_outputs(), quiet);
  CHECK(run(bridge).sum == kSum);
}

TEST_CASE("an impossible dtype or shape is refused") {
  const Workshop workshop;
  const auto with = [&](const TensorSpec& spec) { return refusal(workshop.options(), {spec}, small_outputs()); };
  CHECK(has(with({"left", "complex64", {2, 3}}), "complex64"));
  CHECK(has(with({"left", "float32", {2, -3}}), "impossible shape"));
  CHECK(has(with({"left", "float32", {std::int64_t{1} << 40, std::int64_t{1} << 40}}), "impossible shape"));
}

TEST_CASE("what the device leaves unwritten stays as it was") {
  const Workshop workshop;
  Bridge bridge(workshop.options(), small_inputs(), small_outputs(), quiet);
  workshop.script("forward unwritten");
  Answer answer = run(bridge);
  for (const float value : answer.sum) {
    CHECK(std::isnan(value));
  }
  workshop.script("forward partial");
  answer = run(bridge);
  CHECK(answer.sum[2] == kSum[2]);
  CHECK(std::isnan(answer.sum[3]));
  CHECK(std::isnan(answer.product[5]));
}

TEST_CASE("failures of the SDK are one exception with its text, and the model goes on") {
  const Workshop workshop;
  Bridge bridge(workshop.options(), small_inputs(), small_outputs(), quiet);
  workshop.script("forward throw");
  CHECK(has(failure(bridge), "DRM_IOCTL_AMDXDNA_EXEC_CMD failed"));
  workshop.script("forward status");
  CHECK(has(failure(bridge), "status 5"));
  workshop.script("");
  CHECK(run(bridge).sum == kSum);
}

TEST_CASE("a model that the SDK refuses is not opened, and the next one is") {
  const Workshop workshop;
  workshop.script("constructor throw");
  CHECK(has(refusal(workshop.options(), small_inputs(), small_outputs()), "the device refused the model"));
  workshop.script("constructor bad");
#ifdef FLEXMLRT_HAS_GOOD
  CHECK(has(refusal(workshop.options(), small_inputs(), small_outputs()), "not good()"));
#endif
  workshop.script("");
  Bridge bridge(workshop.options(), small_inputs(), small_outputs(), quiet);
  CHECK(run(bridge).sum == kSum);
}

TEST_CASE("a process has one model at a time, and is warned of a later one") {
  const Workshop workshop;
  std::vector<std::string> warnings;
  const auto keep = [&](LogLevel level, const std::string& text) {
    if (level == LogLevel::kWarning) {
      warnings.push_back(text);
    }
  };
  Bridge first(workshop.options(), small_inputs(), small_outputs(), keep);
  warnings.clear();
  CHECK(has(refusal(workshop.options(), small_inputs(), small_outputs()), "has a FlexMLRT model already"));
  first.close();
  Bridge second(workshop.options(), small_inputs(), small_outputs(), keep);
  CHECK(warnings.size() == 1);
  CHECK(run(second).sum == kSum);
}

TEST_CASE("a closed model says so, and may be closed again") {
  const Workshop workshop;
  Bridge bridge(workshop.options(), small_inputs(), small_outputs(), quiet);
  bridge.close();
  bridge.close();
  CHECK(has(failure(bridge), "is closed"));
}

TEST_CASE("calls from several threads are made one after another") {
  const Workshop workshop;
  Bridge bridge(workshop.options(), small_inputs(), small_outputs(), quiet);
  std::vector<std::thread> threads;
  std::atomic<int> right{0};
  for (int thread = 0; thread < 4; ++thread) {
    threads.emplace_back([&] {
      for (int call = 0; call < 50; ++call) {
        right += run(bridge).sum == kSum ? 1 : 0;
      }
    });
  }
  for (auto& thread : threads) {
    thread.join();
  }
  CHECK(right == 200);
}

TEST_CASE("buffers are handed out poisoned however often they come back") {
  constexpr std::size_t kBytes = 100000;
  visionaccel::OutputPool pool(kBytes);
  const std::vector<unsigned char> poison(kBytes, 0xFF);
  std::vector<std::thread> threads;
  std::atomic<int> poisoned{0};
  for (int thread = 0; thread < 4; ++thread) {
    threads.emplace_back([&] {
      for (int call = 0; call < 200; ++call) {
        void* buffer = pool.take();
        poisoned += std::memcmp(buffer, poison.data(), kBytes) == 0 ? 1 : 0;
        std::memset(buffer, call, kBytes);
        pool.give_back(buffer);
      }
    });
  }
  for (auto& thread : threads) {
    thread.join();
  }
  CHECK(poisoned == 800);
}
