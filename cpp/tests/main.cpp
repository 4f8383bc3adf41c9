#include <doctest/doctest.h>

#include "engine.h"

int main(int count, char** arguments) {
  simulator::use_openvino(VISIONACCEL_OPENVINO_LIBRARY);
  return doctest::Context(count, arguments).run();
}
