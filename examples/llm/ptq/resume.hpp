// The folder in which a quantization run keeps what is done, so that a killed one goes on where it was.
//
//   plan.json             what the run is: a run that asks for something else does not touch the folder
//   blk.<i>.safetensors   a finished block: a packed file with its matrices, norms and report
//   state.bin             the hidden states that enter a later block: where a run goes on
//
// Every file appears whole or not at all. Blocks behind the state are made again; they come out the same.
#pragma once

#include <Eigen/Core>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "nibble/io/atomic_file.hpp"
#include "nibble/io/mapped_file.hpp"

namespace llm {

/// Hidden states of all calibration windows, a window a matrix, a token a column.
using HiddenStates = std::vector<Eigen::MatrixXf>;

/// FNV-1a over 8 bytes at a time: tells runs apart, guards against nothing.
inline std::uint64_t fingerprint(const void* bytes, std::size_t size) {
  std::uint64_t hash = 0xCBF29CE484222325U;
  const auto* p = static_cast<const unsigned char*>(bytes);
  while (size > 0) {
    std::uint64_t word = 0;
    const std::size_t n = size < 8 ? size : 8;
    std::memcpy(&word, p, n);
    hash = (hash ^ word) * 0x100000001B3U;
    hash ^= hash >> 29;
    p += n;
    size -= n;
  }
  return hash;
}

class ResumeFolder {
 public:
  /// Makes the folder, or takes the one that is there. Throws InvalidArgument where it belongs to a run of another plan.
  ResumeFolder(std::filesystem::path path, const nlohmann::json& plan) : path_(std::move(path)) {
    std::filesystem::create_directories(path_);
    const std::string text = plan.dump(2) + "\n";
    const std::filesystem::path file = path_ / "plan.json";
    if (std::filesystem::exists(file)) {
      std::ifstream in(file, std::ios::binary);
      const std::string found{std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
      nibble::detail::require(found == text, "the folder '", path_.string(),
                              "' holds another run's blocks (see its plan.json): delete it, or name another with "
                              "--resume");
      return;
    }
    nibble::AtomicFile out(file.string());
    out.write(text);
    out.commit();
  }

  std::string block_path(std::size_t block) const {
    return (path_ / ("blk." + std::to_string(block) + ".safetensors")).string();
  }

  /// The block that a run goes on with, and the hidden states that enter it; block 0 where nothing is there.
  /// `streams` are filled with windows of rows x cols each.
  std::size_t load_state(const std::vector<HiddenStates*>& streams, std::size_t windows, Eigen::Index rows,
                         Eigen::Index cols) const {
    const std::filesystem::path file = path_ / "state.bin";
    if (!std::filesystem::exists(file)) return 0;
    const nibble::MappedFile map = nibble::MappedFile::open(file.string());
    const std::size_t matrix = static_cast<std::size_t>(rows * cols) * sizeof(float);
    const Header expected = header_of(0, streams.size(), windows, rows, cols);
    Header header;
    nibble::detail::require<nibble::FormatError>(map.size() == sizeof header + streams.size() * windows * matrix,
                                                 "'", file.string(), "' has ", map.size(), " bytes, expected ",
                                                 sizeof header + streams.size() * windows * matrix);
    std::memcpy(&header, map.data(), sizeof header);
    const std::uint64_t block = header.block;
    header.block = 0;
    nibble::detail::require<nibble::FormatError>(std::memcmp(&header, &expected, sizeof header) == 0, "'",
                                                 file.string(), "' is no state of this run");
    for (std::size_t i = 0; i < block; ++i)
      if (!std::filesystem::exists(block_path(i))) return 0;
    const std::uint8_t* p = map.data() + sizeof header;
    for (HiddenStates* stream : streams) {
      stream->assign(windows, Eigen::MatrixXf(rows, cols));
      for (Eigen::MatrixXf& m : *stream) {
        std::memcpy(m.data(), p, matrix);
        p += matrix;
      }
    }
    return static_cast<std::size_t>(block);
  }

  void save_state(std::size_t block, const std::vector<HiddenStates*>& streams) const {
    const Eigen::MatrixXf& first = streams.front()->front();
    nibble::AtomicFile out((path_ / "state.bin").string());
    const Header header = header_of(block, streams.size(), streams.front()->size(), first.rows(), first.cols());
    out.write(&header, sizeof header);
    for (const HiddenStates* stream : streams)
      for (const Eigen::MatrixXf& m : *stream)
        out.write(m.data(), static_cast<std::size_t>(m.size()) * sizeof(float));
    out.commit();
  }

  /// Removes what the run has put there, and the folder if that leaves it empty.
  void remove(std::size_t blocks) const {
    std::error_code ignored;
    for (std::size_t i = 0; i < blocks; ++i) std::filesystem::remove(block_path(i), ignored);
    std::filesystem::remove(path_ / "state.bin", ignored);
    std::filesystem::remove(path_ / "plan.json", ignored);
    std::filesystem::remove(path_, ignored);
  }

 private:
  struct Header {
    std::uint64_t magic = 0x31455441545351U;
    std::uint64_t block = 0;
    std::uint64_t streams = 0;
    std::uint64_t windows = 0;
    std::uint64_t rows = 0;
    std::uint64_t cols = 0;
  };
  static Header header_of(std::size_t block, std::size_t streams, std::size_t windows, Eigen::Index rows,
                          Eigen::Index cols) {
    Header h;
    h.block = block;
    h.streams = streams;
    h.windows = windows;
    h.rows = static_cast<std::uint64_t>(rows);
    h.cols = static_cast<std::uint64_t>(cols);
    return h;
  }

  std::filesystem::path path_;
};

}  // namespace llm
