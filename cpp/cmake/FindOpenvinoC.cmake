# Finds the headers of OpenVINO's C interface, in the Python package of that name or where CMake looks by itself. The
# simulator needs no more of OpenVINO to build: it loads the library when a model is opened.

set(hint "")
if(Python_EXECUTABLE)
  execute_process(
    COMMAND "${Python_EXECUTABLE}" -c
      "import importlib.util as u; s = u.find_spec('openvino'); print(s.submodule_search_locations[0] if s else '')"
    OUTPUT_VARIABLE hint OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
endif()
find_path(OPENVINO_C_INCLUDE_DIR openvino/c/openvino.h HINTS "${hint}/include")

# The package has the library under its versioned name only; the tests load it by its path.
file(GLOB OPENVINO_C_LIBRARY "${hint}/libs/libopenvino_c.so*")
