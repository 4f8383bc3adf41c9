# What a FlexMLRT header offers, found by compiling against it rather than from its version.

include(CheckCXXSourceCompiles)
include(CMakePushCheckState)

# flexml_features(<result variable> <include directories> <definitions> [<target>])
# Sets the variable to compile definitions such as FLEXMLRT_HAS_GOOD. The header is only compiled against, not linked.
# The target brings include directories and definitions of its own. Nothing is cached: another SDK may be there next time.
function(flexml_features result include_directories definitions)
  cmake_push_check_state(RESET)
  set(CMAKE_TRY_COMPILE_TARGET_TYPE STATIC_LIBRARY)
  set(CMAKE_REQUIRED_INCLUDES ${include_directories})
  set(CMAKE_REQUIRED_FLAGS "-std=c++17")
  set(CMAKE_REQUIRED_LIBRARIES ${ARGN})
  set(CMAKE_REQUIRED_QUIET ON)
  list(TRANSFORM definitions PREPEND "-D" OUTPUT_VARIABLE CMAKE_REQUIRED_DEFINITIONS)
  set(required
    "#include <FlexMLClient.h>
     void f(flexmlrt::client::Model& m, std::vector<flexmlrt::client::ErtIoTypeNew>& t) { m.forward(t, t, t); }")
  unset(${result}_USABLE CACHE)
  check_cxx_source_compiles("${required}" ${result}_USABLE)
  if(NOT ${result}_USABLE)
    message(FATAL_ERROR "FlexMLClient.h in ${include_directories} does not compile or has no Model::forward of "
      "ErtIoTypeNew; the reason is in CMakeFiles/CMakeConfigureLog.yaml or CMakeError.log of the build folder.")
  endif()
  set(found "")
  # A macro, and the source quoted at each step: in CMake a semicolon in an unquoted value makes a list of it.
  macro(look_for feature source)
    unset(${result}_HAS_${feature} CACHE)
    check_cxx_source_compiles("#include <FlexMLClient.h>\n#include <string>\n${source}" ${result}_HAS_${feature})
    if(${result}_HAS_${feature})
      list(APPEND found FLEXMLRT_HAS_${feature})
    endif()
  endmacro()
  look_for(GOOD "bool f(flexmlrt::client::Model& m) { return m.good(); }")
  # As the bridge uses it; of a header that has it in another form, the bridge does without.
  look_for(GET_IO_TENSORS "
    #include <type_traits>
    std::string f(flexmlrt::client::Model& m, const char* direction) {
      for (auto&& tensor : m.getIOTensors(direction, false)) {
        const auto& about = tensor.getMetadata();
        using Type = std::decay_t<decltype(about.type)>;
        for (Type type : {Type::Float32, Type::Int8, Type::UInt8, Type::Int16, Type::UInt16, Type::BFloat16, Type::Bool,
                          Type::Float16, Type::Int32, Type::UInt32}) {
          if (about.type == type && about.size > 0 && about.shape.begin() != about.shape.end()) return about.name;
        }
      }
      return std::string();
    }")
  look_for(SUBGRAPH_NAME "void f(flexmlrt::client::Options& o) { o.subgraphName = std::string(); }")
  look_for(EXT_OPTIONS "void f(flexmlrt::client::Options& o) { o.extOptions[std::string()] = std::string(); }")
  cmake_pop_check_state()
  message(STATUS "${result}: ${found}")
  set(${result} "${found}" PARENT_SCOPE)
endfunction()
