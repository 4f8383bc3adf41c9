#include "container.h"

#include <FlexMLClient.h>

#include <cstring>

namespace simulator {

namespace {

constexpr char kMagic[8] = {'V', 'A', 'S', 'I', 'M', 'R', 'A', 'I'};
constexpr std::size_t kHeaderBytes = 48;
constexpr std::size_t kAlignment = 4096;

template <typename Number>
Number read(const std::uint8_t* data, std::size_t offset) {
  Number number;
  std::memcpy(&number, data + offset, sizeof number);
  return number;
}

bool inside(std::uint64_t offset, std::uint64_t length, std::size_t bytes) {
  return offset >= kHeaderBytes && offset <= bytes && length <= bytes - offset;
}

}  // namespace

Container Container::view(const std::uint8_t* data, std::size_t bytes) {
  if (data == nullptr || bytes < kHeaderBytes || std::memcmp(data, kMagic, sizeof kMagic) != 0) {
    throw flexmlrt::client::LoaderException("not an artifact of the FlexMLRT simulator");
  }
  if (read<std::uint32_t>(data, 8) != 1 || read<std::uint32_t>(data, 12) > 1) {
    throw flexmlrt::client::LoaderException("a simulated artifact of an unknown version");
  }
  const auto xml = read<std::uint64_t>(data, 16);
  const auto xml_bytes = read<std::uint64_t>(data, 24);
  const auto weights = read<std::uint64_t>(data, 32);
  const auto weights_bytes = read<std::uint64_t>(data, 40);
  if (!inside(xml, xml_bytes, bytes) || !inside(weights, weights_bytes, bytes) || weights % kAlignment != 0) {
    throw flexmlrt::client::LoaderException("a truncated or damaged simulated artifact");
  }
  Container container;
  container.bfloat16 = read<std::uint32_t>(data, 12) == 1;
  container.xml = reinterpret_cast<const char*>(data) + xml;
  container.xml_bytes = xml_bytes;
  container.weights = data + weights;
  container.weights_bytes = weights_bytes;
  return container;
}

}  // namespace simulator
