# Finds AMD's FlexMLRT SDK: by its own CMake package, below FLEXMLRT_ROOT, or by FLEXMLRT_INCLUDE_DIR and
# FLEXMLRT_LIB_DIR. Sets FLEXMLRT_FOUND and FLEXMLRT_VERSION, and makes the target visionaccel_flexml_sdk.
#
# The library itself is needed on the machine that runs, not here: of one generation of the SDK the header opens it by
# itself, and where there is a library to link, the module looks for it when it is imported.

set(FLEXMLRT_FOUND FALSE)
set(FLEXMLRT_VERSION "unknown")

if(FLEXMLRT_INCLUDE_DIR)
  set(library_required ${FLEXMLRT_LIB_DIR})
else()
  find_package(FlexmlRT CONFIG QUIET
    HINTS "${FLEXMLRT_ROOT}" PATH_SUFFIXES share/cmake/FlexmlRT)
  if(FLEXMLRT_ROOT AND NOT TARGET flexmlrt::flexmlrt)
    find_path(FLEXMLRT_FOUND_INCLUDE_DIR FlexMLClient.h
      PATHS "${FLEXMLRT_ROOT}" PATH_SUFFIXES include include/flexmlrt flexmlrt/include NO_DEFAULT_PATH)
    if(NOT FLEXMLRT_FOUND_INCLUDE_DIR)
      message(FATAL_ERROR "FLEXMLRT_ROOT=${FLEXMLRT_ROOT} holds no FlexMLClient.h.")
    endif()
    set(FLEXMLRT_INCLUDE_DIR "${FLEXMLRT_FOUND_INCLUDE_DIR}")
    set(FLEXMLRT_LIB_DIR "${FLEXMLRT_ROOT}/lib")
  endif()
endif()

if(TARGET flexmlrt::flexmlrt)
  set(FLEXMLRT_FOUND TRUE)
  get_target_property(FLEXMLRT_INCLUDE_DIR flexmlrt::flexmlrt INTERFACE_INCLUDE_DIRECTORIES)
  add_library(visionaccel_flexml_sdk INTERFACE)
  target_link_libraries(visionaccel_flexml_sdk INTERFACE flexmlrt::flexmlrt)
  if(NOT FLEXMLRT_ROOT)
    get_filename_component(FLEXMLRT_ROOT "${FlexmlRT_DIR}/../../.." ABSOLUTE)
  endif()
elseif(FLEXMLRT_INCLUDE_DIR)
  if(NOT EXISTS "${FLEXMLRT_INCLUDE_DIR}/FlexMLClient.h")
    message(FATAL_ERROR "FLEXMLRT_INCLUDE_DIR=${FLEXMLRT_INCLUDE_DIR} holds no FlexMLClient.h.")
  endif()
  set(FLEXMLRT_FOUND TRUE)
  add_library(visionaccel_flexml_sdk INTERFACE)
  target_include_directories(visionaccel_flexml_sdk SYSTEM INTERFACE "${FLEXMLRT_INCLUDE_DIR}")
  target_link_libraries(visionaccel_flexml_sdk INTERFACE ${CMAKE_DL_LIBS} Threads::Threads)
  find_library(FLEXMLRT_LIBRARY flexmlrt PATHS "${FLEXMLRT_LIB_DIR}" NO_DEFAULT_PATH)
  if(FLEXMLRT_LIBRARY)
    target_link_libraries(visionaccel_flexml_sdk INTERFACE "${FLEXMLRT_LIBRARY}")
  elseif(library_required)
    message(FATAL_ERROR "FLEXMLRT_LIB_DIR=${FLEXMLRT_LIB_DIR} holds no libflexmlrt.")
  endif()
endif()

if(FLEXMLRT_FOUND)
  # The SDK states its version in Python: VERSION = "x.y.z".
  foreach(folder "${FLEXMLRT_ROOT}" "${FLEXMLRT_INCLUDE_DIR}/..")
    if(EXISTS "${folder}/__init__.py")
      file(STRINGS "${folder}/__init__.py" line REGEX "^VERSION *=" LIMIT_COUNT 1)
      if(line MATCHES "[\"']([^\"']+)[\"']")
        set(FLEXMLRT_VERSION "${CMAKE_MATCH_1}")
      endif()
      break()
    endif()
  endforeach()
  flexml_features(FLEXMLRT_SDK_FEATURES "${FLEXMLRT_INCLUDE_DIR}" "")
  target_compile_definitions(visionaccel_flexml_sdk INTERFACE ${FLEXMLRT_SDK_FEATURES})
endif()
