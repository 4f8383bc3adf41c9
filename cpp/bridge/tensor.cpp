#include "tensor.h"

#include <algorithm>
#include <limits>
#include <sstream>

#include "errors.h"

namespace visionaccel {

namespace {

struct Dtype {
  const char* name;
  const char* type;
  std::size_t bytes;
};
constexpr Dtype kDtypes[] = {
    {"float32", "float32", 4}, {"bfloat16", "bfloat16", 2}, {"float16", "float16", 2}, {"int64", "int64", 8},
    {"int32", "int32", 4},     {"uint32", "uint32", 4},     {"int16", "int16", 2},     {"uint16", "uint16", 2},
    {"int8", "int8", 1},       {"uint8", "uint8", 1},       {"bool", "int1", 1},
};

const Dtype& known(const TensorSpec& spec) {
  const auto* found =
      std::find_if(std::begin(kDtypes), std::end(kDtypes), [&](const Dtype& each) { return each.name == spec.dtype; });
  if (found == std::end(kDtypes)) {
    throw BridgeError("tensor " + spec.text() + " has a dtype that FlexMLRT does not know");
  }
  return *found;
}

}  // namespace

std::size_t TensorSpec::bytes() const {
  std::size_t bytes = known(*this).bytes;
  for (const auto size : shape) {
    if (size <= 0 || bytes > std::numeric_limits<std::size_t>::max() / 2 / static_cast<std::size_t>(size)) {
      throw BridgeError("tensor " + text() + " has an impossible shape");
    }
    bytes *= static_cast<std::size_t>(size);
  }
  return bytes;
}

std::string TensorSpec::type() const { return known(*this).type; }

std::string TensorSpec::text() const {
  std::ostringstream text;
  text << name << ": " << dtype << '[';
  for (std::size_t i = 0; i < shape.size(); ++i) {
    text << (i == 0 ? "" : ", ") << shape[i];
  }
  text << ']';
  return text.str();
}

std::vector<std::int64_t> squeezed(const std::vector<std::int64_t>& shape) {
  std::vector<std::int64_t> kept;
  std::copy_if(shape.begin(), shape.end(), std::back_inserter(kept), [](std::int64_t size) { return size != 1; });
  return kept;
}

}  // namespace visionaccel
