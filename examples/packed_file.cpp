// Packs weights once, saves them, and maps them back: the second program neither quantizes nor repacks.
// Needs nlohmann/json, for the file is a safetensors file.
#include <cstdio>
#include <nibble/io/packed_file.hpp>
#include <nibble/nibble.hpp>

int main() {
  const char* path = "example.nibble.safetensors";
  const Eigen::MatrixXf x = Eigen::MatrixXf::Random(512, 4);
  Eigen::MatrixXf expected;
  {
    using Int4 = nibble::Quantizer<nibble::Int4, nibble::Symmetric, nibble::PerGroup<64>, Eigen::half>;
    const nibble::PackedMatrix up = nibble::pack(nibble::quantize<Int4>(Eigen::MatrixXf::Random(1024, 512)));
    expected = up * x;
    nibble::PackedFileWriter writer(path);
    writer.add("layer.up", up);
    writer.add_metadata("author", "example");
    writer.commit();  // until here the old file, if there was one, is untouched
  }

  const nibble::PackedFile file = nibble::PackedFile::open(path);
  const nibble::PackedMatrix& up = file.matrix("layer.up");
  std::printf("%td x %td, %zu bytes, in the mapped file: %s\n", up.rows(), up.cols(), up.byte_size(),
              up.codes().borrowed() ? "yes" : "no");
  const bool same = up * x == expected;
  std::printf("the same product, to the bit: %s\n", same ? "yes" : "no");

  // Rows come back without unpacking the rest, as an embedding needs it; and the whole, exactly.
  Eigen::VectorXf row(up.cols());
  up.dequantize_row(7, row.data());
  const bool exact = row.transpose() == up.dequantize().row(7);
  std::remove(path);
  return same && exact && up.codes().borrowed() ? 0 : 1;
}
