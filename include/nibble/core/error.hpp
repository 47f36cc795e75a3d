// Errors: one hierarchy, and what happens where exceptions are off.
#pragma once

#include <cstddef>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>

#include "nibble/core/abi.hpp"

#if !NIBBLE_EXCEPTIONS
#include <cstdio>
#include <cstdlib>
#endif

namespace nibble {
inline namespace NIBBLE_ABI {

/// Base of every exception that Nibble throws. Under -fno-exceptions the message goes to stderr and the program
/// aborts instead.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// An argument has a wrong shape, range or value; the message names it and says what was expected.
class InvalidArgument : public Error {
 public:
  using Error::Error;
};

/// A file's content breaks the rules of its format.
class FormatError : public Error {
 public:
  using Error::Error;
};

/// The operating system refused: open, map, write, rename.
class IoError : public Error {
 public:
  using Error::Error;
};

/// Valid, but not something this build or this CPU can do.
class Unsupported : public Error {
 public:
  using Error::Error;
};

namespace detail {

template <class E>
[[noreturn]] inline void raise(const std::string& message) {
#if NIBBLE_EXCEPTIONS
  throw E(message);
#else
  std::fprintf(stderr, "nibble: %s\n", message.c_str());
  std::abort();
#endif
}

template <class T>
std::string to_text(const T& value) {
  if constexpr (std::is_same_v<T, bool>)
    return value ? "true" : "false";
  else if constexpr (std::is_arithmetic_v<T>)
    return std::to_string(value);
  else
    return std::string(std::string_view(value));
}

/// Joins the arguments into one message: concat("rows is ", 3, ", expected ", 4).
template <class... Parts>
std::string concat(const Parts&... parts) {
  std::string text;
  ((text += to_text(parts)), ...);
  return text;
}

/// Throws E with the joined message unless `ok`. Parts are formatted only on failure.
template <class E = InvalidArgument, class... Parts>
inline void require(bool ok, const Parts&... parts) {
  if (__builtin_expect(!ok, 0)) raise<E>(concat(parts...));
}

/// a * b, or an error that names `what` when the product does not fit.
inline std::size_t checked_mul(std::size_t a, std::size_t b, std::string_view what) {
  std::size_t product = 0;
  if (__builtin_mul_overflow(a, b, &product)) raise<InvalidArgument>(concat(what, " overflows: ", a, " x ", b));
  return product;
}

/// a + b, or an error that names `what` when the sum does not fit.
inline std::size_t checked_add(std::size_t a, std::size_t b, std::string_view what) {
  std::size_t sum = 0;
  if (__builtin_add_overflow(a, b, &sum)) raise<InvalidArgument>(concat(what, " overflows: ", a, " + ", b));
  return sum;
}

constexpr std::size_t ceil_div(std::size_t a, std::size_t b) { return a / b + (a % b != 0); }
constexpr std::size_t round_up(std::size_t a, std::size_t b) { return ceil_div(a, b) * b; }

}  // namespace detail
}  // namespace NIBBLE_ABI
}  // namespace nibble
