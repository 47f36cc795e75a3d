# What Nibble's own tests, examples and benchmarks are compiled with. Users of nibble::nibble see none of it.
option(NIBBLE_WERROR "Treat warnings in Nibble's own programs as errors" OFF)
set(NIBBLE_SANITIZE "" CACHE STRING "Sanitizers for Nibble's own programs: 'address,undefined' or 'thread'")

add_library(nibble_flags INTERFACE)
target_link_libraries(nibble_flags INTERFACE nibble::nibble)
target_compile_options(nibble_flags INTERFACE -Wall -Wextra -Wconversion -Wshadow)
if(CMAKE_CXX_COMPILER_ID MATCHES "Clang")
  # Part of Clang's -Wconversion and not of GCC's. The headers are checked with it (tests/house), the tests need not be.
  target_compile_options(nibble_flags INTERFACE -Wno-sign-conversion)
endif()
if(NIBBLE_WERROR)
  target_compile_options(nibble_flags INTERFACE -Werror)
  if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
    # GCC 12's optimizer takes inlined standard containers for overflowing (GCC bug 105329 and its like) and the undefined
    # vectors in its own intrinsics for uninitialized: shown, but no error.
    target_compile_options(nibble_flags INTERFACE -Wno-error=stringop-overflow -Wno-error=array-bounds
                                          -Wno-error=restrict -Wno-error=maybe-uninitialized
                                          -Wno-error=uninitialized)
  endif()
endif()
if(NIBBLE_SANITIZE)
  # A finding ends the program, so that no test can pass over it.
  target_compile_options(nibble_flags INTERFACE -fsanitize=${NIBBLE_SANITIZE} -fno-sanitize-recover=all
                                                -fno-omit-frame-pointer -g1)
  target_link_options(nibble_flags INTERFACE -fsanitize=${NIBBLE_SANITIZE})
endif()

# The kernels are compiled once for all of these programs (dispatch.hpp); the consumer tests use them header-only.
add_library(nibble_kernels STATIC "${CMAKE_CURRENT_LIST_DIR}/kernels.cpp")
target_link_libraries(nibble_kernels PRIVATE nibble_flags)
target_compile_definitions(nibble_kernels PUBLIC NIBBLE_EXTERN_KERNELS PRIVATE NIBBLE_DEFINE_KERNELS)
add_library(nibble_development INTERFACE)
target_link_libraries(nibble_development INTERFACE nibble_flags nibble_kernels)

# Optional packages: JSON for safetensors, CLI11 for the nibble program.
find_package(nlohmann_json QUIET)
find_package(CLI11 QUIET)
