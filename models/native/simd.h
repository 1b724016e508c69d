// Sixteen float32 lanes, and how codes of 8 bits become them.
//
// Every build computes lane by lane with the same operations in the same order:
// AVX-512 in one register, AVX2 in two, plain C++ in an array. Builds with
// fused multiply-add have equal bits; plain C++ rounds twice where they round
// once.

#ifndef TWO_LIVES_NATIVE_SIMD_H_
#define TWO_LIVES_NATIVE_SIMD_H_

#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define TWO_LIVES_AVX512 1
#elif defined(__AVX2__) && defined(__FMA__)
#define TWO_LIVES_AVX2 1
#endif

#define TWO_LIVES_INLINE inline __attribute__((always_inline))

namespace two_lives {

constexpr int kLanes = 16;

// The upper half of a float32.
struct Bfloat16 {
  uint16_t bits;
};

// Sixteen codes of 8 bits; compilers have & | ^ + - and shifts of them.
typedef uint8_t Codes __attribute__((vector_size(16)));

TWO_LIVES_INLINE Codes LoadCodes(const void* from) {
  Codes codes;
  std::memcpy(&codes, from, sizeof(codes));
  return codes;
}

#if defined(TWO_LIVES_AVX512)

constexpr const char* kInstructions = "avx512";
constexpr int kRegisters = 32;  // each of a Vec
typedef __m512 Vec;

TWO_LIVES_INLINE Vec Zero() { return _mm512_setzero_ps(); }
TWO_LIVES_INLINE Vec Set(float x) { return _mm512_set1_ps(x); }
TWO_LIVES_INLINE Vec Load(const float* from) { return _mm512_loadu_ps(from); }
TWO_LIVES_INLINE void Store(float* to, Vec a) { _mm512_storeu_ps(to, a); }
TWO_LIVES_INLINE Vec Mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
TWO_LIVES_INLINE Vec MulAdd(Vec a, Vec b, Vec c) {
  return _mm512_fmadd_ps(a, b, c);
}
TWO_LIVES_INLINE Vec OfUnsigned(Codes codes) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32((__m128i)codes));
}
TWO_LIVES_INLINE Vec OfSigned(Codes codes) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32((__m128i)codes));
}
TWO_LIVES_INLINE Vec LoadFloats(const Bfloat16* from) {
  const __m256i bits = _mm256_loadu_si256((const __m256i*)from);
  return _mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
// The numbers of the low four bits of 16 bytes in a table of 16, and of the high
// ones.
TWO_LIVES_INLINE void LookUpBoth(Codes bytes, Vec table, Vec* low, Vec* high) {
  // A permutation has 16 entries: it reads the low four bits of an index alone.
  const __m512i codes = _mm512_cvtepu8_epi32((__m128i)bytes);
  *low = _mm512_permutexvar_ps(codes, table);
  *high = _mm512_permutexvar_ps(_mm512_srli_epi32(codes, 4), table);
}
// Eight lanes of one number, eight of another.
TWO_LIVES_INLINE Vec Halves(float first, float second) {
  return _mm512_mask_blend_ps(0xff00, Set(first), Set(second));
}

#elif defined(TWO_LIVES_AVX2)

constexpr const char* kInstructions = "avx2";
constexpr int kRegisters = 8;
struct Vec {
  __m256 low, high;
};

TWO_LIVES_INLINE Vec Zero() {
  return {_mm256_setzero_ps(), _mm256_setzero_ps()};
}
TWO_LIVES_INLINE Vec Set(float x) {
  return {_mm256_set1_ps(x), _mm256_set1_ps(x)};
}
TWO_LIVES_INLINE Vec Load(const float* from) {
  return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)};
}
TWO_LIVES_INLINE void Store(float* to, Vec a) {
  _mm256_storeu_ps(to, a.low);
  _mm256_storeu_ps(to + 8, a.high);
}
TWO_LIVES_INLINE Vec Mul(Vec a, Vec b) {
  return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)};
}
TWO_LIVES_INLINE Vec MulAdd(Vec a, Vec b, Vec c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low),
          _mm256_fmadd_ps(a.high, b.high, c.high)};
}
TWO_LIVES_INLINE __m128i HighHalf(Codes codes) {
  return _mm_srli_si128((__m128i)codes, 8);
}
TWO_LIVES_INLINE Vec OfUnsigned(Codes codes) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32((__m128i)codes)),
          _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(HighHalf(codes)))};
}
TWO_LIVES_INLINE Vec OfSigned(Codes codes) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32((__m128i)codes)),
          _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(HighHalf(codes)))};
}
TWO_LIVES_INLINE __m256 LoadEight(const Bfloat16* from) {
  const __m128i bits = _mm_loadu_si128((const __m128i*)from);
  return _mm256_castsi256_ps(
      _mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
TWO_LIVES_INLINE Vec LoadFloats(const Bfloat16* from) {
  return {LoadEight(from), LoadEight(from + 8)};
}
TWO_LIVES_INLINE __m256 LookUpEight(__m256i codes, Vec table) {
  // A permutation has 8 entries: both halves of the table, and bit 3 chooses.
  __m256 first = _mm256_permutevar8x32_ps(table.low, codes);
  __m256 second = _mm256_permutevar8x32_ps(table.high, codes);
  __m256 choice = _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28));
  return _mm256_blendv_ps(first, second, choice);
}
TWO_LIVES_INLINE void LookUpBoth(Codes bytes, Vec table, Vec* low, Vec* high) {
  const __m256i first = _mm256_cvtepu8_epi32((__m128i)bytes);
  const __m256i second = _mm256_cvtepu8_epi32(HighHalf(bytes));
  *low = {LookUpEight(first, table), LookUpEight(second, table)};
  *high = {LookUpEight(_mm256_srli_epi32(first, 4), table),
           LookUpEight(_mm256_srli_epi32(second, 4), table)};
}
TWO_LIVES_INLINE Vec Halves(float first, float second) {
  return {_mm256_set1_ps(first), _mm256_set1_ps(second)};
}

#else

constexpr const char* kInstructions = "plain";
constexpr int kRegisters = 8;
struct Vec {
  float lane[kLanes];
};

#define TWO_LIVES_EACH(expression)                   \
  Vec result;                                        \
  for (int i = 0; i < kLanes; ++i) result.lane[i] = (expression); \
  return result
TWO_LIVES_INLINE Vec Set(float x) { TWO_LIVES_EACH(x); }
TWO_LIVES_INLINE Vec Zero() { return Set(0.0f); }
TWO_LIVES_INLINE Vec Load(const float* from) { TWO_LIVES_EACH(from[i]); }
TWO_LIVES_INLINE void Store(float* to, Vec a) {
  std::memcpy(to, a.lane, sizeof(a.lane));
}
TWO_LIVES_INLINE Vec Mul(const Vec& a, const Vec& b) {
  TWO_LIVES_EACH(a.lane[i] * b.lane[i]);
}
TWO_LIVES_INLINE Vec MulAdd(const Vec& a, const Vec& b, const Vec& c) {
  TWO_LIVES_EACH(a.lane[i] * b.lane[i] + c.lane[i]);
}
TWO_LIVES_INLINE Vec OfUnsigned(Codes codes) {
  TWO_LIVES_EACH(static_cast<float>(codes[i]));
}
TWO_LIVES_INLINE Vec OfSigned(Codes codes) {
  TWO_LIVES_EACH(static_cast<float>(static_cast<int8_t>(codes[i])));
}
TWO_LIVES_INLINE float OneFloat(const Bfloat16* from);
TWO_LIVES_INLINE Vec LoadFloats(const Bfloat16* from) {
  TWO_LIVES_EACH(OneFloat(from + i));
}
TWO_LIVES_INLINE void LookUpBoth(Codes bytes, const Vec& table, Vec* low,
                                 Vec* high) {
  for (int i = 0; i < kLanes; ++i) {
    low->lane[i] = table.lane[bytes[i] & 15];
    high->lane[i] = table.lane[bytes[i] >> 4];
  }
}
TWO_LIVES_INLINE Vec Halves(float first, float second) {
  TWO_LIVES_EACH(i < kLanes / 2 ? first : second);
}
#undef TWO_LIVES_EACH

#endif

// The number of each code of four bits.
TWO_LIVES_INLINE Vec CodesAsNumbers() {
  static constexpr float kNumbers[kLanes] = {0, 1, 2,  3,  4,  5,  6,  7,
                                             8, 9, 10, 11, 12, 13, 14, 15};
  return Load(kNumbers);
}

// A buffer that begins at a cache line: a vector that lies across two lines takes
// two reads.
class Floats {
 public:
  // Makes room for `size` numbers, which are not cleared.
  float* Room(size_t size) {
    if (size > size_) {
      numbers_.reset(static_cast<float*>(
          ::operator new(size * sizeof(float), std::align_val_t{kLine})));
      size_ = size;
    }
    return numbers_.get();
  }

 private:
  static constexpr size_t kLine = 64;
  struct Delete {
    void operator()(float* numbers) {
      ::operator delete(numbers, std::align_val_t{kLine});
    }
  };
  std::unique_ptr<float, Delete> numbers_;
  size_t size_ = 0;
};

TWO_LIVES_INLINE Vec LoadFloats(const float* from) { return Load(from); }
TWO_LIVES_INLINE float OneFloat(const float* from) { return *from; }
TWO_LIVES_INLINE float OneFloat(const Bfloat16* from) {
  const uint32_t bits = static_cast<uint32_t>(from->bits) << 16;
  float number;
  std::memcpy(&number, &bits, sizeof(number));
  return number;
}

// a * b + c, with the roundings of `MulAdd`.
TWO_LIVES_INLINE float MulAddOne(float a, float b, float c) {
#if defined(TWO_LIVES_AVX512) || defined(TWO_LIVES_AVX2)
  return std::fma(a, b, c);
#else
  return a * b + c;
#endif
}

// The sum of all lanes, halves first: the same order in every build.
TWO_LIVES_INLINE float Sum(Vec a) {
#if defined(TWO_LIVES_AVX512)
  __m256 eight = _mm256_add_ps(
      _mm512_castps512_ps256(a),
      _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(a), 1)));
#elif defined(TWO_LIVES_AVX2)
  __m256 eight = _mm256_add_ps(a.low, a.high);
#endif
#if defined(TWO_LIVES_AVX512) || defined(TWO_LIVES_AVX2)
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight),
                           _mm256_extractf128_ps(eight, 1));
  __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
#else
  for (int half = kLanes / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) a.lane[i] += a.lane[i + half];
  return a.lane[0];
#endif
}

// The numbers of all float16. A scale that is read from this table costs no
// instruction of the units that multiply, which decoding keeps busy; the few
// that a model has stay in a cache.
struct HalfNumbers {
  float numbers[1 << 16];

  HalfNumbers() {
    for (int half = 0; half < 1 << 16; ++half) {
      const float sign = half & 0x8000 ? -1.0f : 1.0f;
      const int exponent = half >> 10 & 31, mantissa = half & 1023;
      float magnitude;
      if (exponent == 31)
        magnitude = mantissa ? NAN : INFINITY;
      else if (exponent)
        magnitude = std::ldexp(1024.0f + mantissa, exponent - 25);
      else  // below the smallest normal number there is no hidden bit
        magnitude = std::ldexp(static_cast<float>(mantissa), -24);
      numbers[half] = sign * magnitude;
    }
  }
};
static const HalfNumbers kHalfNumbers;

// Of a float16, 2 bytes that may lie anywhere.
TWO_LIVES_INLINE float OfHalf(const uint8_t* from) {
  uint16_t half;
  std::memcpy(&half, from, sizeof(half));
  return kHalfNumbers.numbers[half];
}

// 16 in each byte whose bit is set, 0 elsewhere.
TWO_LIVES_INLINE Codes SixteenWhere(uint16_t bits) {
#if defined(TWO_LIVES_AVX512)
  return (Codes)_mm_maskz_set1_epi8(bits, 16);
#elif defined(TWO_LIVES_AVX2)
  const __m128i spread =
      _mm_shuffle_epi8(_mm_cvtsi32_si128(bits),
                       _mm_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1,
                                     1, 1));
  const __m128i bit = _mm_set1_epi64x(0x8040201008040201ll);
  const __m128i is_set = _mm_cmpeq_epi8(_mm_and_si128(spread, bit), bit);
  return (Codes)_mm_and_si128(is_set, _mm_set1_epi8(16));
#else
  Codes codes;
  for (int i = 0; i < 16; ++i) codes[i] = (bits >> i & 1) << 4;
  return codes;
#endif
}

}  // namespace two_lives

#endif  // TWO_LIVES_NATIVE_SIMD_H_
