// Mapped files and atomic writes: what the operating system refuses, and what a kill or a full disk leaves behind.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <sched.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/stat.h>

#include <csignal>
#include <string>

#include "io_test_support.hpp"
#include "nibble/io/atomic_file.hpp"
#include "nibble/io/mapped_file.hpp"

namespace {

using namespace io_test;
using nibble::AtomicFile;
using nibble::IoError;
using nibble::MappedFile;

Bytes text(const std::string& s) { return Bytes(s.begin(), s.end()); }

TEST(MappedFile, MapsTheWholeFileAndOutlivesItsPathAndItself) {
  const TempFolder folder;
  const std::string path = folder.file("data");
  Bytes bytes(100001);
  for (std::size_t i = 0; i < bytes.size(); ++i) bytes[i] = static_cast<std::uint8_t>(i * 7 + i / 251);
  write_file(path, bytes);
  for (const auto access : {nibble::MapAccess::normal, nibble::MapAccess::sequential, nibble::MapAccess::random,
                            nibble::MapAccess::will_need}) {
    for (const bool populate : {false, true}) {
      nibble::Buffer tail;
      {
        const MappedFile file = MappedFile::open(path, {access, populate});
        ASSERT_EQ(file.size(), bytes.size());
        EXPECT_EQ(file.path(), path);
        EXPECT_EQ(std::memcmp(file.data(), bytes.data(), bytes.size()), 0);
        file.release(1, file.size());  // dropped pages are read again
        EXPECT_EQ(std::memcmp(file.data(), bytes.data(), bytes.size()), 0);
        file.release(bytes.size() + 1, 5);
        tail = file.buffer(99999, 2);
        expect_error<nibble::InvalidArgument>([&] { file.buffer(100000, 2); }, {path, "100001"});
        expect_error<nibble::InvalidArgument>([&] { file.buffer(100002, 0); });
        expect_error<nibble::InvalidArgument>([&] { file.buffer(1, SIZE_MAX); });
      }
      EXPECT_EQ(tail.data()[1], bytes.back());
      EXPECT_TRUE(tail.borrowed());
    }
  }
  const MappedFile kept = MappedFile::open(path);
  ::unlink(path.c_str());
  EXPECT_EQ(kept.data()[100000], bytes.back());
}

TEST(MappedFile, EmptyFilesAndWhatIsNoFile) {
  const TempFolder folder;
  write_file(folder.file("empty"), {});
  const MappedFile empty = MappedFile::open(folder.file("empty"));
  EXPECT_EQ(empty.size(), 0U);
  EXPECT_EQ(empty.buffer().size(), 0U);
  EXPECT_EQ(MappedFile().size(), 0U);
  expect_error<IoError>([&] { MappedFile::open(folder.file("missing")); },
                        {folder.file("missing"), "No such file"});
  expect_error<IoError>([&] { MappedFile::open(folder.path()); }, {folder.path(), "directory"});
  expect_error<IoError>([&] { MappedFile::open("/dev/null"); }, {"/dev/null", "regular"});
  ASSERT_EQ(::mkfifo(folder.file("pipe").c_str(), 0600), 0);
  expect_error<IoError>([&] { MappedFile::open(folder.file("pipe")); }, {"pipe", "regular"});  // does not wait
}

TEST(AtomicFile, ReplacesOnlyAtCommit) {
  const TempFolder folder;
  const std::string path = folder.file("out");
  write_file(path, text("old"));
  {
    AtomicFile file(path);
    file.write("new content");
    EXPECT_EQ(read_file(path), text("old"));
  }
  EXPECT_EQ(read_file(path), text("old"));
  EXPECT_EQ(folder.count(), 1U);  // the temporary is gone
  {
    AtomicFile file(path);
    Bytes expected = text("head");
    file.write("head");
    Bytes big(700000);
    for (std::size_t i = 0; i < big.size(); ++i) big[i] = static_cast<std::uint8_t>(i % 253);
    for (const std::size_t n : {std::size_t{1}, std::size_t{262143}, std::size_t{262144}, std::size_t{700000}}) {
      file.write(big.data(), n);
      expected.insert(expected.end(), big.begin(), big.begin() + static_cast<std::ptrdiff_t>(n));
    }
    file.write_zeros(10000);
    expected.resize(expected.size() + 10000);
    EXPECT_EQ(file.position(), expected.size());
    file.write_at(expected.size() + 3, "end", 3);
    file.commit();
    expected.resize(expected.size() + 3);
    append_text(expected, "end");
    const Bytes got = read_file(path);
    ASSERT_EQ(got.size(), expected.size());
    EXPECT_TRUE(got == expected);
    expect_error<nibble::InvalidArgument>([&] { file.write("more"); }, {path});
    expect_error<nibble::InvalidArgument>([&] { file.commit(); });
  }
  EXPECT_EQ(folder.count(), 1U);
}

TEST(AtomicFile, NewFilesFollowTheUmaskAndOldOnesKeepTheirMode) {
  const TempFolder folder;
  const auto mode = [](const std::string& path) {
    struct stat status;
    return ::stat(path.c_str(), &status) == 0 ? status.st_mode & 07777U : 0U;
  };
  const mode_t before = ::umask(027);
  {
    AtomicFile file(folder.file("fresh"));
    file.commit();
  }
  EXPECT_EQ(mode(folder.file("fresh")), 0640U);
  ::chmod(folder.file("fresh").c_str(), 0606);
  {
    AtomicFile file(folder.file("fresh"));
    file.commit();
  }
  ::umask(before);
  EXPECT_EQ(mode(folder.file("fresh")), 0606U);
}

TEST(AtomicFile, FollowsLinksAndRefusesWhatIsNoFile) {
  const TempFolder folder;
  write_file(folder.file("target"), text("old"));
  ASSERT_EQ(::symlink("target", folder.file("link").c_str()), 0);
  {
    AtomicFile file(folder.file("link"));
    file.write("new");
    file.commit();
  }
  EXPECT_EQ(read_file(folder.file("target")), text("new"));
  EXPECT_TRUE(std::filesystem::is_symlink(folder.file("link")));
  ASSERT_EQ(::symlink("nowhere", folder.file("broken").c_str()), 0);
  expect_error<IoError>([&] { AtomicFile(folder.file("broken")); }, {"broken"});
  expect_error<IoError>([&] { AtomicFile("/dev/full"); }, {"/dev/full", "regular"});
  expect_error<IoError>([&] { AtomicFile(folder.path()); }, {folder.path()});
  expect_error<IoError>([&] { AtomicFile(folder.file("no/such/folder")); }, {"no/such/folder", "No such file"});
  EXPECT_EQ(folder.count(), 3U);
}

TEST(AtomicFile, MovesWithItsTemporary) {
  const TempFolder folder;
  {
    AtomicFile first(folder.file("out"));
    first.write("content");
    AtomicFile second(std::move(first));
    expect_error<nibble::InvalidArgument>([&] { first.write("x"); });
    second.commit();
  }
  EXPECT_EQ(read_file(folder.file("out")), text("content"));
  EXPECT_EQ(folder.count(), 1U);
}

// Runs f in a child process and gives its wait status.
template <class F>
int in_child(F&& f) {
  const pid_t child = ::fork();
  if (child == 0) {
    f();
    ::_exit(0);
  }
  int status = 0;
  EXPECT_EQ(::waitpid(child, &status, 0), child);
  return status;
}

// A size limit stands in for a full disk: write() fails in the same place, with EFBIG in place of ENOSPC.
TEST(AtomicFile, ADiskThatFillsLeavesTheOldFile) {
  const TempFolder folder;
  const std::string path = folder.file("out");
  for (const int how : {0, 1, 2}) {
    write_file(path, text("old"));
    const int status = in_child([&] {
      ::signal(SIGXFSZ, SIG_IGN);
      const rlimit limit{100000, 100000};
      ::setrlimit(RLIMIT_FSIZE, &limit);
      try {
        AtomicFile file(path);
        const Bytes big(how == 0 ? 1000000 : 150000);
        if (how == 2)
          file.write_at(50000, big.data(), big.size());
        else
          file.write(big.data(), big.size());  // how 1: still in the buffer, fails at commit
        file.commit();
        ::_exit(1);
      } catch (const IoError& error) {
        ::_exit(std::string(error.what()).find(path) == std::string::npos ? 2 : 7);
      }
    });
    EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 7) << how << " " << status;
    EXPECT_EQ(read_file(path), text("old"));
    EXPECT_EQ(folder.count(), 1U);
  }
}

// The real thing: a tmpfs of 64 KiB in a mount namespace of its own, where the system lets us have one.
TEST(AtomicFile, AFullTmpfsLeavesTheOldFile) {
  const TempFolder folder;
  const std::string path = folder.file("out");
  constexpr int no_mount = 9, refused = 7;
  const int status = in_child([&] {
    if (::unshare(CLONE_NEWNS) != 0 && ::unshare(CLONE_NEWUSER | CLONE_NEWNS) != 0) ::_exit(no_mount);
    if (::mount("none", "/", nullptr, MS_REC | MS_PRIVATE, nullptr) != 0) ::_exit(no_mount);
    if (::mount("none", folder.path().c_str(), "tmpfs", 0, "size=65536") != 0) ::_exit(no_mount);
    write_file(path, text("old"));
    bool named = false;
    try {
      AtomicFile file(path);
      const Bytes big(1000000);
      file.write(big.data(), big.size());
      file.commit();
    } catch (const IoError& error) {
      named = std::string(error.what()).find("No space left") != std::string::npos;
    }
    ::_exit(named && read_file(path) == text("old") && folder.count() == 1 ? refused : 1);
  });
  ASSERT_TRUE(WIFEXITED(status)) << status;
  if (WEXITSTATUS(status) == no_mount) GTEST_SKIP() << "no tmpfs can be mounted here";
  EXPECT_EQ(WEXITSTATUS(status), refused);
}

TEST(AtomicFile, AFailedWriteIsNotForgotten) {
  const TempFolder folder;
  const std::string path = folder.file("out");
  const int status = in_child([&] {
    ::signal(SIGXFSZ, SIG_IGN);
    const rlimit limit{100000, 100000};
    ::setrlimit(RLIMIT_FSIZE, &limit);
    int errors = 0;
    {
      AtomicFile file(path);
      const Bytes big(1000000);
      for (int attempt = 0; attempt < 2; ++attempt) {
        try {
          if (attempt == 0) file.write(big.data(), big.size());
          file.commit();
        } catch (const IoError&) {
          ++errors;
        }
      }
    }
    ::_exit(errors);
  });
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 2) << status;
  EXPECT_EQ(folder.count(), 0U);
}

TEST(AtomicFile, AKillLeavesTheOldFile) {
  const TempFolder folder;
  const std::string path = folder.file("out");
  write_file(path, text("old"));
  const int status = in_child([&] {
    AtomicFile file(path);
    const Bytes big(1000000);
    file.write(big.data(), big.size());
    ::kill(::getpid(), SIGKILL);
  });
  EXPECT_TRUE(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
  EXPECT_EQ(read_file(path), text("old"));
  EXPECT_EQ(folder.count(), 2U);  // the temporary stays, and is in nobody's way
  AtomicFile file(path);
  file.write("new");
  file.commit();
  EXPECT_EQ(read_file(path), text("new"));
}

}  // namespace
