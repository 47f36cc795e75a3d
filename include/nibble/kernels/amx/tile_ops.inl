// The operations on tile registers that the integer kernels of this ISA are written in. tests/emulation/amx_tile_ops.inl
// has the same ones in plain C++, for no machine of the tests has AMX. Included by table.hpp, in its region.

namespace tile_ops {

/// What ldtilecfg reads: the shapes of the eight tiles (palette 1).
struct alignas(64) Config {
  std::uint8_t palette = 1;
  std::uint8_t start_row = 0;
  std::uint8_t reserved[14] = {};
  std::uint16_t row_bytes[16] = {};
  std::uint8_t rows[16] = {};
};
static_assert(sizeof(Config) == 64, "");

/// Tile registers of this thread, from the first configuration to the end of its scope. Configuring empties them.
class Tiles {
 public:
  Tiles() = default;
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
  ~Tiles() {
    if (configured_) asm volatile("tilerelease");
  }
  void configure(const Config& config) noexcept {
    asm volatile("ldtilecfg %0" : : "m"(config));
    configured_ = true;
  }

  // GCC's intrinsics take literals alone, and tell the compiler nothing of the memory that they read.
  template <int Tile>
  void zero() noexcept {
    asm volatile("{tilezero %%tmm%c0|tilezero tmm%c0}" : : "i"(Tile));
  }
  /// Rows of memory, `stride` bytes apart.
  template <int Tile>
  void load(const void* p, std::size_t stride) noexcept {
    asm volatile("{tileloadd (%0,%1,1), %%tmm%c2|tileloadd tmm%c2, [%0 + %1 * 1]}"
                 :
                 : "r"(p), "r"(stride), "i"(Tile)
                 : "memory");
  }
  template <int Tile>
  void store(void* p, std::size_t stride) noexcept {
    asm volatile("{tilestored %%tmm%c2, (%0,%1,1)|tilestored [%0 + %1 * 1], tmm%c2}"
                 :
                 : "r"(p), "r"(stride), "i"(Tile)
                 : "memory");
  }
  /// int32 [m][n] += int8 [m][4 k] . uint8 [k][n][4], over 4 k.
  template <int Sum, int S8, int U8>
  void dot() noexcept {
    asm volatile("{tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0|tdpbsud tmm%c0, tmm%c1, tmm%c2}"
                 :
                 : "i"(Sum), "i"(S8), "i"(U8));
  }

 private:
  bool configured_ = false;
};

}  // namespace tile_ops
