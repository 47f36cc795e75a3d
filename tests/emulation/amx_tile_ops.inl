// nibble/kernels/amx/tile_ops.inl in plain C++: the same names; tiles are arrays, with the shapes that were configured.
// What the hardware faults on (shapes that do not fit each other, no configuration) aborts here.

namespace tile_ops {

struct alignas(64) Config {
  std::uint8_t palette = 1;
  std::uint8_t start_row = 0;
  std::uint8_t reserved[14] = {};
  std::uint16_t row_bytes[16] = {};
  std::uint8_t rows[16] = {};
};
static_assert(sizeof(Config) == 64, "");

class Tiles {
 public:
  void configure(const Config& config) noexcept {
    need(config.palette == 1 && config.start_row == 0);
    for (std::uint8_t byte : config.reserved) need(byte == 0);
    for (std::size_t t = 0; t < 16; ++t)
      if (t < 8) {
        need(config.rows[t] >= 1 && config.rows[t] <= 16);
        need(config.row_bytes[t] >= 1 && config.row_bytes[t] <= 64);
        tiles_[t] = Tile{};
        tiles_[t].rows = config.rows[t];
        tiles_[t].row_bytes = config.row_bytes[t];
      } else {
        need(config.rows[t] == 0 && config.row_bytes[t] == 0);
      }
    ++configurations;
  }
  template <int T>
  void zero() noexcept {
    std::memset(configured<T>().bytes, 0, sizeof tiles_[T].bytes);
  }
  template <int T>
  void load(const void* p, std::size_t stride) noexcept {
    Tile& tile = configured<T>();
    std::memset(tile.bytes, 0, sizeof tile.bytes);
    for (std::size_t r = 0; r < tile.rows; ++r)
      std::memcpy(tile.bytes[r], static_cast<const std::uint8_t*>(p) + r * stride, tile.row_bytes);
  }
  template <int T>
  void store(void* p, std::size_t stride) noexcept {
    const Tile& tile = configured<T>();
    for (std::size_t r = 0; r < tile.rows; ++r)
      std::memcpy(static_cast<std::uint8_t*>(p) + r * stride, tile.bytes[r], tile.row_bytes);
  }
  template <int Sum, int S8, int U8>
  void dot() noexcept {
    static_assert(Sum != S8 && Sum != U8 && S8 != U8, "");
    Tile& sum = configured<Sum>();
    const Tile& a = configured<S8>();
    const Tile& b = configured<U8>();
    need(sum.rows == a.rows && sum.row_bytes == b.row_bytes);
    need(a.row_bytes % 4 == 0 && b.row_bytes % 4 == 0 && a.row_bytes / 4 == b.rows);
    for (std::size_t m = 0; m < sum.rows; ++m)
      for (std::size_t n = 0; n < sum.row_bytes / 4; ++n) {
        std::uint32_t d;
        std::memcpy(&d, sum.bytes[m] + 4 * n, 4);
        for (std::size_t k = 0; k < b.rows; ++k)
          for (std::size_t j = 0; j < 4; ++j)
            d += static_cast<std::uint32_t>(static_cast<std::int8_t>(a.bytes[m][4 * k + j]) *
                                            b.bytes[k][4 * n + j]);
        std::memcpy(sum.bytes[m] + 4 * n, &d, 4);
      }
    ++dots;
  }

  // What the tests ask: whether the kernels went through tiles at all.
  static inline std::size_t configurations = 0;
  static inline std::size_t dots = 0;

 private:
  struct Tile {
    std::size_t rows = 0;
    std::size_t row_bytes = 0;
    std::uint8_t bytes[16][64] = {};
  };
  static void need(bool fine) noexcept {
    if (!fine) std::abort();
  }
  template <int T>
  Tile& configured() noexcept {
    static_assert(T >= 0 && T < 8, "");
    need(tiles_[T].rows != 0);
    return tiles_[T];
  }

  Tile tiles_[8];
};

}  // namespace tile_ops
