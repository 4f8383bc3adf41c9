// doctest itself, compiled once for the tests of all generations.
#define DOCTEST_CONFIG_IMPLEMENT
#include <doctest/doctest.h>
