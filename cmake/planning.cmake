# Component `planning`: a Python module with the host-side planning of the Hopper kernels. It needs a
# C++ compiler, Python's headers and those of pybind11, which torch brings along: no CUDA, no torch
# library. Its file name carries the tag of the interpreter it is for.

set(VIDEO_ATTN_PYTHON_INCLUDE "" CACHE PATH "Folder of Python.h")
set(VIDEO_ATTN_MODULE_SUFFIX "" CACHE STRING "How the module's file name ends")
foreach(header "${VIDEO_ATTN_PYTHON_INCLUDE}/Python.h" "${TORCH_INCLUDES}/pybind11/pybind11.h")
  if(NOT EXISTS "${header}")
    message(FATAL_ERROR "component planning: ${header} does not exist")
  endif()
endforeach()

add_library(_planning MODULE
  "${PROJECT_SOURCE_DIR}/csrc/bindings/planning.cpp" "${PROJECT_SOURCE_DIR}/csrc/hopper/plan.cpp")
set_target_properties(_planning PROPERTIES
  PREFIX "" SUFFIX "${VIDEO_ATTN_MODULE_SUFFIX}" SKIP_BUILD_RPATH ON)
target_compile_options(_planning PRIVATE -Wall -Wextra)
target_include_directories(_planning PRIVATE "${PROJECT_SOURCE_DIR}/csrc")
target_include_directories(_planning SYSTEM PRIVATE
  "${TORCH_INCLUDES}" "${VIDEO_ATTN_PYTHON_INCLUDE}")

file(WRITE "${CMAKE_BINARY_DIR}/architectures.txt" "host")
