// Umbrella: training, quantization-aware and through quantized weights.
#pragma once

#include "nibble/train/attention.hpp"
#include "nibble/train/cross_entropy.hpp"
#include "nibble/train/dropout.hpp"
#include "nibble/train/embedding.hpp"
#include "nibble/train/linear.hpp"
#include "nibble/train/linear_layer.hpp"
#include "nibble/train/loftq.hpp"
#include "nibble/train/lora.hpp"
#include "nibble/train/low_rank.hpp"
#include "nibble/train/merge.hpp"
#include "nibble/train/optimizer.hpp"
#include "nibble/train/options.hpp"
#include "nibble/train/parameters.hpp"
#include "nibble/train/rms_norm.hpp"
#include "nibble/train/schedule.hpp"
#include "nibble/train/swiglu.hpp"
