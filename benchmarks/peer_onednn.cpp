#include "peers.hpp"

namespace bench::peers {
const char* name_of(OneDnnKind kind) {
  switch (kind) {
    case OneDnnKind::u8s8s32: return "onednn_u8s8s32";
    case OneDnnKind::s8s8s32: return "onednn_s8s8s32";
    case OneDnnKind::bf16: return "onednn_bf16";
  }
  return "?";
}
}  // namespace bench::peers

#if NIBBLE_BENCH_ONEDNN
#include <dlfcn.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <oneapi/dnnl/dnnl.hpp>
#include <vector>

namespace bench::peers {
namespace {

/// oneDNN's threads are OpenMP's. Its runtime is in the process because oneDNN needs it; no header of it is.
void set_openmp_threads(int threads) {
  using Function = void (*)(int);
  static const auto set = reinterpret_cast<Function>(dlsym(RTLD_DEFAULT, "omp_set_num_threads"));
  if (set != nullptr) set(threads);
}

std::uint16_t bf16_of(float value) {
  std::uint32_t bits = 0;
  std::memcpy(&bits, &value, sizeof bits);
  return static_cast<std::uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

float float_of(std::uint16_t bf16) {
  const std::uint32_t bits = static_cast<std::uint32_t>(bf16) << 16;
  float value = 0;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

const dnnl::engine& cpu_engine() {
  static const dnnl::engine engine(dnnl::engine::kind::cpu, 0);
  return engine;
}

class Product : public OneDnnProduct {
 public:
  Product(OneDnnKind kind, const float* w, const float* x, std::int64_t m, std::int64_t n, std::int64_t k,
          int threads)
      : kind_(kind), m_(m), n_(n), k_(k), threads_(threads), stream_(cpu_engine()) {
    set_openmp_threads(threads);
    using Type = dnnl::memory::data_type;
    using Tag = dnnl::memory::format_tag;
    const bool integers = kind != OneDnnKind::bf16;
    const Type w_type = integers ? Type::s8 : Type::bf16;
    const Type x_type = kind == OneDnnKind::u8s8s32 ? Type::u8 : w_type;
    const dnnl::memory::desc x_desc({m, k}, x_type, Tag::ab);
    const dnnl::memory::desc y_desc({m, n}, integers ? Type::s32 : Type::f32, Tag::ab);
    const dnnl::matmul::desc desc(x_desc, dnnl::memory::desc({k, n}, w_type, Tag::any), y_desc);
    const dnnl::matmul::primitive_desc primitive(desc, cpu_engine());
    x_codes_.resize(static_cast<std::size_t>(m * k) * (integers ? 1 : 2));
    w_codes_.resize(static_cast<std::size_t>(n * k) * (integers ? 1 : 2));
    fill(x, m * k, kind == OneDnnKind::u8s8s32, x_codes_);
    fill(w, n * k, false, w_codes_);
    y_ = dnnl::memory(y_desc, cpu_engine());
    x_ = dnnl::memory(x_desc, cpu_engine(), x_codes_.data());
    // W is n x k with k contiguous: k x n, transposed.
    dnnl::memory plain(dnnl::memory::desc({k, n}, w_type, Tag::ba), cpu_engine(), w_codes_.data());
    w_ = dnnl::memory(primitive.weights_desc(), cpu_engine());
    dnnl::reorder(plain, w_).execute(stream_, plain, w_);
    stream_.wait();
    product_ = dnnl::matmul(primitive);
  }

  void run() override {
    set_openmp_threads(threads_);
    product_.execute(stream_, {{DNNL_ARG_SRC, x_}, {DNNL_ARG_WEIGHTS, w_}, {DNNL_ARG_DST, y_}});
    stream_.wait();
  }

  int wrong(int checked) const override {
    int bad = 0;
    for (int i = 0; i < checked; ++i) {
      const std::int64_t row = m_ * i / checked;
      const std::int64_t col = n_ * i / checked;
      if (kind_ == OneDnnKind::bf16) {
        double sum = 0;
        double magnitude = 0;
        for (std::int64_t d = 0; d < k_; ++d) {
          const double term =
              static_cast<double>(at_bf16(x_codes_, row * k_ + d)) * at_bf16(w_codes_, col * k_ + d);
          sum += term;
          magnitude += std::fabs(term);
        }
        const double got = static_cast<const float*>(y_.get_data_handle())[row * n_ + col];
        // Sums of k floats: k * 2^-24 of the magnitude bounds them in any order.
        bad += std::fabs(got - sum) > magnitude * static_cast<double>(k_) / (1 << 24) ? 1 : 0;
      } else {
        std::int64_t sum = 0;
        for (std::int64_t d = 0; d < k_; ++d) {
          const std::uint8_t code = x_codes_[static_cast<std::size_t>(row * k_ + d)];
          const int value = kind_ == OneDnnKind::u8s8s32 ? code : static_cast<std::int8_t>(code);
          sum += value * static_cast<std::int8_t>(w_codes_[static_cast<std::size_t>(col * k_ + d)]);
        }
        bad += static_cast<const std::int32_t*>(y_.get_data_handle())[row * n_ + col] != sum ? 1 : 0;
      }
    }
    return bad;
  }

 private:
  static float at_bf16(const std::vector<std::uint8_t>& codes, std::int64_t i) {
    std::uint16_t bits = 0;
    std::memcpy(&bits, codes.data() + 2 * i, sizeof bits);
    return float_of(bits);
  }

  /// Values within +-1 become codes over the whole range of the type.
  void fill(const float* values, std::int64_t count, bool is_unsigned, std::vector<std::uint8_t>& codes) const {
    for (std::int64_t i = 0; i < count; ++i) {
      if (kind_ == OneDnnKind::bf16) {
        const std::uint16_t bits = bf16_of(values[i]);
        std::memcpy(codes.data() + 2 * i, &bits, sizeof bits);
      } else {
        const int code = static_cast<int>(std::clamp(values[i], -1.0F, 1.0F) * 127.0F);
        codes[static_cast<std::size_t>(i)] = static_cast<std::uint8_t>(is_unsigned ? code + 128 : code);
      }
    }
  }

  OneDnnKind kind_;
  std::int64_t m_;
  std::int64_t n_;
  std::int64_t k_;
  int threads_;
  dnnl::stream stream_;
  std::vector<std::uint8_t> x_codes_;
  std::vector<std::uint8_t> w_codes_;
  dnnl::memory x_;
  dnnl::memory w_;
  dnnl::memory y_;
  dnnl::matmul product_;
};

}  // namespace

bool onednn_available() { return true; }

std::string onednn_version() {
  const dnnl_version_t* v = dnnl_version();
  return std::to_string(v->major) + "." + std::to_string(v->minor) + "." + std::to_string(v->patch);
}

std::unique_ptr<OneDnnProduct> make_onednn(OneDnnKind kind, const float* w, const float* x, std::int64_t m,
                                           std::int64_t n, std::int64_t k, int threads) {
  try {
    return std::make_unique<Product>(kind, w, x, m, n, k, threads);
  } catch (const dnnl::error&) {
    return nullptr;
  }
}

}  // namespace bench::peers

#else

namespace bench::peers {
bool onednn_available() { return false; }
std::string onednn_version() { return {}; }
std::unique_ptr<OneDnnProduct> make_onednn(OneDnnKind, const float*, const float*, std::int64_t, std::int64_t,
                                           std::int64_t, int) {
  return nullptr;
}
}  // namespace bench::peers

#endif
