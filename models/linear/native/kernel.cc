// y[R, out] = x[R, in] times a stored kernel, in float32: a handler of XLA.
//
// Weights become float32 in registers. A sum over inputs has sixteen partial
// sums, one per lane, of every sixteenth input in order; then the lanes are
// added. So the bits of a result depend on its row of x and its column alone:
// neither on the number of rows, nor on threads, which divide the columns.
//
// One row is multiplied while weights are decoded: reading them takes the time.
// Of several rows, a few columns are decoded into the cache, for all rows.
//
// A stack of matrices [groups, out, in] multiplies rows that are sorted by group,
// as those of a mixture of experts. Matrices without rows are not read.

#include <algorithm>
#include <iterator>
#include <vector>

#include "formats.h"
#include "parts.h"
#include "scales.h"
#include "simd.h"
#include "xla/ffi/api/ffi.h"

namespace two_lives {
namespace {

namespace ffi = xla::ffi;

#if defined(TWO_LIVES_AVX512)
constexpr int kColumns = 4, kRows = 6;  // 24 sums of 32 registers
#else
constexpr int kColumns = 2, kRows = 3;
#endif
constexpr int64_t kGroups = 8;  // of columns that are decoded for many rows

struct Product {
  Matrix matrix;
  Scales scales;
  const float* x;  // rows of `stride` floats, zeros beyond the columns
  int64_t num_rows, stride;
  float* y;
};

// The last piece of a row that is no multiple of 32: decoded from a copy. Rows
// of blocks are multiples.
template <class Form>
Weights LastPiece(const Matrix& matrix, int64_t row, int64_t piece) {
  typename Form::Block b = Form::At(matrix, row, piece / Form::kPieces);
  const int64_t rest = matrix.columns - piece * kPiece;
  const int64_t begin = piece * Form::kPieceBytes;
  uint8_t bytes[kPiece] = {};
  std::memcpy(bytes, matrix.data + row * matrix.row_bytes + begin,
              matrix.row_bytes - begin);
  b.data = bytes;
  const Weights w = Form::Piece(b, 0);
  float numbers[kPiece];
  Store(numbers, w.first);
  Store(numbers + kLanes, w.second);
  if (Form::kIsEvenOdd) {
    std::fill(numbers + rest / 2, numbers + kLanes, 0.0f);
    std::fill(numbers + kLanes + rest / 2, numbers + kPiece, 0.0f);
  } else {
    std::fill(numbers + rest, numbers + kPiece, 0.0f);
  }
  return {Load(numbers), Load(numbers + kLanes)};
}

// Calls visit(piece, column, weights) for all pieces of N rows of the store.
template <class Form, int N, class Visit>
TWO_LIVES_INLINE void Decode(const Matrix& matrix, int64_t row, Visit visit) {
  constexpr int kWeights = Form::kPieces * kPiece;
  const int64_t blocks = matrix.columns / kWeights;
  for (int64_t block = 0; block < blocks; ++block) {
    typename Form::Block found[N];
    for (int n = 0; n < N; ++n) {
      found[n] = Form::At(matrix, row + n, block);
      for (int line = 0; line < Form::kBytes; line += 64)
        __builtin_prefetch(found[n].data + N * matrix.row_bytes + line);
    }
#pragma GCC unroll 8
    for (int piece = 0; piece < Form::kPieces; ++piece)
      for (int n = 0; n < N; ++n)
        visit(block * Form::kPieces + piece, n, Form::Piece(found[n], piece));
  }
  if constexpr (Form::kHasRest) {
    const int64_t pieces = matrix.columns / kPiece;
    int64_t piece = blocks * Form::kPieces;
    if (piece < pieces)
      for (int n = 0; n < N; ++n) {
        const typename Form::Block found = Form::At(matrix, row + n, blocks);
        for (piece = blocks * Form::kPieces; piece < pieces; ++piece)
          visit(piece, n, Form::Piece(found, piece % Form::kPieces));
      }
    if (matrix.columns % kPiece)
      for (int n = 0; n < N; ++n)
        visit(pieces, n, LastPiece<Form>(matrix, row + n, pieces));
  }
}

template <class Form, int N>
void MultiplyOneRow(const Product& p, int64_t row) {
  Vec sums[N];
  for (Vec& sum : sums) sum = Zero();
  Decode<Form, N>(p.matrix, row, [&](int64_t piece, int n, Weights w) {
    const float* x = p.x + piece * kPiece;
    sums[n] = MulAdd(w.first, Load(x), sums[n]);
    sums[n] = MulAdd(w.second, Load(x + kLanes), sums[n]);
  });
  for (int n = 0; n < N; ++n) p.y[row + n] = Sum(sums[n]);
}

// Multiplies M rows of x by N columns of decoded weights.
template <int M, int N>
void MultiplyDecoded(const float* weights, const float* x, int64_t stride,
                     float* y, int64_t y_stride) {
  Vec sums[M][N];
  for (auto& of_row : sums)
    for (Vec& sum : of_row) sum = Zero();
  for (int64_t k = 0; k < stride; k += kLanes) {
    Vec w[N];
    for (int n = 0; n < N; ++n) w[n] = Load(weights + k * N + n * kLanes);
    for (int m = 0; m < M; ++m) {
      const Vec of_x = Load(x + m * stride + k);
      for (int n = 0; n < N; ++n) sums[m][n] = MulAdd(w[n], of_x, sums[m][n]);
    }
  }
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) y[m * y_stride + n] = Sum(sums[m][n]);
}

template <int M, int N>
void MultiplyFew(int64_t rows, const float* weights, const float* x,
                 int64_t stride, float* y, int64_t y_stride) {
  if (rows == M)
    MultiplyDecoded<M, N>(weights, x, stride, y, y_stride);
  else if constexpr (M > 1)
    MultiplyFew<M - 1, N>(rows, weights, x, stride, y, y_stride);
}

// Computes N * groups outputs from `row` on. The groups' weights are decoded
// first, so that a few rows of x stay in the nearest cache for all of them.
template <class Form, int N>
void MultiplyRows(const Product& p, int64_t row, int groups, float* weights) {
  for (int group = 0; group < groups; ++group) {
    float* of_group = weights + group * N * p.stride;
    Decode<Form, N>(p.matrix, row + group * N,
                    [&](int64_t piece, int n, Weights w) {
                      float* to = of_group + (piece * 2 * N + n) * kLanes;
                      Store(to, w.first);
                      Store(to + N * kLanes, w.second);
                    });
  }
  for (int64_t first = 0; first < p.num_rows; first += kRows)
    for (int group = 0; group < groups; ++group)
      MultiplyFew<kRows, N>(
          std::min<int64_t>(kRows, p.num_rows - first),
          weights + group * N * p.stride, p.x + first * p.stride, p.stride,
          p.y + first * p.matrix.rows + row + group * N, p.matrix.rows);
}

// Returns the product with scales in float32 for the outputs from `begin` to
// `end`; `converted` holds them, unless they are float32 already.
Product WithFloats(const Product& given, int64_t begin, int64_t end,
                   std::vector<float>* converted) {
  Product p = given;
  Matrix& m = p.matrix;
  if (p.scales.AreFloats()) {
    m.scales = reinterpret_cast<const float*>(p.scales.data);
    return p;
  }
  m.first_tile = begin / m.tile_out * m.tiles_in;
  const int64_t last = ((end - 1) / m.tile_out + 1) * m.tiles_in;
  converted->resize(last - m.first_tile);
  for (int64_t tile = m.first_tile; tile < last; ++tile)
    (*converted)[tile - m.first_tile] = p.scales.At(tile);
  m.scales = converted->data();
  return p;
}

// Computes the outputs from `begin` to `end`.
template <class Form>
void MultiplyPart(const Product& given, int64_t begin, int64_t end) {
  if (begin >= end) return;
  std::vector<float> converted;
  const Product p = WithFloats(given, begin, end, &converted);
  if (p.num_rows == 1) {
    for (; begin + kColumns <= end; begin += kColumns)
      MultiplyOneRow<Form, kColumns>(p, begin);
    for (; begin < end; ++begin) MultiplyOneRow<Form, 1>(p, begin);
    return;
  }
  const int64_t most = p.num_rows > kRows ? kGroups : 1;
  thread_local Floats room;  // kept: the system clears new memory
  float* weights = room.Room(p.stride * kColumns * most);
  while (begin + kColumns <= end) {
    const int64_t groups = std::min(most, (end - begin) / kColumns);
    MultiplyRows<Form, kColumns>(p, begin, groups, weights);
    begin += groups * kColumns;
  }
  for (; begin < end; ++begin)
    MultiplyRows<Form, 1>(p, begin, 1, weights);
}

typedef void (*Part)(const Product&, int64_t, int64_t);

constexpr int64_t kBytes = 0, kNibbles = 1, kFloats8 = 2;  // as in product.py

template <Values kValues>
Part PartOfApart(const Matrix& m) {
  if (m.tiles_in > 1 && m.tile_in % kPiece)
    return MultiplyPart<Apart<kValues, Tiles::kAny>>;
  if constexpr (kValues == Values::kPacked) {
    if (m.tiles_in == 1 || m.tile_in % (4 * kPiece) == 0)
      return MultiplyPart<Apart<kValues, Tiles::kFour>>;
  } else if (m.mins) {
    return MultiplyPart<Apart<kValues, Tiles::kWithMins>>;
  }
  return MultiplyPart<Apart<kValues, Tiles::kWhole>>;
}

// Of a form by its number: the first numbers and `_BLOCKS` of product.py.
Part PartOf(int64_t form, const Matrix& matrix) {
  static constexpr Part kParts[] = {
      MultiplyPart<Q8_0>, MultiplyPart<Q4_0>, MultiplyPart<Q4_1>,
      MultiplyPart<Q5_0>, MultiplyPart<Q5_1>, MultiplyPart<IQ4_NL>,
      MultiplyPart<Q2_K>, MultiplyPart<Q3_K>, MultiplyPart<Q4_K>,
      MultiplyPart<Q5_K>, MultiplyPart<Q6_K>, MultiplyPart<IQ4_XS>,
  };
  if (form == kBytes) return PartOfApart<Values::kSigned>(matrix);
  if (form == kNibbles) return PartOfApart<Values::kPacked>(matrix);
  if (form == kFloats8) return PartOfApart<Values::kE4m3>(matrix);
  const int64_t index = form - kFloats8 - 1, size = std::size(kParts);
  return index >= 0 && index < size ? kParts[index] : nullptr;
}

// Multiplies all rows of x by the matrices of their groups. Rows past the groups
// become 0.
void MultiplyGroups(const Product& all, Part part, const int32_t* sizes,
                    const float* gains, int64_t groups, ffi::ThreadPool pool) {
  const Matrix& m = all.matrix;
  const int64_t tiles =
      (m.rows + m.tile_out - 1) / m.tile_out * m.tiles_in;
  int64_t first = 0;
  for (int64_t group = 0; group < groups; ++group) {
    Product one = all;
    one.num_rows = std::min<int64_t>(sizes[group], all.num_rows - first);
    if (one.num_rows <= 0) continue;
    one.matrix.data += group * m.rows * m.row_bytes;
    if (all.scales.data) one.scales.data += group * tiles * all.scales.size;
    if (gains) one.scales.gain = gains[group];
    if (m.mins) one.matrix.mins += group * tiles;
    one.x += first * all.stride;
    one.y += first * m.rows;
    Run(one, part, m.rows, m.rows * m.columns * one.num_rows, kColumns, 4,
        pool);
    first += one.num_rows;
  }
  std::fill(all.y + first * m.rows, all.y + all.num_rows * m.rows, 0.0f);
}

// `sizes` has the rows of each group, or is empty: then data is one matrix.
ffi::Error Multiply(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x,
                    ffi::AnyBuffer data, ffi::AnyBuffer scales,
                    ffi::Buffer<ffi::F32> gains, ffi::Buffer<ffi::F32> mins,
                    ffi::Buffer<ffi::F32> book, ffi::Buffer<ffi::S32> sizes,
                    int64_t form, int64_t tile_out, int64_t tile_in,
                    ffi::ResultBuffer<ffi::F32> y) {
  const auto of_x = x.dimensions(), of_data = data.dimensions();
  const int64_t groups = sizes.element_count();
  const size_t axes = groups ? 3 : 2;
  if (of_x.size() != 2 || of_data.size() != axes ||
      (groups && of_data[0] != groups) || book.element_count() != kLanes ||
      tile_out < 1 || tile_in < 1 || !Scales::SizeOf(scales.element_type()))
    return ffi::Error::InvalidArgument("stored product: unknown shape");
  Product product{};
  Matrix& matrix = product.matrix;
  matrix.data = static_cast<const uint8_t*>(data.untyped_data());
  matrix.rows = of_data[axes - 2];
  matrix.row_bytes = of_data[axes - 1];
  matrix.columns = of_x[1];
  product.scales = {static_cast<const uint8_t*>(scales.untyped_data()),
                    scales.element_type(),
                    Scales::SizeOf(scales.element_type()), 1.0f};
  const float* of_groups = nullptr;
  if (gains.element_count()) {
    of_groups = gains.typed_data();
    product.scales.gain = of_groups[0];
  }
  matrix.mins = mins.element_count() ? mins.typed_data() : nullptr;
  matrix.tile_out = tile_out;
  matrix.tile_in = tile_in;
  matrix.tile_shift = -1;
  for (int shift = 4; shift < 31; ++shift)
    if (tile_in == int64_t{1} << shift) matrix.tile_shift = shift;
  matrix.tiles_in = (matrix.columns + tile_in - 1) / tile_in;
  matrix.book = book.typed_data();
  const Part part = PartOf(form, matrix);
  if (!part)
    return ffi::Error::InvalidArgument("stored product: unknown form");
  product.num_rows = of_x[0];
  product.y = y->typed_data();
  if (!product.num_rows || !matrix.rows) return ffi::Error::Success();
  product.x = x.typed_data();
  product.stride = (matrix.columns + kPiece - 1) / kPiece * kPiece;
  Floats padded;
  if (form == kNibbles || product.stride != matrix.columns) {
    float* rows = padded.Room(product.num_rows * product.stride);
    for (int64_t row = 0; row < product.num_rows; ++row) {
      const float* from = product.x + row * matrix.columns;
      float* to = rows + row * product.stride;
      std::fill(to + matrix.columns / kPiece * kPiece, to + product.stride,
                0.0f);
      if (form == kNibbles)
        OrderPacked(from, matrix.columns, to);
      else
        std::copy_n(from, matrix.columns, to);
    }
    product.x = rows;
  }
  if (groups) {
    MultiplyGroups(product, part, sizes.typed_data(), of_groups, groups, pool);
    return ffi::Error::Success();
  }
  const int64_t work = matrix.rows * matrix.columns * product.num_rows;
  Run(product, part, matrix.rows, work, kColumns, 4, pool);
  return ffi::Error::Success();
}

}  // namespace
}  // namespace two_lives

XLA_FFI_DEFINE_HANDLER_SYMBOL(TwoLivesMultiply, two_lives::Multiply,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Attr<int64_t>("form")
                                  .Attr<int64_t>("tile_out")
                                  .Attr<int64_t>("tile_in")
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>());

extern "C" const char* TwoLivesInstructions() {
  return two_lives::kInstructions;
}
