// Every kind of Eigen input gives the same codes, and every kind of output the same values.
#include <gtest/gtest.h>

#include "nibble/quantize/fake_quantize.hpp"
#include "nibble/quantize/quantizer.hpp"
#include "nibble/quantize/tensor.hpp"
#include "quantize_support.hpp"

namespace {

using namespace nibble_test;
using RowMatrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
using AnyStride = Eigen::Stride<Eigen::Dynamic, Eigen::Dynamic>;
using Groups = nibble::Quantizer<nibble::Int4, nibble::Asymmetric, nibble::PerGroup<32>, Eigen::half>;
using Channels = nibble::Quantizer<nibble::Int8, nibble::Symmetric, nibble::PerChannel<0>>;
using Tensors = nibble::Quantizer<nibble::Nf4>;
using Halves = nibble::Quantizer<nibble::Fp16>;

/// Exactly representable in half and bfloat16, so that all scalar types hold the same numbers; no negative zeros, of
/// which sums make positive ones.
Eigen::MatrixXf coarse(Eigen::Index rows, Eigen::Index cols) {
  const Eigen::MatrixXf random = 100.0F * Eigen::MatrixXf::Random(rows, cols);
  return (random.array().round() / 64.0F + 0.0F).matrix();
}

Values values_in_c_order(const Eigen::MatrixXf& w) {
  Values v{{static_cast<std::size_t>(w.rows()), static_cast<std::size_t>(w.cols())}, {}};
  for (Eigen::Index r = 0; r < w.rows(); ++r)
    for (Eigen::Index c = 0; c < w.cols(); ++c) v.x.push_back(w(r, c));
  return v;
}

template <class Q, class X>
void expect_same(const Eigen::MatrixXf& w, const X& x, const char* what) {
  SCOPED_TRACE(what);
  const nibble::QuantizedTensor expected = quantize(values_in_c_order(w), Q::scheme());
  const auto actual = nibble::quantize<Q>(x);
  EXPECT_EQ(actual.shape(), expected.shape());
  EXPECT_EQ(codes_of(actual), codes_of(expected));
  const Eigen::MatrixXf back = nibble::dequantize(actual);
  EXPECT_EQ(back, nibble::dequantize(expected));
  EXPECT_EQ(nibble::fake_quantize<Q>(x), back);
}

template <class Q>
void expect_same_for_all_kinds(Eigen::Index rows, Eigen::Index cols) {
  SCOPED_TRACE(describe(Q::scheme(), {std::size_t(rows), std::size_t(cols)}));
  const Eigen::MatrixXf w = coarse(rows, cols);
  const RowMatrix row_major = w;
  expect_same<Q>(w, w, "column-major");
  expect_same<Q>(w, row_major, "row-major");
  expect_same<Q>(w, w.array(), "array");
  expect_same<Q>(w, Eigen::MatrixXd(w.cast<double>()), "double");
  expect_same<Q>(w, Eigen::Matrix<Eigen::half, -1, -1>(w.cast<Eigen::half>()), "half");
  expect_same<Q>(w, Eigen::Matrix<Eigen::half, -1, -1, Eigen::RowMajor>(w.cast<Eigen::half>()), "half, row-major");
  expect_same<Q>(w, Eigen::Matrix<Eigen::bfloat16, -1, -1>(w.cast<Eigen::bfloat16>()), "bfloat16");
  expect_same<Q>(w, w.cast<double>(), "cast expression");
  expect_same<Q>(w, 2.0F * w - w, "expression");
  expect_same<Q>(w, Eigen::MatrixXf::Identity(rows, rows) * w, "product");
  const Eigen::MatrixXf transposed = w.transpose();
  expect_same<Q>(w, transposed.transpose(), "transpose");
  expect_same<Q>(w, Eigen::Ref<const Eigen::MatrixXf>(w), "Ref");
  expect_same<Q>(w, Eigen::Ref<const RowMatrix, 0, Eigen::OuterStride<>>(row_major), "row-major Ref");

  Eigen::MatrixXf around = Eigen::MatrixXf::Constant(rows + 5, cols + 7, 1e30F);
  around.block(2, 3, rows, cols) = w;
  expect_same<Q>(w, around.block(2, 3, rows, cols), "Block");
  RowMatrix row_around = around;
  expect_same<Q>(w, row_around.block(2, 3, rows, cols), "row-major Block");

  std::vector<float> memory(static_cast<std::size_t>(3 * rows * (2 * cols + 1) + 1), 1e30F);
  Eigen::Map<Eigen::MatrixXf, 0, AnyStride> inner(memory.data() + 1, rows, cols, AnyStride(2 * rows + 1, 2));
  inner = w;
  expect_same<Q>(w, inner, "Map with inner stride");
  std::fill(memory.begin(), memory.end(), 1e30F);
  Eigen::Map<RowMatrix, 0, AnyStride> row_inner(memory.data() + 1, rows, cols, AnyStride(2 * cols + 1, 2));
  row_inner = w;
  expect_same<Q>(w, row_inner, "row-major Map with inner stride");
  expect_same<Q>(w, Eigen::Map<const RowMatrix>(row_major.data(), rows, cols), "const Map");
}

TEST(Inputs, AllKindsOfMatricesAgree) {
  for (const auto& [rows, cols] : {std::pair<int, int>{1, 1}, {1, 50}, {50, 1}, {17, 33}, {70, 100}, {129, 40}}) {
    expect_same_for_all_kinds<Groups>(rows, cols);
    expect_same_for_all_kinds<Channels>(rows, cols);
    expect_same_for_all_kinds<Tensors>(rows, cols);
    expect_same_for_all_kinds<Halves>(rows, cols);
  }
}

TEST(Inputs, FixedSizesVectorsAndDerivedClasses) {
  const Eigen::Matrix<float, 3, 16> fixed = coarse(3, 16);
  expect_same<Groups>(fixed, fixed, "fixed size");
  expect_same<Groups>(fixed, fixed + fixed - fixed, "fixed-size expression");
  const Eigen::Matrix4d four = coarse(4, 4).cast<double>();
  expect_same<Channels>(four.cast<float>(), four, "Matrix4d");
  const Eigen::VectorXf column = coarse(40, 1);
  expect_same<Channels>(column, column, "a column vector is n x 1");
  expect_same<Groups>(column.transpose(), column.transpose(), "a row vector is 1 x n");
  struct Mine : Eigen::MatrixXf {
    using Eigen::MatrixXf::MatrixXf;
  };
  Mine mine(5, 40);
  mine.setRandom();
  expect_same<Groups>(mine, mine, "derived class");
}

TEST(Inputs, DoublesAreRoundedOnce) {
  Eigen::MatrixXd w(1, 3);
  w << 1.0 + 0x1p-11 + 0x1p-40, 1.0 + 0x1p-8 + 0x1p-40, 1.0 + 0x1p-11;
  const auto half = nibble::quantize<nibble::Quantizer<nibble::Fp16>>(w);
  EXPECT_EQ(codes_of(half), (std::vector<int>{0x3C01, 0x3C04, 0x3C00}));
  const auto brain = nibble::quantize<nibble::Quantizer<nibble::Bf16>>(w);
  EXPECT_EQ(codes_of(brain), (std::vector<int>{0x3F80, 0x3F81, 0x3F80}));
}

TEST(Outputs, EveryWritableKind) {
  const Eigen::MatrixXf w = Eigen::MatrixXf::Random(70, 50);
  const auto q = nibble::quantize<Groups>(w);
  const Eigen::MatrixXf expected = nibble::dequantize(q);
  ASSERT_EQ(expected.rows(), 70);

  Eigen::MatrixXf columns(70, 50);
  nibble::dequantize_into(q, columns);
  EXPECT_EQ(columns, expected);
  RowMatrix rows(70, 50);
  nibble::dequantize_into(q, rows);
  EXPECT_EQ(Eigen::MatrixXf(rows), expected);
  Eigen::MatrixXf through_ref(70, 50);
  Eigen::Ref<Eigen::MatrixXf> ref(through_ref);
  nibble::dequantize_into(q, ref);
  EXPECT_EQ(through_ref, expected);
  Eigen::ArrayXXf array(70, 50);
  nibble::dequantize_into(q, array);
  EXPECT_EQ(array.matrix(), expected);
  Eigen::MatrixXf transposed(50, 70);
  nibble::dequantize_into(q, transposed.transpose());
  EXPECT_EQ(Eigen::MatrixXf(transposed.transpose()), expected);

  Eigen::MatrixXf around = Eigen::MatrixXf::Constant(80, 60, 7.0F);
  nibble::dequantize_into(q, around.block(3, 4, 70, 50));
  EXPECT_EQ(around.block(3, 4, 70, 50), expected);
  around.block(3, 4, 70, 50).setConstant(7.0F);
  EXPECT_EQ(around, Eigen::MatrixXf::Constant(80, 60, 7.0F)) << "the border was written";

  std::vector<float> memory(2 * 70 * 60, 7.0F);
  Eigen::Map<Eigen::MatrixXf, 0, AnyStride> strided(memory.data(), 70, 50, AnyStride(150, 2));
  nibble::dequantize_into(q, strided);
  EXPECT_EQ(Eigen::MatrixXf(strided), expected);
  strided.setConstant(7.0F);
  EXPECT_EQ(std::count(memory.begin(), memory.end(), 7.0F), static_cast<std::ptrdiff_t>(memory.size()));

  Eigen::MatrixXf wrong(50, 70);
  EXPECT_THROW(nibble::dequantize_into(q, wrong), nibble::InvalidArgument);
}

template <int Order, int Rank>
Values tensor_in_c_order(const Eigen::Tensor<float, Rank, Order>& t) {
  Values v;
  for (int d = 0; d < Rank; ++d) v.shape.push_back(static_cast<std::size_t>(t.dimension(d)));
  Eigen::array<Eigen::Index, Rank> at{};
  for (std::size_t i = 0; i < count(v.shape); ++i) {
    const auto index = index_of(v.shape, i);
    for (std::size_t d = 0; d < index.size(); ++d) at[d] = static_cast<Eigen::Index>(index[d]);
    v.x.push_back(t(at));
  }
  return v;
}

template <class Q, int Order, int Rank>
void expect_tensor_agrees(const Eigen::array<Eigen::Index, Rank>& lengths) {
  Eigen::Tensor<float, Rank, Order> t(lengths);
  t.setRandom();
  t = t - t.constant(0.3F);
  const Values v = tensor_in_c_order<Order, Rank>(t);
  SCOPED_TRACE(describe(Q::scheme(), v.shape));
  const nibble::QuantizedTensor expected = quantize(v, Q::scheme());
  const auto q = nibble::quantize<Q>(t);
  EXPECT_EQ(codes_of(q), codes_of(expected));
  EXPECT_EQ(
      codes_of(nibble::quantize<Q>(Eigen::TensorMap<const Eigen::Tensor<float, Rank, Order>>(t.data(), lengths))),
      codes_of(expected));
  EXPECT_EQ(codes_of(nibble::quantize<Q>(t * 2.0F * 0.5F)), codes_of(expected));
  Eigen::Tensor<double, Rank, Order> wide_t = t.template cast<double>();
  EXPECT_EQ(codes_of(nibble::quantize<Q>(wide_t)), codes_of(expected));
  EXPECT_EQ(codes_of(nibble::DynamicQuantizer(Q::scheme()).quantize(t)), codes_of(expected));

  const std::vector<float> values = values_of(expected);
  const Eigen::Tensor<float, Rank, Order> back = nibble::dequantize(q);
  EXPECT_TRUE(same_bits((tensor_in_c_order<Order, Rank>(back).x), values));
  const Eigen::Tensor<float, Rank, Order> erased = nibble::dequantize_tensor<Rank, Order>(q);
  EXPECT_TRUE(same_bits((tensor_in_c_order<Order, Rank>(erased).x), values));
  const Eigen::Tensor<float, Rank, Order> fake = nibble::fake_quantize<Q>(t);
  EXPECT_TRUE(same_bits((tensor_in_c_order<Order, Rank>(fake).x), values));
  Eigen::Tensor<float, Rank, Order> into(lengths);
  nibble::dequantize_into(q, into);
  EXPECT_TRUE(same_bits((tensor_in_c_order<Order, Rank>(into).x), values));
  Eigen::TensorMap<Eigen::Tensor<float, Rank, Order>> map(into.data(), lengths);
  into.setZero();
  nibble::dequantize_into(q, map);
  EXPECT_TRUE(same_bits((tensor_in_c_order<Order, Rank>(into).x), values));
}

TEST(Tensors, EveryRankInBothOrders) {
  using AnyAxis = nibble::Quantizer<nibble::Int8, nibble::Asymmetric, nibble::PerChannel<-1>>;
  expect_tensor_agrees<Groups, Eigen::ColMajor, 1>({50});
  expect_tensor_agrees<AnyAxis, Eigen::RowMajor, 1>({50});
  expect_tensor_agrees<Groups, Eigen::ColMajor, 2>({19, 50});
  expect_tensor_agrees<AnyAxis, Eigen::RowMajor, 2>({19, 50});
  expect_tensor_agrees<Channels, Eigen::ColMajor, 3>({70, 3, 40});
  expect_tensor_agrees<Groups, Eigen::RowMajor, 3>({7, 3, 40});
  expect_tensor_agrees<Channels, Eigen::ColMajor, 4>({33, 5, 3, 3});  // a convolution's output channels
  expect_tensor_agrees<AnyAxis, Eigen::RowMajor, 4>({3, 3, 5, 33});
  expect_tensor_agrees<nibble::Quantizer<nibble::Int4, nibble::FloatOffset, nibble::PerGroup<16, 1>>,
                       Eigen::ColMajor, 4>({4, 37, 3, 2});
  expect_tensor_agrees<Tensors, Eigen::ColMajor, 5>({2, 3, 4, 5, 6});
  expect_tensor_agrees<Channels, Eigen::RowMajor, 5>({6, 5, 4, 3, 2});
  expect_tensor_agrees<Channels, Eigen::ColMajor, 8>({2, 3, 2, 1, 2, 2, 2, 5});
}

TEST(Tensors, RankZeroAndFixedSizes) {
  Eigen::Tensor<float, 0> scalar;
  scalar() = 1.5F;
  const auto q = nibble::quantize<nibble::Quantizer<nibble::Int8>>(scalar);
  EXPECT_EQ(q.erased().rank(), 0U);
  EXPECT_EQ(q.erased().size(), 1U);
  EXPECT_EQ(nibble::dequantize(q)(), 127.0F * (1.5F / 127.0F));

  Eigen::TensorFixedSize<float, Eigen::Sizes<3, 20>> fixed;
  fixed.setRandom();
  Eigen::Tensor<float, 2> same = fixed;
  EXPECT_EQ(codes_of(nibble::quantize<Groups>(fixed)), codes_of(nibble::quantize<Groups>(same)));
}

TEST(Tensors, WrongRankIsAnError) {
  const Eigen::Tensor<float, 3> t = Eigen::Tensor<float, 3>(2, 3, 4).setRandom();
  const auto q = nibble::quantize<Channels>(t);
  EXPECT_THROW(nibble::dequantize_tensor<2>(q), nibble::InvalidArgument);
  EXPECT_THROW(nibble::dequantize(q.erased()), nibble::InvalidArgument);
  Eigen::Tensor<float, 3> wrong(2, 4, 3);
  EXPECT_THROW(nibble::dequantize_into(q, wrong), nibble::InvalidArgument);
}

}  // namespace
