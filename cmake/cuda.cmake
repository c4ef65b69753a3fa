# Components `sta`, `vsa`, `sage`: CUDA kernels behind torch's stable ABI, one library for every
# torch since 2.10. Only csrc/bindings includes torch, and it only implements operators.
#
# Sources of component X: csrc/bindings/X*.cpp, and the kernels csrc/hopper/X*.cu (csrc/sage/*.cu
# for sage).

set(VIDEO_ATTN_CUDA_ARCHS "" CACHE STRING "CUDA architectures, e.g. 90a")
set(VIDEO_ATTN_THUNDERKITTENS_DIR "" CACHE PATH "Checkout of ThunderKittens, for sta and vsa")
set(CMAKE_CUDA_HOST_COMPILER "${CMAKE_CXX_COMPILER}")
set(CMAKE_CUDA_ARCHITECTURES OFF) # each target says its own
enable_language(CUDA)
find_package(CUDAToolkit REQUIRED)

if(VIDEO_ATTN_COMPONENT STREQUAL "sage")
  set(kernel_pattern "${PROJECT_SOURCE_DIR}/csrc/sage/*.cu")
else()
  set(kernel_pattern "${PROJECT_SOURCE_DIR}/csrc/hopper/${VIDEO_ATTN_COMPONENT}*.cu")
endif()
file(GLOB sources CONFIGURE_DEPENDS
  "${PROJECT_SOURCE_DIR}/csrc/bindings/${VIDEO_ATTN_COMPONENT}*.cpp" ${kernel_pattern})
# Compiled in this order: kernels first, and of sage its quantizers, which take longest.
list(SORT sources ORDER DESCENDING)

# Code for 90a runs on compute capability 9.0 only, so PTX beside it would serve no other chip.
set(archs "")
foreach(arch IN LISTS VIDEO_ATTN_CUDA_ARCHS)
  if(arch MATCHES "a$")
    list(APPEND archs "${arch}-real")
  else()
    list(APPEND archs "${arch}")
  endif()
endforeach()

# The compilers are told the language below. CMake before 3.25.2 knows no CUDA C++20, which a target
# takes over from its C++: it drops it without a word, or refuses.
unset(CMAKE_CXX_STANDARD)
unset(CMAKE_CXX_STANDARD_REQUIRED)
unset(CMAKE_CXX_EXTENSIONS)

set(component _${VIDEO_ATTN_COMPONENT})
add_library(${component} MODULE ${sources})
# The static CUDA runtime keeps libcudart and libcuda out of the library's needs, so that it loads,
# and is tested, on machines without a GPU.
set_target_properties(${component} PROPERTIES
  PREFIX "" SUFFIX ".so" SKIP_BUILD_RPATH ON
  CUDA_ARCHITECTURES "${archs}" CUDA_RUNTIME_LIBRARY Static)
target_include_directories(${component} PRIVATE "${PROJECT_SOURCE_DIR}/csrc")
target_include_directories(${component} SYSTEM PRIVATE
  "${TORCH_INCLUDES}" ${CUDAToolkit_INCLUDE_DIRS})
# 0x020a is torch 2.10, the oldest torch the library loads under; any ATen include is an error.
target_compile_definitions(${component} PRIVATE
  TORCH_STABLE_ONLY TORCH_TARGET_VERSION=0x020a000000000000 USE_CUDA)
target_compile_options(${component} PRIVATE
  $<$<COMPILE_LANGUAGE:CUDA>:-std=c++20 --extended-lambda --expt-relaxed-constexpr>
  $<$<COMPILE_LANGUAGE:CXX>:-std=c++20 -Wall -Wextra>)
if(VIDEO_ATTN_THUNDERKITTENS_DIR)
  target_compile_definitions(${component} PRIVATE KITTENS_HOPPER)
  target_include_directories(${component} SYSTEM PRIVATE
    "${VIDEO_ATTN_THUNDERKITTENS_DIR}/include")
endif()
# Of torch's libraries only the CPU one, which every torch has. What is missing then is missing at
# run time too: a mistake of the build.
target_link_libraries(${component} PRIVATE "${TORCH_CPU_LIBRARY}")
target_link_options(${component} PRIVATE -Wl,--no-undefined)

file(WRITE "${CMAKE_BINARY_DIR}/architectures.txt" "${VIDEO_ATTN_CUDA_ARCHS}")
