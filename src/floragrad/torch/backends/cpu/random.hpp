// The random words of a tensor: the Philox4x64-10 stream that numpy.random.Philox(key, counter).random_raw gives.
//
// Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
#pragma once

#include <algorithm>
#include <cstdint>

namespace floragrad {

// The values of _streams.Stream.
enum Stream : uint64_t { MOMENTUM = 0, ACCUMULATOR = 1, STATE_ROUNDING = 2, PARAMETER_ROUNDING = 3,
                         ACCUMULATOR_ROUNDING = 5 };

struct Philox {
  uint64_t key[2];
  uint64_t counter;
  uint64_t stream;

  void block(uint64_t number, uint64_t out[4]) const {
    // NumPy increments the counter before each block.
    uint64_t x[4] = {number + 1, counter, stream, 0}, k[2] = {key[0], key[1]};
    for (int round = 0; round < 10; ++round) {
      const unsigned __int128 first = static_cast<unsigned __int128>(0xD2E7470EE14C6C93u) * x[0];
      const unsigned __int128 second = static_cast<unsigned __int128>(0xCA5A826395121157u) * x[2];
      const uint64_t mixed = static_cast<uint64_t>(second >> 64) ^ x[1] ^ k[0];
      x[2] = static_cast<uint64_t>(first >> 64) ^ x[3] ^ k[1];
      x[1] = static_cast<uint64_t>(second);
      x[3] = static_cast<uint64_t>(first);
      x[0] = mixed;
      k[0] += 0x9E3779B97F4A7C15u;
      k[1] += 0xBB67AE8584CAA73Bu;
    }
    for (int i = 0; i < 4; ++i) out[i] = x[i];
  }

  // Words of 32 bits from index ``first``, the low half of each 64-bit word first.
  void words(uint32_t* out, int64_t count, int64_t first = 0) const {
    uint64_t four[4];
    for (int64_t i = 0; i < count; ++i) {
      const int64_t word = first + i;
      if (i == 0 || word % 8 == 0) block(word / 8, four);
      out[i] = static_cast<uint32_t>(four[word % 8 / 2] >> (word % 2 * 32));
    }
  }

  // +1 and -1, eight to a byte, the highest bit first, bytes in little-endian words.
  void signs(float* out, int64_t count) const {
    uint64_t four[4];
    for (int64_t first = 0; first < count; first += 64) {
      if (first % 256 == 0) block(first / 256, four);
      const uint64_t bits = four[first / 64 % 4];
      const int64_t some = std::min<int64_t>(64, count - first);
      for (int64_t i = 0; i < some; ++i) out[first + i] = bits >> (i ^ 7) & 1 ? 1.f : -1.f;
    }
  }
};

}  // namespace floragrad
