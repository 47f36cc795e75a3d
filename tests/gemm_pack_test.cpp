// Packing: to the kernels' layout and back to the bit, rows gathered, parts refused where they do not fit.
#include "nibble/gemm/pack.hpp"

#include <gtest/gtest.h>

#include <limits>

#include "gemm_support.hpp"

namespace {

using namespace gemm_test;
using nibble::InvalidArgument;
using nibble::PackedHeader;
using nibble::PackedMatrix;
using nibble::Unsupported;

std::vector<Scheme> packable() {
  std::vector<Scheme> schemes;
  for (Format f : {Format::fp32, Format::fp16, Format::bf16})
    schemes.push_back(scheme_of(f, Symmetry::symmetric, Granularity::per_tensor()));
  for (Format f : {Format::int8, Format::int4, Format::nf4, Format::fp4, Format::int2, Format::int3, Format::int5,
                   Format::int6})
    for (Symmetry s : {Symmetry::symmetric, Symmetry::asymmetric, Symmetry::float_offset})
      for (ScaleType t : {ScaleType::fp32, ScaleType::fp16, ScaleType::bf16})
        for (Granularity g : {Granularity::per_tensor(), Granularity::per_channel(0), Granularity::per_group(16),
                              Granularity::per_group(48), Granularity::per_group(256)})
          if (!nibble::is_codebook(f) || s == Symmetry::symmetric) schemes.push_back(scheme_of(f, s, g, t));
  return schemes;
}

bool same(const Buffer& a, const Buffer& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size()) == 0);
}

TEST(Pack, UnpackGivesBackEveryBit) {
  unsigned seed = 0;
  for (const Scheme& scheme : packable())
    for (const auto& [n, k] :
         {std::pair<std::size_t, std::size_t>{1, 1}, {16, 16}, {17, 95}, {3, 576}, {33, 172}, {0, 5}, {5, 0}}) {
      const QuantizedTensor q = random_quantized(scheme, n, k, ++seed);
      const PackedMatrix w = pack(q);
      const QuantizedTensor back = w.unpack();
      ASSERT_EQ(back.shape(), q.shape());
      ASSERT_EQ(back.scheme(), q.scheme());
      ASSERT_TRUE(same(back.codes(), q.codes())) << name_of(scheme.format) << " " << n << " " << k;
      if (n * k == 0) continue;  // parameters of no element are not kept
      ASSERT_TRUE(same(back.scales(), q.scales())) << name_of(scheme.format) << " " << n << " " << k;
      ASSERT_TRUE(same(back.zeros(), q.zeros())) << name_of(scheme.format) << " " << n << " " << k;
    }
}

TEST(Pack, RowsAndWholeEqualTheQuantizedValues) {
  unsigned seed = 100;
  for (const Scheme& scheme : packable()) {
    const QuantizedTensor q = random_quantized(scheme, 21, 75, ++seed);
    const PackedMatrix w = pack(q);
    const Eigen::MatrixXf values = w.dequantize();
    std::vector<float> expected(75);
    std::vector<float> row(75);
    for (std::size_t r = 0; r < 21; ++r) {
      q.dequantize_row(r, expected.data());
      w.dequantize_row(static_cast<Eigen::Index>(r), row.data());
      ASSERT_EQ(std::memcmp(row.data(), expected.data(), 75 * sizeof(float)), 0) << name_of(scheme.format);
      for (std::size_t k = 0; k < 75; ++k)
        ASSERT_EQ(values(static_cast<Eigen::Index>(r), static_cast<Eigen::Index>(k)), expected[k]);
    }
  }
  const PackedMatrix w = pack(random_quantized(packable()[0], 4, 4, 1));
  float row[4];
  EXPECT_THROW(w.dequantize_row(4, row), InvalidArgument);
  EXPECT_THROW(w.dequantize_row(-1, row), InvalidArgument);
}

TEST(Pack, FloatsOfAnyExpression) {
  const Eigen::MatrixXf w = random_floats(35, 18, 1);
  EXPECT_EQ(nibble::pack(w).dequantize(), w);
  EXPECT_EQ(nibble::pack(w.transpose()).dequantize(), w.transpose());
  EXPECT_EQ(nibble::pack(w.cast<double>() * 2.0).dequantize(), w * 2.0F);
}

TEST(Pack, ThreadsChangeNothing) {
  const QuantizedTensor q =
      random_quantized(scheme_of(Format::int4, Symmetry::asymmetric, Granularity::per_group(32)), 333, 129, 1);
  nibble::ThreadPool pool(3);
  nibble::PackOptions options;
  options.pool = &pool;
  EXPECT_TRUE(same(pack(q, options).codes(), pack(q).codes()));
  EXPECT_TRUE(same(pack(q, options).zeros(), pack(q).zeros()));
  EXPECT_TRUE(same(pack(q, options).channel_sums(), pack(q).channel_sums()));
}

TEST(Pack, ScalesThatCannotLeaveTheSumAreRefused) {
  const auto along = [](Granularity g, std::size_t params) {
    return QuantizedTensor::from_parts(scheme_of(Format::int8, Symmetry::symmetric, g), {16, 32}, Buffer(512),
                                       Buffer(params * 4));
  };
  EXPECT_THROW(pack(along(Granularity::per_channel(1), 32)), Unsupported);
  EXPECT_THROW(pack(along(Granularity::per_group(16, 0), 32)), Unsupported);
  const QuantizedTensor cube = QuantizedTensor::from_parts(
      scheme_of(Format::int8, Symmetry::symmetric, Granularity::per_tensor()), {2, 2, 2}, Buffer(8), Buffer(4));
  EXPECT_THROW(pack(cube), InvalidArgument);
}

TEST(Pack, PartsThatDoNotFitAreRefused) {
  const PackedMatrix w =
      pack(random_quantized(scheme_of(Format::int4, Symmetry::asymmetric, Granularity::per_group(32)), 20, 70, 1));
  const PackedHeader header = w.header();
  const auto parts = [&](const PackedHeader& h, const Buffer& codes, const Buffer& scales, const Buffer& zeros,
                         const Buffer& sums) { return PackedMatrix::from_parts(h, codes, scales, zeros, sums); };
  EXPECT_NO_THROW(parts(header, w.codes(), w.scales(), w.zeros(), w.channel_sums()));
  EXPECT_NO_THROW(parts(header, w.codes(), w.scales(), w.zeros(), {}));
  EXPECT_THROW(parts(header, Buffer(w.codes().size() - 1), w.scales(), w.zeros(), {}), InvalidArgument);
  EXPECT_THROW(parts(header, w.codes(), Buffer(w.scales().size() + 4), w.zeros(), {}), InvalidArgument);
  EXPECT_THROW(parts(header, w.codes(), w.scales(), {}, {}), InvalidArgument);
  EXPECT_THROW(parts(header, w.codes(), w.scales(), w.zeros(), Buffer(4)), InvalidArgument);
  for (float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    Buffer scales(w.scales().size());
    scales.as_mutable<float>()[5] = bad;
    EXPECT_THROW(parts(header, w.codes(), scales, w.zeros(), {}), InvalidArgument);
  }
  Buffer zeros(w.zeros().size());
  zeros.mutable_data()[3] = 16;
  EXPECT_THROW(parts(header, w.codes(), w.scales(), zeros, {}), InvalidArgument);
  PackedHeader huge = header;
  huge.rows = std::numeric_limits<std::size_t>::max() / 2;
  EXPECT_THROW(parts(huge, w.codes(), w.scales(), w.zeros(), {}), InvalidArgument);
  huge.rows = 20;
  huge.cols = std::numeric_limits<std::size_t>::max() - 3;
  EXPECT_THROW(parts(huge, w.codes(), w.scales(), w.zeros(), {}), InvalidArgument);
  PackedHeader odd = header;
  odd.scheme.granularity.group_size = 24;
  EXPECT_THROW(parts(odd, w.codes(), w.scales(), w.zeros(), {}), InvalidArgument);
}

TEST(Pack, EveryScaleThatIsNotFiniteIsFound) {
  for (const ScaleType type : {ScaleType::fp16, ScaleType::fp32}) {
    Scheme scheme = scheme_of(Format::int4, Symmetry::float_offset, Granularity::per_group(16));
    scheme.scale_type = type;
    const PackedMatrix w = pack(random_quantized(scheme, 17, 3 * 16, 1));
    const bool wide = type == ScaleType::fp32;
    const std::size_t size = wide ? 4 : 2, params = w.scales().size() / size;
    ASSERT_EQ(params, 2U * 3U * 16U);
    const auto message = [&](std::size_t at, std::uint32_t bits, bool offset) -> std::string {
      // What is largest on both sides must not spill into its neighbours.
      Buffer changed(w.scales().size());
      for (std::size_t i = 0; i < params; ++i) {
        const std::uint32_t most = (wide ? 0x7F7FFFFFU : 0x7BFFU) | (i % 2 == 0 ? 0U
                                                                     : wide     ? 0x80000000U
                                                                                : 0x8000U);
        std::memcpy(changed.mutable_data() + i * size, i == at ? &bits : &most, size);
      }
      try {
        PackedMatrix::from_parts(w.header(), w.codes(), offset ? w.scales() : changed,
                                 offset ? changed : w.zeros());
      } catch (const InvalidArgument& e) {
        return e.what();
      }
      return "";
    };
    EXPECT_EQ(message(params, 0, false), "");
    for (std::size_t i = 0; i < params; ++i)
      for (const std::uint32_t bits : wide ? std::vector<std::uint32_t>{0x7F800000U, 0xFF800000U, 0x7FC00001U}
                                           : std::vector<std::uint32_t>{0x7C00U, 0xFC00U, 0x7E01U}) {
        EXPECT_NE(message(i, bits, false).find("scale " + std::to_string(i) + " is not"), std::string::npos) << i;
        EXPECT_NE(message(i, bits, true).find("offset " + std::to_string(i) + " is not"), std::string::npos) << i;
      }
  }
}

TEST(Pack, BorrowedBytesOfAnyAlignmentWork) {
  const PackedMatrix w = pack(random_quantized(
      scheme_of(Format::int4, Symmetry::float_offset, Granularity::per_group(32), ScaleType::fp16), 20, 70, 1));
  const auto shifted = [](const Buffer& b) {
    auto bytes = std::make_shared<std::vector<std::uint8_t>>(b.size() + 1);
    if (!b.empty()) std::memcpy(bytes->data() + 1, b.data(), b.size());
    const std::uint8_t* data = bytes->data() + 1;
    return Buffer::borrow(data, b.size(), bytes);
  };
  const PackedMatrix borrowed = PackedMatrix::from_parts(w.header(), shifted(w.codes()), shifted(w.scales()),
                                                         shifted(w.zeros()), w.channel_sums());
  EXPECT_EQ(borrowed.dequantize(), w.dequantize());
}

}  // namespace
