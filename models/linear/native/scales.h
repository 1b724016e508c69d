// Scales of stored kernels in the dtypes of files, as float32.
//
// Each thread converts the scales of its own outputs: a step reads the scales of
// no other matrix of a mixture of experts, and makes no copy of all of them.

#ifndef TWO_LIVES_NATIVE_SCALES_H_
#define TWO_LIVES_NATIVE_SCALES_H_

#include <cstdint>
#include <cstring>
#include <limits>

#include "simd.h"
#include "xla/ffi/api/ffi.h"

namespace two_lives {

inline float OfBits(uint32_t bits) {
  float number;
  std::memcpy(&number, &bits, sizeof(number));
  return number;
}

// float8_e4m3fn: 4 bits of exponent, 3 of fraction, no infinity.
inline float OfE4m3(uint8_t bits) {
  const int exponent = bits >> 3 & 15, fraction = bits & 7;
  float number = exponent ? OfBits((exponent + 120u) << 23 | fraction << 20)
                          : fraction * 0x1p-9f;
  if (exponent == 15 && fraction == 7)
    number = std::numeric_limits<float>::quiet_NaN();
  return bits & 128 ? -number : number;
}

// float8_e8m0fnu: an exponent.
inline float OfE8m0(uint8_t bits) {
  if (bits == 255) return std::numeric_limits<float>::quiet_NaN();
  return OfBits(bits ? uint32_t{bits} << 23 : 1u << 22);
}

struct Scales {
  const uint8_t* data;
  xla::ffi::DataType type;
  int64_t size;  // bytes of each
  float gain;    // multiplies all

  // Whether they can be read as they are.
  bool AreFloats() const {
    return type == xla::ffi::DataType::F32 && gain == 1.0f;
  }

  float At(int64_t index) const {
    const uint8_t* from = data + index * size;
    uint16_t half;
    uint32_t whole;
    switch (type) {
      case xla::ffi::DataType::F8E4M3FN:
        return OfE4m3(*from) * gain;
      case xla::ffi::DataType::F8E8M0FNU:
        return OfE8m0(*from) * gain;
      case xla::ffi::DataType::F16:
        return OfHalf(from) * gain;
      case xla::ffi::DataType::BF16:
        std::memcpy(&half, from, sizeof(half));
        return OfBits(uint32_t{half} << 16) * gain;
      default:
        std::memcpy(&whole, from, sizeof(whole));
        return OfBits(whole) * gain;
    }
  }

  // Bytes of a scale of a dtype; 0 for others than the above.
  static int64_t SizeOf(xla::ffi::DataType type) {
    switch (type) {
      case xla::ffi::DataType::F8E4M3FN:
      case xla::ffi::DataType::F8E8M0FNU:
        return 1;
      case xla::ffi::DataType::F16:
      case xla::ffi::DataType::BF16:
        return 2;
      case xla::ffi::DataType::F32:
        return 4;
      default:
        return 0;
    }
  }
};

}  // namespace two_lives

#endif  // TWO_LIVES_NATIVE_SCALES_H_
