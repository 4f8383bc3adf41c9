// What the simulated device is told to do wrong.
#pragma once

#include <string>

namespace simulator {

/// The faults of one call, read from the file that the environment variable FLEXMLRT_SIMULATOR_SCRIPT names.
///
/// The file has lines `key value`; what it leaves out is as on a good device. It is read again at every construction
/// and every forward(), so that a fault can be switched on and off while a model is open.
///
/// | key         | value                                                                                     |
/// |-------------|-------------------------------------------------------------------------------------------|
/// | latency_ms  | milliseconds that forward() sleeps beside its computation                                   |
/// | constructor | throw, bad (good() is false), hang, abort                                                   |
/// | forward     | throw, status, nan, zeros, unwritten (no output), partial (the last row), hang, abort, segv |
/// | at          | number of the one forward() of a model that the fault is for, from 1                        |
/// | order       | shuffled: getIOTensors() returns inputs and outputs in another order                        |
/// | second      | nan: a second model in the process spoils the output of the first, as on real devices       |
/// | print       | a word that is printed on stdout and stderr                                                 |
struct Script {
  long latency_ms = 0;
  std::string constructor = "ok";
  std::string forward = "ok";
  long at = 0;
  bool shuffled = false;
  bool second_spoils = false;
  std::string print;
};

/// The script as it is now. Throws flexmlrt::client::Exception for a key or value that it does not know: a test whose
/// fault is misspelt must not pass.
Script read_script();

}  // namespace simulator
