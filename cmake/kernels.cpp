// The one copy of the kernels that Nibble's own tests, examples and benchmarks link.
#include <nibble/kernels/dispatch.hpp>
