// A product in a loop, on threads that the caller owns; nothing is allocated once it runs.
#include <chrono>
#include <cstdio>
#include <nibble/nibble.hpp>
#include <string>

int main() {
  using Int4 = nibble::Quantizer<nibble::Int4, nibble::Symmetric, nibble::PerGroup<32>, Eigen::half>;
  const Eigen::MatrixXf weights = Eigen::MatrixXf::Random(1024, 1024);
  const nibble::PackedMatrix packed = nibble::pack(nibble::quantize<Int4>(weights));
  const Eigen::VectorXf bias = Eigen::VectorXf::Random(1024);
  const Eigen::MatrixXf x = Eigen::MatrixXf::Random(1024, 16);  // 16 tokens, one a column

  nibble::ThreadPool pool;  // one thread a core, this one included
  nibble::Workspace workspace;
  nibble::MatmulOptions options;
  options.pool = &pool;
  options.workspace = &workspace;
  options.epilogue.bias(bias).silu();
  std::printf("%s", nibble::explain(packed, x.cols(), options).c_str());

  Eigen::MatrixXf y(1024, 16);
  nibble::matmul(packed, x, y, options);
  constexpr int rounds = 100;
  const auto begin = std::chrono::steady_clock::now();
  for (int i = 0; i < rounds; ++i) nibble::matmul(packed, x, y, options);
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
  std::printf("%d products, %.1f GOP/s\n", rounds, 2.0 * 1024 * 1024 * 16 * rounds / seconds.count() / 1e9);

  // However many threads: the same bits.
  Eigen::MatrixXf serial(1024, 16);
  options.pool = nullptr;
  nibble::matmul(packed, x, serial, options);
  return y == serial ? 0 : 1;
}
