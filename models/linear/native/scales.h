// Scales of stored kernels in the dtypes of files, as float32.
//
// Each thread converts the scales of its own outputs: a step reads the scales of
// no other matrix of a mixture of experts, and makes no copy of all of them.

#ifndef TWO_LIVES_NATIVE_SCALES_H_
#define TWO_LIVES_NATIVE_SCALES_H_

#include <cstdint>
#include <cstring>

#include "floats8.h"
#include "simd.h"
#include "xla/ffi/api/ffi.h"

namespace two_lives {

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
