// The libraries that Nibble is measured beside. Raw pointers only: each lives in a translation unit of its own.
//
// Everywhere W is n x k with k contiguous (a layer's weights as checkpoints store them), X is k x m with k contiguous (a
// token a column), Y is n x m with n contiguous.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

namespace bench::peers {

// OpenBLAS: sgemm, and sgemv where m is 1.
bool openblas_available();
std::string openblas_version();
void openblas(const float* w, const float* x, float* y, std::int64_t m, std::int64_t n, std::int64_t k,
              int threads);

// Eigen, compiled with -O3, every instruction of this machine, and OpenMP where there is one.
std::string eigen_version();
void eigen(const float* w, const float* x, float* y, std::int64_t m, std::int64_t n, std::int64_t k, int threads);

/// oneDNN's int8 and bf16 products, with weights in the layout that it prefers; integers in, raw int32 out (no
/// quantization, no epilogue), or bf16 in and float out.
enum class OneDnnKind { u8s8s32, s8s8s32, bf16 };
const char* name_of(OneDnnKind kind);

class OneDnnProduct {
 public:
  virtual ~OneDnnProduct() = default;
  virtual void run() = 0;
  /// Of `checked` outputs, how many are not what the definition says. Saturating instructions show here.
  virtual int wrong(int checked) const = 0;
};

bool onednn_available();
std::string onednn_version();
/// nullptr where oneDNN has no such product here. w and x are read now; values are rounded into the type's range.
std::unique_ptr<OneDnnProduct> make_onednn(OneDnnKind kind, const float* w, const float* x, std::int64_t m,
                                           std::int64_t n, std::int64_t k, int threads);

}  // namespace bench::peers
