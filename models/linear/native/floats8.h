// Numbers of 8 bits as float32, exactly: e4m3 of kernels and scales, e8m0 of
// scales.

#ifndef TWO_LIVES_NATIVE_FLOATS8_H_
#define TWO_LIVES_NATIVE_FLOATS8_H_

#include <cstdint>
#include <cstring>
#include <limits>

#include "simd.h"

namespace two_lives {

constexpr float kNotANumber = std::numeric_limits<float>::quiet_NaN();

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
  if (exponent == 15 && fraction == 7) number = kNotANumber;
  return bits & 128 ? -number : number;
}

// float8_e8m0fnu: an exponent.
inline float OfE8m0(uint8_t bits) {
  if (bits == 255) return kNotANumber;
  return OfBits(bits ? uint32_t{bits} << 23 : 1u << 22);
}

#if defined(TWO_LIVES_AVX512)

// The bits are those of a float16 that is 2^8 too small. This conversion is exact
// where a processor takes small float32 numbers for 0, too.
TWO_LIVES_INLINE Vec OfE4m3(Codes codes) {
  const __m256i wide = _mm256_cvtepu8_epi16((__m128i)codes);
  const __m256i magnitude =
      _mm256_slli_epi16(_mm256_and_si256(wide, _mm256_set1_epi16(127)), 7);
  const __m256i sign =
      _mm256_slli_epi16(_mm256_and_si256(wide, _mm256_set1_epi16(128)), 8);
  const Vec numbers = Mul(_mm512_cvtph_ps(_mm256_or_si256(magnitude, sign)),
                          Set(256.0f));
  const __mmask16 are_none = _mm_cmpeq_epi8_mask((__m128i)(codes & 127),
                                                 _mm_set1_epi8(127));
  return _mm512_mask_mov_ps(numbers, are_none, Set(kNotANumber));
}

#elif defined(TWO_LIVES_AVX2)

TWO_LIVES_INLINE __m256 EightOfE4m3(__m128i codes) {
  const __m256i wide = _mm256_cvtepu8_epi32(codes);
  const __m256i magnitude = _mm256_and_si256(wide, _mm256_set1_epi32(127));
  const __m256i sign = _mm256_slli_epi32(_mm256_xor_si256(wide, magnitude), 24);
  const __m256 normal = _mm256_castsi256_ps(_mm256_add_epi32(
      _mm256_slli_epi32(magnitude, 20), _mm256_set1_epi32(120 << 23)));
  const __m256 small = _mm256_mul_ps(_mm256_cvtepi32_ps(magnitude),
                                     _mm256_set1_ps(0x1p-9f));
  const __m256i is_small =
      _mm256_cmpgt_epi32(_mm256_set1_epi32(8), magnitude);
  const __m256i is_none =
      _mm256_cmpeq_epi32(_mm256_set1_epi32(127), magnitude);
  const __m256 finite =
      _mm256_blendv_ps(normal, small, _mm256_castsi256_ps(is_small));
  return _mm256_or_ps(
      _mm256_or_ps(finite, _mm256_castsi256_ps(is_none)),  // all bits: a NaN
      _mm256_castsi256_ps(sign));
}
TWO_LIVES_INLINE Vec OfE4m3(Codes codes) {
  return {EightOfE4m3((__m128i)codes), EightOfE4m3(HighHalf(codes))};
}

#else

TWO_LIVES_INLINE Vec OfE4m3(Codes codes) {
  Vec numbers;
  for (int i = 0; i < kLanes; ++i) numbers.lane[i] = OfE4m3(uint8_t{codes[i]});
  return numbers;
}

#endif

}  // namespace two_lives

#endif  // TWO_LIVES_NATIVE_FLOATS8_H_
