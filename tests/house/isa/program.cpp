// Prints the ISA that runs and a number out of the bits of many products: compared between machines and ISAs.
#include <cinttypes>
#include <cstdio>
#include <string>

#include "../probe.hpp"

int main() {
  const std::string isa(nibble::name_of(nibble::active_isa()));
  std::printf("isa=%s hash=%016" PRIx64 "\n", isa.c_str(), probe::run());
}
