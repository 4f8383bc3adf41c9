#include "script.h"

#include <FlexMLClient.h>

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <initializer_list>

namespace simulator {

namespace {

const std::string& one_of(const std::string& key, const std::string& value, std::initializer_list<const char*> known) {
  if (std::find(known.begin(), known.end(), value) == known.end()) {
    throw flexmlrt::client::Exception("simulator script: " + key + " knows no '" + value + "'");
  }
  return value;
}

}  // namespace

Script read_script() {
  Script script;
  const char* path = std::getenv("FLEXMLRT_SIMULATOR_SCRIPT");
  if (path == nullptr || *path == '\0') {
    return script;
  }
  std::ifstream file(path);
  if (!file) {
    throw flexmlrt::client::Exception("simulator script: cannot read " + std::string(path));
  }
  std::string key;
  std::string value;
  while (file >> key >> value) {
    if (key == "latency_ms") {
      script.latency_ms = std::strtol(value.c_str(), nullptr, 10);
    } else if (key == "constructor") {
      script.constructor = one_of(key, value, {"ok", "throw", "bad", "hang", "abort"});
    } else if (key == "forward") {
      script.forward = one_of(
          key, value, {"ok", "throw", "status", "nan", "zeros", "unwritten", "partial", "hang", "abort", "segv"});
    } else if (key == "at") {
      script.at = std::strtol(value.c_str(), nullptr, 10);
    } else if (key == "order") {
      script.shuffled = one_of(key, value, {"graph", "shuffled"}) == "shuffled";
    } else if (key == "second") {
      script.second_spoils = one_of(key, value, {"ok", "nan"}) == "nan";
    } else if (key == "print") {
      script.print = value;
    } else {
      throw flexmlrt::client::Exception("simulator script: unknown key '" + key + "'");
    }
  }
  return script;
}

}  // namespace simulator
