# Component `cpu`: ATen, tied to the minor version of the torch it is built with.
#
# csrc/cpu/*.cpp is compiled once. csrc/cpu/kernels/*.cpp is compiled once per CPU capability, as
# ATen compiles its own kernels, so that one library serves every machine and picks at run time.

set(capabilities DEFAULT)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  list(APPEND capabilities AVX2 AVX512)
endif()
set(flags_DEFAULT "")
set(flags_AVX2 -mavx2 -mfma -mf16c)
set(flags_AVX512 -mavx512f -mavx512dq -mavx512vl -mavx512bw -mfma -mf16c)

function(add_cpu_objects target)
  add_library(${target} OBJECT ${ARGN})
  target_include_directories(${target} PRIVATE "${PROJECT_SOURCE_DIR}/csrc")
  target_include_directories(${target} SYSTEM PRIVATE "${TORCH_INCLUDES}")
  # -fopenmp for the compile only: at::parallel_for is serial without it, and without it at the link
  # the calls resolve to the OpenMP library inside torch, so that one runtime is in the process.
  target_compile_options(${target} PRIVATE -Wall -Wextra -fno-math-errno -fopenmp)
endfunction()

file(GLOB common_sources CONFIGURE_DEPENDS "${PROJECT_SOURCE_DIR}/csrc/cpu/*.cpp")
file(GLOB kernel_sources CONFIGURE_DEPENDS "${PROJECT_SOURCE_DIR}/csrc/cpu/kernels/*.cpp")
# Compiled in this order: what takes longest comes first, so that no processor waits for it alone.
list(REVERSE capabilities)
list(SORT kernel_sources ORDER DESCENDING)
set(objects "")
if(kernel_sources)
  foreach(capability IN LISTS capabilities)
    add_cpu_objects(cpu_${capability} ${kernel_sources})
    # GCC takes the deliberately undefined registers of its own intrinsics headers for mistakes.
    target_compile_options(cpu_${capability} PRIVATE
      ${flags_${capability}} -Wno-uninitialized -Wno-maybe-uninitialized -Wno-psabi)
    target_compile_definitions(cpu_${capability} PRIVATE
      CPU_CAPABILITY=${capability} CPU_CAPABILITY_${capability})
    list(PREPEND objects $<TARGET_OBJECTS:cpu_${capability}>)
  endforeach()
endif()
list(REVERSE capabilities)
add_cpu_objects(cpu_common ${common_sources})
list(PREPEND objects $<TARGET_OBJECTS:cpu_common>)

# The order of the objects matters: of an inline function that several of them emit the linker keeps
# the first, and code for AVX512 must never serve an object of a lesser capability.
find_library(C10_LIBRARY c10 PATHS "${VIDEO_ATTN_TORCH_DIR}/lib" NO_DEFAULT_PATH REQUIRED)
add_library(_cpu MODULE ${objects})
set_target_properties(_cpu PROPERTIES
  PREFIX "" SUFFIX ".so" LINKER_LANGUAGE CXX SKIP_BUILD_RPATH ON)
target_link_libraries(_cpu PRIVATE "${TORCH_CPU_LIBRARY}" "${C10_LIBRARY}")

file(WRITE "${CMAKE_BINARY_DIR}/architectures.txt" "${capabilities}")
