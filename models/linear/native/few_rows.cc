// y[R, O] = x[R, I] times float32 or bfloat16 weights, R at most 8, in float32:
// a handler of XLA. All rows together take little longer than one, the time in
// which the weights are read.
//
// A product has one of two layouts. Across: weights [I, O]; the sum of an
// output takes the inputs in order. Along: weights [O, I]; it has sixteen
// partial sums, of every sixteenth input in order, then the lanes are added. So
// the bits of a result depend on its row of x and its column alone: neither on
// the number of rows, nor on threads, which divide the columns.

#include <algorithm>
#include <cstdint>

#include "parts.h"
#include "simd.h"
#include "xla/ffi/api/ffi.h"

namespace two_lives {
namespace {

namespace ffi = xla::ffi;

constexpr int kMostRows = 8;
constexpr int kInputs = 8;  // that `Across` multiplies before it stores sums
constexpr int64_t kUnit = 16;  // columns of a part: whole cache lines

template <class Weight>
struct Product {
  const float* x;
  const Weight* weights;
  float* y;
  int64_t num_rows, inputs, outputs;
};

// The columns of `inputs` rows of the weights from `begin` to `end`: sums of
// y grow by x times them.
template <class Weight, int R, int N>
void AddAcross(const Product<Weight>& p, int64_t input, int64_t begin,
               int64_t end) {
  const int64_t outputs = p.outputs;
  const Weight* weights = p.weights + input * outputs;
  float x[R][N];
  for (int r = 0; r < R; ++r)
    for (int n = 0; n < N; ++n) x[r][n] = p.x[r * p.inputs + input + n];
  int64_t column = begin;
  for (; column + kLanes <= end; column += kLanes) {
    Vec w[N];
    for (int n = 0; n < N; ++n) {
      w[n] = LoadFloats(weights + n * outputs + column);
      // The same columns of inputs to come: a part is too narrow for the
      // processor to foresee them. They go to the second cache: the first one
      // is smaller than all lines that are fetched before one of them is used.
      __builtin_prefetch(weights + (n + 2 * N) * outputs + column, 0, 2);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      float* y = p.y + r * outputs + column;
      Vec sum = Load(y);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) sum = MulAdd(w[n], Set(x[r][n]), sum);
      Store(y, sum);
    }
  }
  for (; column < end; ++column)
    for (int r = 0; r < R; ++r) {
      float* y = p.y + r * outputs + column;
      for (int n = 0; n < N; ++n)
        *y = MulAddOne(OneFloat(weights + n * outputs + column), x[r][n], *y);
    }
}

template <class Weight, int R>
void Across(const Product<Weight>& p, int64_t begin, int64_t end) {
  for (int r = 0; r < R; ++r)
    std::fill(p.y + r * p.outputs + begin, p.y + r * p.outputs + end, 0.0f);
  int64_t input = 0;
  for (; input + kInputs <= p.inputs; input += kInputs)
    AddAcross<Weight, R, kInputs>(p, input, begin, end);
  for (; input < p.inputs; ++input)
    AddAcross<Weight, R, 1>(p, input, begin, end);
}

template <class Weight, int R, int N>
void SumAlong(const Product<Weight>& p, int64_t column) {
  const Weight* weights = p.weights + column * p.inputs;
  Vec sums[R][N];
  for (auto& of_row : sums)
    for (Vec& sum : of_row) sum = Zero();
  int64_t input = 0;
  for (; input + kLanes <= p.inputs; input += kLanes) {
    Vec w[N];
    for (int n = 0; n < N; ++n) {
      w[n] = LoadFloats(weights + n * p.inputs + input);
      __builtin_prefetch(weights + (n + N) * p.inputs + input, 0, 2);
    }
    for (int r = 0; r < R; ++r) {
      const Vec x = Load(p.x + r * p.inputs + input);
      for (int n = 0; n < N; ++n) sums[r][n] = MulAdd(w[n], x, sums[r][n]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int n = 0; n < N; ++n) {
      float sum = Sum(sums[r][n]);
      for (int64_t rest = input; rest < p.inputs; ++rest)
        sum = MulAddOne(OneFloat(weights + n * p.inputs + rest),
                        p.x[r * p.inputs + rest], sum);
      p.y[r * p.outputs + column + n] = sum;
    }
}

template <class Weight, int R>
void Along(const Product<Weight>& p, int64_t begin, int64_t end) {
  // Registers hold the sums of all rows, N weights and one vector of x.
  constexpr int kMost = (kRegisters - 1) / (R + 1);
  constexpr int N = kMost >= 4 ? 4 : kMost >= 1 ? kMost : 1;
  for (; begin + N <= end; begin += N) SumAlong<Weight, R, N>(p, begin);
  for (; begin < end; ++begin) SumAlong<Weight, R, 1>(p, begin);
}

template <class Weight, int R = kMostRows>
typename Parts<Product<Weight>>::Part PartOf(int64_t rows, bool is_along) {
  if (rows == R) return is_along ? Along<Weight, R> : Across<Weight, R>;
  if constexpr (R > 1) return PartOf<Weight, R - 1>(rows, is_along);
  return nullptr;
}

template <class Weight>
ffi::Error Multiply(const ffi::Buffer<ffi::F32>& x, const void* weights,
                    int64_t inputs, int64_t outputs, bool is_along, float* y,
                    ffi::ThreadPool pool) {
  const int64_t rows = x.dimensions()[0];
  const auto part = PartOf<Weight>(rows, is_along);
  if (!part || x.dimensions()[1] != inputs)
    return ffi::Error::InvalidArgument("product of few rows: unknown shape");
  const Product<Weight> product{x.typed_data(),
                                static_cast<const Weight*>(weights),
                                y, rows, inputs, outputs};
  // Wide parts read memory in long runs; where weights lie along, any do. One
  // part per thread took 5 to 15 % less time than two.
  Run(product, part, outputs, inputs * outputs * rows, kUnit, is_along ? 4 : 1,
      pool);
  return ffi::Error::Success();
}

ffi::Error MultiplyFewRows(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x,
                           ffi::AnyBuffer weights, bool is_along,
                           ffi::ResultBuffer<ffi::F32> y) {
  const auto shape = weights.dimensions();
  if (x.dimensions().size() != 2 || shape.size() != 2)
    return ffi::Error::InvalidArgument("product of few rows: unknown axes");
  const int64_t inputs = shape[is_along], outputs = shape[!is_along];
  const void* data = weights.untyped_data();
  float* to = y->typed_data();
  if (weights.element_type() == ffi::F32)
    return Multiply<float>(x, data, inputs, outputs, is_along, to, pool);
  if (weights.element_type() == ffi::BF16)
    return Multiply<Bfloat16>(x, data, inputs, outputs, is_along, to, pool);
  return ffi::Error::InvalidArgument("product of few rows: unknown dtype");
}

}  // namespace
}  // namespace two_lives

XLA_FFI_DEFINE_HANDLER_SYMBOL(TwoLivesMultiply, two_lives::MultiplyFewRows,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Attr<bool>("is_along")
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>());

extern "C" const char* TwoLivesInstructions() {
  return two_lives::kInstructions;
}
