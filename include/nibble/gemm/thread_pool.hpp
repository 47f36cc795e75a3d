// The thread pool under the name that it had among the products.
#pragma once

#include "nibble/core/thread_pool.hpp"
