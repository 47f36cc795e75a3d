// One side of a call that passes Nibble's types between translation units. CROSSING picks what crosses, SIDE which
// side this is. Between units of one setting it links and runs; between different -march it must fail to link.
#include <cstdio>
#include <nibble/nibble.hpp>
#include <vector>

#if CROSSING == 1  // as an argument
#define CROSS_RESULT std::size_t
#define CROSS_ARGUMENT const nibble::QuantizedTensor&
#elif CROSSING == 2  // inside a container
#define CROSS_RESULT std::size_t
#define CROSS_ARGUMENT const std::vector<nibble::PackedMatrix>&
#elif CROSSING == 3  // as a result alone
#define CROSS_RESULT nibble::PackedMatrix
#define CROSS_ARGUMENT int
#elif CROSSING == 4  // Eigen's types: these may cross
#define CROSS_RESULT std::size_t
#define CROSS_ARGUMENT const Eigen::Ref<const Eigen::MatrixXf>&
#elif CROSSING == 5  // the library's and raw memory: these may cross
#define CROSS_RESULT std::size_t
#define CROSS_ARGUMENT const std::vector<float>&
#endif

CROSS_RESULT cross(CROSS_ARGUMENT);

#if SIDE == 1
CROSS_RESULT cross(CROSS_ARGUMENT value) {
#if CROSSING == 1
  return value.rank();
#elif CROSSING == 2
  return value.size();
#elif CROSSING == 3
  return nibble::pack(Eigen::MatrixXf::Ones(value, value));
#else
  return static_cast<std::size_t>(value.size());
#endif
}
#else
int main() {
  const Eigen::MatrixXf ones = Eigen::MatrixXf::Ones(8, 8);
#if CROSSING == 1
  using Q = nibble::Quantizer<nibble::Int8, nibble::Symmetric, nibble::PerTensor>;
  return cross(nibble::quantize<Q>(ones).erased()) == 2 ? 0 : 1;
#elif CROSSING == 2
  return cross({nibble::pack(ones)}) == 1 ? 0 : 1;
#elif CROSSING == 3
  return cross(8).rows() == 8 ? 0 : 1;
#elif CROSSING == 4
  return cross(ones) == 64 ? 0 : 1;
#else
  return cross(std::vector<float>(64)) == 64 ? 0 : 1;
#endif
}
#endif
