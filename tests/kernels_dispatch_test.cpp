// Dispatch: the best table that the machine runs, limited by NIBBLE_MAX_ISA, complete, and really used.
#include "nibble/kernels/dispatch.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <string>
#include <utility>
#include <vector>

namespace {

using nibble::all_isas;
using nibble::built_isas;
using nibble::InvalidArgument;
using nibble::Isa;
using nibble::Unsupported;
using nibble::detail::choose_isa;
using nibble::detail::CpuFeatures;
using nibble::detail::kernels_for;
using nibble::detail::KernelTable;

class MaxIsa : public ::testing::Test {
 protected:
  void SetUp() override {
    const char* value = std::getenv("NIBBLE_MAX_ISA");
    had_ = value != nullptr;
    if (had_) saved_ = value;
  }
  void TearDown() override {
    if (had_)
      setenv("NIBBLE_MAX_ISA", saved_.c_str(), 1);
    else
      unsetenv("NIBBLE_MAX_ISA");
  }

 private:
  bool had_ = false;
  std::string saved_;
};

TEST_F(MaxIsa, LimitsTheChoice) {
  unsetenv("NIBBLE_MAX_ISA");
  Isa best = Isa::scalar;
  for (Isa isa : built_isas)
    if (nibble::isa_available(isa)) best = isa;
  EXPECT_EQ(choose_isa(), best);
  Isa best_so_far = Isa::scalar;  // a CPU may have an ISA and lack one of those below it
  for (Isa isa : built_isas) {
    if (nibble::isa_available(isa)) best_so_far = isa;
    setenv("NIBBLE_MAX_ISA", std::string(name_of(isa)).c_str(), 1);
    EXPECT_EQ(choose_isa(), best_so_far) << name_of(isa);
  }
  setenv("NIBBLE_MAX_ISA", "", 1);
  EXPECT_EQ(choose_isa(), best);
}

TEST_F(MaxIsa, AnUnknownNameIsAnError) {
  for (const char* bad : {"avx3", "AVX2", " avx2", "scalar "}) {
    setenv("NIBBLE_MAX_ISA", bad, 1);
    EXPECT_THROW(choose_isa(), InvalidArgument) << bad;
  }
}

TEST_F(MaxIsa, AnIsaOfAnotherArchitectureIsAnError) {
  for (Isa isa : all_isas) {
    if (std::find(built_isas.begin(), built_isas.end(), isa) != built_isas.end()) continue;
    EXPECT_FALSE(nibble::isa_available(isa)) << name_of(isa);
    setenv("NIBBLE_MAX_ISA", std::string(name_of(isa)).c_str(), 1);
    EXPECT_THROW(choose_isa(), InvalidArgument) << name_of(isa);
  }
}

TEST(Isas, NamesAreUniqueAndRead) {
  for (std::size_t i = 0; i < all_isas.size(); ++i) {
    EXPECT_EQ(static_cast<std::size_t>(all_isas[i]), i);
    EXPECT_NE(name_of(all_isas[i]), "?");
    EXPECT_EQ(nibble::isa_from_name(name_of(all_isas[i])), all_isas[i]);
  }
  EXPECT_EQ(built_isas.front(), Isa::scalar);
  EXPECT_TRUE(std::is_sorted(built_isas.begin(), built_isas.end()));
}

TEST(Dispatch, TheActiveTableIsTheChosenOne) {
  EXPECT_EQ(nibble::active_isa(), choose_isa());
  EXPECT_EQ(&nibble::detail::kernels(), &kernels_for(nibble::active_isa()));
}

TEST(Dispatch, AnIsaBeyondTheMachineIsAnErrorNotASignal) {
  // Every feature that an ISA names must be there, whatever this machine has; what else there is does not count.
  using Feature = bool CpuFeatures::*;
  const std::vector<Feature> avx2 = {&CpuFeatures::avx2, &CpuFeatures::fma, &CpuFeatures::f16c};
  const auto with = [](std::vector<Feature> features, std::initializer_list<Feature> more) {
    features.insert(features.end(), more);
    return features;
  };
  const std::vector<Feature> vnni = with(avx2, {&CpuFeatures::avx512, &CpuFeatures::avx512_vnni});
  const std::vector<Feature> bf16 = with(vnni, {&CpuFeatures::avx512_bf16});
  const std::vector<Feature> neon = {&CpuFeatures::neon};
  const std::vector<Feature> dotprod = {&CpuFeatures::neon, &CpuFeatures::dotprod};
  const std::pair<Isa, std::vector<Feature>> needs[] = {{Isa::scalar, {}},
                                                        {Isa::avx2, avx2},
                                                        {Isa::avxvnni, with(avx2, {&CpuFeatures::avx_vnni})},
                                                        {Isa::avx512vnni, vnni},
                                                        {Isa::avx512bf16, bf16},
                                                        {Isa::amx, with(bf16, {&CpuFeatures::amx_int8})},
                                                        {Isa::neon, neon},
                                                        {Isa::neon_dotprod, dotprod},
                                                        {Isa::neon_i8mm, with(dotprod, {&CpuFeatures::i8mm})}};
  for (const auto& [isa, features] : needs) {
    CpuFeatures has;
    for (Feature f : features) has.*f = true;
    EXPECT_TRUE(nibble::detail::supports(has, isa)) << name_of(isa);
    for (Feature f : features) {
      CpuFeatures lacks = has;
      lacks.*f = false;
      EXPECT_FALSE(nibble::detail::supports(lacks, isa)) << name_of(isa);
    }
  }
  for (Isa isa : all_isas) {
    if (nibble::isa_available(isa))
      EXPECT_EQ(kernels_for(isa).isa, isa);
    else
      EXPECT_THROW(kernels_for(isa), Unsupported);
  }
}

TEST(Dispatch, EveryTableIsComplete) {
  int tables = 0;
  for (Isa isa : built_isas) {
    if (!nibble::isa_available(isa)) continue;
    ++tables;
    const KernelTable& t = kernels_for(isa);
    const KernelTable& s = kernels_for(Isa::scalar);
    const bool own = isa != Isa::scalar;
    // Present, and not the scalar kernel under another name.
    const auto check = [&](auto entry, auto scalar, const char* name) {
      EXPECT_NE(entry, nullptr) << name_of(isa) << " " << name;
      if (own) {
        EXPECT_NE(entry, scalar) << name_of(isa) << " " << name;
      }
    };
    check(t.gemm_w8a8, s.gemm_w8a8, "gemm_w8a8");
    check(t.gemm_w4a8, s.gemm_w4a8, "gemm_w4a8");
    check(t.unpack, s.unpack, "unpack");
    check(t.gemm_float, s.gemm_float, "gemm_float");
    check(t.gemv_float, s.gemv_float, "gemv_float");
    check(t.gemv_dense, s.gemv_dense, "gemv_dense");
    check(t.gemm_bf16, s.gemm_bf16, "gemm_bf16");
    if (t.gemv_rows != nullptr) check(t.gemv_rows, s.gemv_rows, "gemv_rows");
    EXPECT_GE(t.bf16_tile_rows, 1U);
    check(t.quantize_rows, s.quantize_rows, "quantize_rows");
    check(t.epilogue, s.epilogue, "epilogue");
    check(t.block_sums, s.block_sums, "block_sums");
    check(t.line_range, s.line_range, "line_range");
    check(t.quantize_line, s.quantize_line, "quantize_line");
    check(t.dequantize_line, s.dequantize_line, "dequantize_line");
    check(t.fp16_from_float, s.fp16_from_float, "fp16_from_float");
    check(t.float_from_fp16, s.float_from_fp16, "float_from_fp16");
    check(t.bf16_from_float, s.bf16_from_float, "bf16_from_float");
    check(t.float_from_bf16, s.float_from_bf16, "float_from_bf16");
    EXPECT_GE(t.float_tile_rows, 1U);
    EXPECT_LE(t.float_tile_rows, 16U);
  }
  EXPECT_GE(tables, 1);
}

}  // namespace
