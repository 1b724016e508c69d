// The forms of stored kernels: how the bytes of a row become float32 weights.
//
// A form decodes blocks of a row in pieces of 32 weights, two vectors each. The
// weights are those of `models/linear/stored/`: code times scale, rounded to
// float32, plus or minus a minimum.
//
// Layouts: models/linear/stored/kernel.py, block_kinds.py and super_blocks.py.

#ifndef TWO_LIVES_NATIVE_FORMATS_H_
#define TWO_LIVES_NATIVE_FORMATS_H_

#include <cstdint>

#include "floats8.h"
#include "simd.h"

namespace two_lives {

constexpr int kPiece = 32;  // weights that are decoded together

// A matrix as it is stored.
struct Matrix {
  const uint8_t* data;
  int64_t row_bytes;
  int64_t rows;     // of the store: outputs
  int64_t columns;  // inputs
  // Of forms whose scales lie apart, float32.
  const float* scales;
  int64_t first_tile;  // the tile of the first of `scales`
  const float* mins;   // null: none
  int64_t tile_out, tile_in, tiles_in;
  int tile_shift;  // of a tile_in that is a power of two, else -1

  // The tile of an input. A division would take as long as 32 weights.
  TWO_LIVES_INLINE int64_t TileOf(int64_t input) const {
    return tile_shift < 0 ? input / tile_in : input >> tile_shift;
  }
  const float* book;  // of codes of four bits
};

struct Weights {
  Vec first, second;
};

// --- Kernels whose scales lie apart -----------------------------------------

enum class Tiles {
  kWhole,     // a piece has one scale: tiles of 32, 64... inputs, or whole rows
  kWithMins,  // the same, and a minimum; packed codes check this at run time
  kFour,      // four pieces have one scale: tiles of 128, 256... inputs, or whole
              // rows; so one table serves 128 packed codes
  kAny,       // tiles of 16, 48... inputs; with minima or without
};

enum class Values {
  kSigned,  // a byte each
  kE4m3,    // the same
  kPacked,  // two per byte
};

// Packed codes are decoded as they lie: the first vector has the low bits of 16
// bytes, which are the even inputs, and the second the high bits, the odd ones.
// The inputs are ordered in the same way before the product: `OrderPacked`.
template <Values kValues, Tiles kTiles>
struct Apart {
  static constexpr bool kIsPacked = kValues == Values::kPacked;
  static constexpr bool kHasRest = true;  // rows may have any length
  static constexpr bool kIsEvenOdd = kIsPacked;
  static constexpr int kPieces = kTiles == Tiles::kFour ? 4 : 1;
  static constexpr bool kMayHaveMins = kIsPacked || kTiles != Tiles::kWhole;
  static constexpr int kPieceBytes = kIsPacked ? kPiece / 2 : kPiece;
  static constexpr int kBytes = kPieces * kPieceBytes;

  struct Block {
    const uint8_t* data;
    Weights scales, mins;
    bool has_mins;
    Vec table;  // of packed codes whose 32 inputs share one scale
  };

  static TWO_LIVES_INLINE Block At(const Matrix& m, int64_t row, int64_t block) {
    const int64_t of_row = m.tile_out == 1 ? row : row / m.tile_out;
    const int64_t k = block * kPieces * kPiece;
    const int64_t first = m.tiles_in > 1 ? m.TileOf(k) : 0;
    const int64_t tile = of_row * m.tiles_in + first;
    int64_t next = 0;  // the tile of the second 16 inputs, from the first one
    if (kTiles == Tiles::kAny && m.tiles_in > 1) {
      int64_t second = m.TileOf(k + kLanes);
      // The last 16 inputs may be beyond the row.
      if (second >= m.tiles_in) second = m.tiles_in - 1;
      next = second - first;
    }
    Block found;
    found.data = m.data + row * m.row_bytes + block * kBytes;
    found.scales = OfTiles(m.scales + (tile - m.first_tile), next);
    found.has_mins = kMayHaveMins && m.mins;
    if (found.has_mins) found.mins = OfTiles(m.mins + tile, next);
    if constexpr (kIsPacked) {
      found.table = Load(m.book);
      // A number of the table times the scale has the bits that it has when it
      // is multiplied for each weight.
      if constexpr (kTiles != Tiles::kAny)
        found.table = Scaled(found, {found.table, found.table}).first;
    }
    return found;
  }

  // The numbers of the tiles that the inputs of two vectors are of.
  static TWO_LIVES_INLINE Weights OfTiles(const float* numbers, int64_t next) {
    const Vec first = Set(numbers[0]);
    if constexpr (kTiles != Tiles::kAny) return {first, first};
    if constexpr (kIsPacked) {
      const Vec both = Halves(numbers[0], numbers[next]);
      return {both, both};
    }
    return {first, Set(numbers[next])};
  }

  static TWO_LIVES_INLINE Weights Scaled(const Block& b, Weights w) {
    w = {Mul(w.first, b.scales.first), Mul(w.second, b.scales.second)};
    if (kMayHaveMins && b.has_mins) {
      w.first = MulAdd(Set(1.0f), w.first, b.mins.first);
      w.second = MulAdd(Set(1.0f), w.second, b.mins.second);
    }
    return w;
  }

  static TWO_LIVES_INLINE Weights Piece(const Block& b, int piece) {
    const uint8_t* data = b.data + piece * kPieceBytes;
    Weights w;
    if constexpr (kIsPacked) {
      LookUpBoth(LoadCodes(data), b.table, &w.first, &w.second);
      return kTiles == Tiles::kAny ? Scaled(b, w) : w;
    }
    const Codes first = LoadCodes(data), second = LoadCodes(data + kLanes);
    if constexpr (kValues == Values::kE4m3)
      return Scaled(b, {OfE4m3(first), OfE4m3(second)});
    return Scaled(b, {OfSigned(first), OfSigned(second)});
  }
};

// Inputs in the order in which packed codes are decoded, zeros beyond the end.
inline void OrderPacked(const float* x, int64_t columns, float* ordered) {
  int64_t k = 0;
  for (; k + kPiece <= columns; k += kPiece)
    for (int i = 0; i < kLanes; ++i) {
      ordered[k + i] = x[k + 2 * i];
      ordered[k + kLanes + i] = x[k + 2 * i + 1];
    }
  for (int i = 0; k + i < columns; ++i)
    ordered[k + i % 2 * kLanes + i / 2] = x[k + i];
}

// --- Blocks of 32 weights ----------------------------------------------------

struct Block32 {
  const uint8_t* data;
};

template <class Form>
struct Blocks32 {
  static constexpr bool kHasRest = false, kIsEvenOdd = false;
  static constexpr int kPieces = 1;
  typedef Block32 Block;
  static TWO_LIVES_INLINE Block At(const Matrix& m, int64_t row, int64_t block) {
    return {m.data + row * m.row_bytes + block * Form::kBytes};
  }
};

// Both nibbles of 16 bytes: the low ones are the first weights.
TWO_LIVES_INLINE Weights OfNibbles(Codes bytes, Vec table) {
  Weights w;
  LookUpBoth(bytes, table, &w.first, &w.second);
  return w;
}

TWO_LIVES_INLINE Weights ScaledPlus(Codes first, Codes second, Vec scale,
                                    Vec minimum) {
  return {MulAdd(OfUnsigned(first), scale, minimum),
          MulAdd(OfUnsigned(second), scale, minimum)};
}

struct Q8_0 : Blocks32<Q8_0> {
  static constexpr int kBytes = 34;
  static TWO_LIVES_INLINE Weights Piece(const Block& b, int) {
    const Vec scale = Set(OfHalf(b.data));
    return {Mul(OfSigned(LoadCodes(b.data + 2)), scale),
            Mul(OfSigned(LoadCodes(b.data + 18)), scale)};
  }
};

struct Q4_0 : Blocks32<Q4_0> {
  static constexpr int kBytes = 18;
  static TWO_LIVES_INLINE Weights Piece(const Block& b, int) {
    const Vec scale = Set(OfHalf(b.data));
    const Vec numbers = MulAdd(Set(1.0f), CodesAsNumbers(), Set(-8.0f));
    return OfNibbles(LoadCodes(b.data + 2), Mul(numbers, scale));
  }
};

struct Q4_1 : Blocks32<Q4_1> {
  static constexpr int kBytes = 20;
  static TWO_LIVES_INLINE Weights Piece(const Block& b, int) {
    const Vec table = MulAdd(CodesAsNumbers(), Set(OfHalf(b.data)),
                             Set(OfHalf(b.data + 2)));
    return OfNibbles(LoadCodes(b.data + 4), table);
  }
};

// Codes of 5 bits: four in nibbles, the fifth in a word of 32.
TWO_LIVES_INLINE void FiveBits(const uint8_t* fifth, const uint8_t* nibbles,
                               Codes* codes) {
  uint16_t bits[2];
  std::memcpy(bits, fifth, sizeof(bits));
  const Codes bytes = LoadCodes(nibbles);
  codes[0] = (bytes & 15) | SixteenWhere(bits[0]);
  codes[1] = (bytes >> 4) | SixteenWhere(bits[1]);
}

struct Q5_0 : Blocks32<Q5_0> {
  static constexpr int kBytes = 22;
  static TWO_LIVES_INLINE Weights Piece(const Block& b, int) {
    Codes codes[2];
    FiveBits(b.data + 2, b.data + 6, codes);
    const Vec scale = Set(OfHalf(b.data));
    return {Mul(OfSigned(codes[0] - 16), scale),
            Mul(OfSigned(codes[1] - 16), scale)};
  }
};

struct Q5_1 : Blocks32<Q5_1> {
  static constexpr int kBytes = 24;
  static TWO_LIVES_INLINE Weights Piece(const Block& b, int) {
    Codes codes[2];
    FiveBits(b.data + 4, b.data + 8, codes);
    return ScaledPlus(codes[0], codes[1], Set(OfHalf(b.data)),
                      Set(OfHalf(b.data + 2)));
  }
};

struct IQ4_NL : Blocks32<IQ4_NL> {
  static constexpr int kBytes = 18;
  struct Block {
    const uint8_t* data;
    const float* book;
  };
  static TWO_LIVES_INLINE Block At(const Matrix& m, int64_t row, int64_t block) {
    return {m.data + row * m.row_bytes + block * kBytes, m.book};
  }
  static TWO_LIVES_INLINE Weights Piece(const Block& b, int) {
    return OfNibbles(LoadCodes(b.data + 2),
                     Mul(Load(b.book), Set(OfHalf(b.data))));
  }
};

// --- Blocks of 256 weights ---------------------------------------------------

// Scales and minima of the 8 pieces, 6 bits each, in 12 bytes.
struct SixBits {
  float scales[8], minima[8];

  TWO_LIVES_INLINE void Read(const uint8_t* block) {
    const float scale = OfHalf(block), minimum = OfHalf(block + 2);
    const uint8_t* packed = block + 4;
    for (int i = 0; i < 4; ++i) {
      const int first = packed[i], second = packed[4 + i], rest = packed[8 + i];
      scales[i] = scale * (first & 63);
      minima[i] = -(minimum * (second & 63));
      scales[4 + i] = scale * ((rest & 15) | (first >> 2 & 48));
      minima[4 + i] = -(minimum * (rest >> 4 | (second >> 2 & 48)));
    }
  }
};

// Scales of parts of 16 weights, which differ in a piece.
struct Q2_K {
  static constexpr bool kHasRest = false, kIsEvenOdd = false;
  static constexpr int kPieces = 8, kBytes = 84;
  struct Block {
    const uint8_t* data;
    float scale, minimum;
  };
  static TWO_LIVES_INLINE Block At(const Matrix& m, int64_t row, int64_t block) {
    const uint8_t* data = m.data + row * m.row_bytes + block * kBytes;
    return {data, OfHalf(data + 80), OfHalf(data + 82)};
  }
  static TWO_LIVES_INLINE Vec Half(const Block& b, int piece, int half) {
    const Codes bytes = LoadCodes(b.data + 16 + piece / 4 * 32 + 16 * half);
    const int packed = b.data[2 * piece + half];
    return MulAdd(OfUnsigned(bytes >> (piece % 4 * 2) & 3),
                  Set(b.scale * (packed & 15)), Set(-(b.minimum * (packed >> 4))));
  }
  static TWO_LIVES_INLINE Weights Piece(const Block& b, int piece) {
    return {Half(b, piece, 0), Half(b, piece, 1)};
  }
};

struct Q3_K {
  static constexpr bool kHasRest = false, kIsEvenOdd = false;
  static constexpr int kPieces = 8, kBytes = 110;
  struct Block {
    const uint8_t* data;
    float scale;
  };
  static TWO_LIVES_INLINE Block At(const Matrix& m, int64_t row, int64_t block) {
    const uint8_t* data = m.data + row * m.row_bytes + block * kBytes;
    return {data, OfHalf(data + 108)};
  }
  static TWO_LIVES_INLINE Vec Half(const Block& b, int piece, int half) {
    const Codes low = LoadCodes(b.data + 32 + piece / 4 * 32 + 16 * half);
    const Codes third = LoadCodes(b.data + 16 * half);
    const Codes codes = (low >> (piece % 4 * 2) & 3) | (third >> piece & 1) << 2;
    // A scale has its low four bits in one place, and its high two in another.
    const int part = 2 * piece + half;
    const int scale = (b.data[96 + part % 8] >> (part / 8 * 4) & 15) |
                      (b.data[104 + part % 4] >> (part / 4 * 2) & 3) << 4;
    return Mul(OfSigned(codes - 4), Set(b.scale * (scale - 32)));
  }
  static TWO_LIVES_INLINE Weights Piece(const Block& b, int piece) {
    return {Half(b, piece, 0), Half(b, piece, 1)};
  }
};

struct IQ4_XS {
  static constexpr bool kHasRest = false, kIsEvenOdd = false;
  static constexpr int kPieces = 8, kBytes = 136;
  struct Block {
    const uint8_t* data;
    float scale;
    const float* book;
  };
  static TWO_LIVES_INLINE Block At(const Matrix& m, int64_t row, int64_t block) {
    const uint8_t* data = m.data + row * m.row_bytes + block * kBytes;
    return {data, OfHalf(data), m.book};
  }
  static TWO_LIVES_INLINE Weights Piece(const Block& b, int piece) {
    const int scale = (b.data[4 + piece / 2] >> (piece % 2 * 4) & 15) |
                      (b.data[2 + piece / 4] >> (piece % 4 * 2) & 3) << 4;
    return OfNibbles(LoadCodes(b.data + 8 + 16 * piece),
                     Mul(Load(b.book), Set(b.scale * (scale - 32))));
  }
};

struct Q4_K {
  static constexpr bool kHasRest = false, kIsEvenOdd = false;
  static constexpr int kPieces = 8, kBytes = 144;
  struct Block {
    const uint8_t* data;
    SixBits six;
  };
  static TWO_LIVES_INLINE Block At(const Matrix& m, int64_t row, int64_t block) {
    Block found{m.data + row * m.row_bytes + block * kBytes, {}};
    found.six.Read(found.data);
    return found;
  }
  static TWO_LIVES_INLINE Weights Piece(const Block& b, int piece) {
    const uint8_t* nibbles = b.data + 16 + piece / 2 * 32;
    const int shift = piece % 2 * 4;
    return ScaledPlus(LoadCodes(nibbles) >> shift & 15,
                      LoadCodes(nibbles + 16) >> shift & 15,
                      Set(b.six.scales[piece]), Set(b.six.minima[piece]));
  }
};

struct Q5_K {
  static constexpr bool kHasRest = false, kIsEvenOdd = false;
  static constexpr int kPieces = 8, kBytes = 176;
  typedef Q4_K::Block Block;
  static TWO_LIVES_INLINE Block At(const Matrix& m, int64_t row, int64_t block) {
    Block found{m.data + row * m.row_bytes + block * kBytes, {}};
    found.six.Read(found.data);
    return found;
  }
  static TWO_LIVES_INLINE Codes Five(const uint8_t* data, int piece, int half) {
    const Codes low = LoadCodes(data + 48 + piece / 2 * 32 + 16 * half);
    const Codes fifth = LoadCodes(data + 16 + 16 * half);
    return (low >> (piece % 2 * 4) & 15) | (fifth >> piece & 1) << 4;
  }
  static TWO_LIVES_INLINE Weights Piece(const Block& b, int piece) {
    return ScaledPlus(Five(b.data, piece, 0), Five(b.data, piece, 1),
                      Set(b.six.scales[piece]), Set(b.six.minima[piece]));
  }
};

struct Q6_K {
  static constexpr bool kHasRest = false, kIsEvenOdd = false;
  static constexpr int kPieces = 8, kBytes = 210;
  struct Block {
    const uint8_t* data;
    float scale;
  };
  static TWO_LIVES_INLINE Block At(const Matrix& m, int64_t row, int64_t block) {
    const uint8_t* data = m.data + row * m.row_bytes + block * kBytes;
    return {data, OfHalf(data + 208)};
  }
  static TWO_LIVES_INLINE Vec Half(const Block& b, int piece, int half) {
    const int group = piece / 4, of_group = piece % 4;
    const Codes low =
        LoadCodes(b.data + group * 64 + of_group % 2 * 32 + 16 * half);
    const Codes high = LoadCodes(b.data + 128 + group * 32 + 16 * half);
    const Codes codes =
        (low >> (of_group / 2 * 4) & 15) | (high >> (2 * of_group) & 3) << 4;
    const int scale = static_cast<int8_t>(b.data[192 + 2 * piece + half]);
    return Mul(OfSigned(codes - 32), Set(b.scale * scale));
  }
  static TWO_LIVES_INLINE Weights Piece(const Block& b, int piece) {
    return {Half(b, piece, 0), Half(b, piece, 1)};
  }
};

}  // namespace two_lives

#endif  // TWO_LIVES_NATIVE_FORMATS_H_
