// Umbrella: everything that needs Eigen and the standard library alone.
#pragma once

#include "nibble/core/abi.hpp"
#include "nibble/core/buffer.hpp"
#include "nibble/core/error.hpp"
#include "nibble/core/fp_env.hpp"
#include "nibble/formats/format.hpp"
