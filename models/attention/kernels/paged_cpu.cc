// Attention of a few queries over the pages of a KV cache: a handler of XLA.
//
// Keys and values are read up to the position of each query, a tile at a time.
// One unit of work is a span of slots of a sequence, with all heads, which lie
// beside each other. Where that makes too few units for the threads, a unit has
// a share of the heads. Threads take units one after the other.
// Tiles of slots are folded in with a running maximum and sum (Milakov and
// Gimelshein, arXiv:1805.02867), in float32, and then spans are. So the bits of
// a result depend on its query and on the keys that it sees alone.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "parts.h"
#include "simd.h"
#include "xla/ffi/api/ffi.h"

namespace two_lives {
namespace {

namespace ffi = xla::ffi;

constexpr int64_t kTile = 32;  // slots that are folded in at once
constexpr int64_t kSpan = 128; // slots of a unit
constexpr int kQueries = 4;    // whose products with a key are made together
constexpr float kMasked = -1e30f;  // as in models/attention/paged.py
constexpr int64_t kUnitsPerThread = 16;
constexpr int64_t kLeastUnits = 2;  // for each thread

typedef int8_t Int8;
struct Float8 {  // e4m3fn
  uint8_t bits;
};

template <class Stored>
struct Attention {
  const float* q;         // [B, R, H, C], scaled
  const Stored* pages;    // [P, Q, Y, W]; keys of head k at 2 k, values behind
  const float* scales;    // [P, Q, Y], or none
  const int32_t* table;   // [B, L]
  const int32_t* positions;  // [B, R]; padding is negative
  float* out;             // [B, R, H, C]
  int64_t rows, heads, channels;
  int64_t page_size, vectors, width, table_width;
  int64_t window;
  float softcap;
  int64_t spans;  // S, of a sequence
  int64_t shares;  // groups of heads of keys, each a unit of a span
  float* parts;   // [B, S, R H, C + 2]: sums of values, maximum, sum of weights
};

struct Float8Numbers {
  float numbers[256];

  Float8Numbers() {
    for (int bits = 0; bits < 256; ++bits) {
      const float sign = bits & 0x80 ? -1.0f : 1.0f;
      const int exponent = bits >> 3 & 15, mantissa = bits & 7;
      float magnitude = exponent ? std::ldexp(8.0f + mantissa, exponent - 10)
                                 : std::ldexp(static_cast<float>(mantissa), -9);
      if ((bits & 0x7f) == 0x7f) magnitude = NAN;
      numbers[bits] = sign * magnitude;
    }
  }
};
const Float8Numbers kFloat8;

// Makes floats of a stored vector.
inline void ToFloats(const float* from, float, int64_t size, float* to) {
  std::memcpy(to, from, size * sizeof(float));
}
inline void ToFloats(const Bfloat16* from, float, int64_t size, float* to) {
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) Store(to + i, LoadFloats(from + i));
  for (; i < size; ++i) to[i] = OneFloat(from + i);
}
inline void ToFloats(const Int8* from, float scale, int64_t size, float* to) {
  for (int64_t i = 0; i < size; ++i) to[i] = from[i] * scale;
}
inline void ToFloats(const Float8* from, float scale, int64_t size,
                     float* to) {
  for (int64_t i = 0; i < size; ++i) to[i] = kFloat8.numbers[from[i].bits] * scale;
}

// e to the power of x, at most 0 or NaN; 0 below -87. Cephes' polynomial, whose
// error is below 1e-7 of the result.
inline float Exp(float x) {
  const float n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float y = 1.9875691500e-4f;
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1.0f;
  const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof(power));
  const float result = y * power;
  return x < -87.0f ? 0.0f : result;
}

// The products of N queries with one key.
template <int N>
inline void Dots(const float* const* q, const float* key, int64_t size,
                 float* found) {
  Vec sums[N];
  for (Vec& sum : sums) sum = Zero();
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    const Vec k = Load(key + i);
    for (int n = 0; n < N; ++n) sums[n] = MulAdd(Load(q[n] + i), k, sums[n]);
  }
  for (int n = 0; n < N; ++n) {
    float sum = Sum(sums[n]);
    for (int64_t rest = i; rest < size; ++rest)
      sum = MulAddOne(q[n][rest], key[rest], sum);
    found[n] = sum;
  }
}

// out += the sum of N values times their weights.
template <int N>
inline void AddValues(const float* const* values, const float* weights,
                      int64_t size, float* out) {
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    Vec sum = Load(out + i);
    for (int n = 0; n < N; ++n)
      sum = MulAdd(Load(values[n] + i), Set(weights[n]), sum);
    Store(out + i, sum);
  }
  for (; i < size; ++i)
    for (int n = 0; n < N; ++n)
      out[i] = MulAddOne(values[n][i], weights[n], out[i]);
}

// One query of a unit: what it sees of the span, and what it has seen so far.
struct Query {
  const float* q;
  float* out;
  int64_t first, end;  // slots
  float most, sum;
  float weights[kTile];  // scores first
};

template <class Stored>
struct Unit {
  const Attention<Stored>& p;
  std::vector<Query> queries;  // by head of keys
  float* tile;                 // [kTile, vectors, C]
  int64_t first_vector, vectors;  // of the heads of keys

  // The numbers of a vector of a slot.
  float* Vector(int64_t index, int64_t vector) {
    return tile + (index * vectors + vector) * p.channels;
  }

  // Reads slots in the order of memory, as fast as it can be read; heads are
  // then taken one after the other from a cache.
  void Read(const int32_t* pages, int64_t from, int64_t size) {
    const bool is_run = !p.scales && p.width == p.channels;
    const bool has_all = vectors == p.vectors;
    for (int64_t index = 0, some; index < size; index += some) {
      const int64_t slot = from + index, within = slot % p.page_size;
      some = std::min(p.page_size - within, size - index);
      const int64_t first =
          (pages[slot / p.page_size] * p.page_size + within) * p.vectors;
      if (is_run && has_all) {  // the slots of a page lie behind each other
        ToFloats(p.pages + first * p.width, 1.0f, some * vectors * p.channels,
                 Vector(index, 0));
        continue;
      }
      for (int64_t i = 0; i < some; ++i)
        ReadSlot(first + i * p.vectors + first_vector, Vector(index + i, 0),
                 is_run);
    }
  }

  void ReadSlot(int64_t first, float* to, bool is_run) {
    if (is_run)
      return ToFloats(p.pages + first * p.width, 1.0f, vectors * p.channels,
                      to);
    for (int64_t i = 0; i < vectors; ++i)
      ToFloats(p.pages + (first + i) * p.width,
               p.scales ? p.scales[first + i] : 1.0f, p.channels,
               to + i * p.channels);
  }

  void Score(Query* own, int64_t num, int64_t vector, int64_t size) {
    for (int64_t index = 0; index < size; ++index) {
      const float* key = Vector(index, vector);
      for (int64_t m = 0; m < num; m += kQueries) {
        const float* q[kQueries];
        float found[kQueries];
        const int64_t some = std::min<int64_t>(kQueries, num - m);
        for (int64_t n = 0; n < some; ++n) q[n] = own[m + n].q;
        switch (some) {
          case 1: Dots<1>(q, key, p.channels, found); break;
          case 2: Dots<2>(q, key, p.channels, found); break;
          case 3: Dots<3>(q, key, p.channels, found); break;
          default: Dots<kQueries>(q, key, p.channels, found);
        }
        for (int64_t n = 0; n < some; ++n) own[m + n].weights[index] = found[n];
      }
    }
  }

  // Turns the scores that a query sees, from `begin` to `end` of the tile, into
  // weights.
  void Weigh(Query& query, int64_t begin, int64_t end) {
    float* weights = query.weights;
    if (p.softcap)
      for (int64_t i = begin; i < end; ++i)
        weights[i] = p.softcap * std::tanh(weights[i] / p.softcap);
    float most = query.most;
    for (int64_t i = begin; i < end; ++i) most = std::max(most, weights[i]);
    const float keep = Exp(query.most - most);
    for (int64_t i = begin; i < end; ++i) weights[i] = Exp(weights[i] - most);
    float sum = 0.0f;
    for (int64_t i = begin; i < end; ++i) sum += weights[i];
    query.most = most;
    query.sum = query.sum * keep + sum;
    if (keep != 1.0f)
      for (int64_t i = 0; i < p.channels; ++i) query.out[i] *= keep;
  }

  void Add(Query* own, int64_t num, int64_t vector, int64_t from,
           int64_t size) {
    for (int64_t index = 0; index < size; index += kQueries) {
      const int64_t some = std::min<int64_t>(kQueries, size - index);
      const int64_t slot = from + index;
      const float* values[kQueries];
      for (int64_t n = 0; n < some; ++n)
        values[n] = Vector(index + n, vector);
      for (Query* query = own; query < own + num; ++query) {
        const float* weights = query->weights + index;
        if (some == kQueries && query->first <= slot &&
            slot + kQueries <= query->end) {
          AddValues<kQueries>(values, weights, p.channels, query->out);
          continue;
        }
        // A value that is not seen is not touched: it may be no number.
        for (int64_t n = 0; n < some; ++n)
          if (query->first <= slot + n && slot + n < query->end)
            AddValues<1>(values + n, weights + n, p.channels, query->out);
      }
    }
  }

  // Folds all tiles of a span into the queries.
  void Attend(const int32_t* pages) {
    int64_t first = INT64_MAX, end = 0;
    for (const Query& query : queries) {
      if (query.first >= query.end) continue;
      first = std::min(first, query.first);
      end = std::max(end, query.end);
    }
    const int64_t kv_heads = vectors / 2;
    const int64_t num = queries.size() / kv_heads;
    for (int64_t at = first / kTile * kTile; at < end; at += kTile) {
      const int64_t from = std::max(first, at);
      const int64_t size = std::min(end, at + kTile) - from;
      Read(pages, from, size);
      for (int64_t head = 0; head < kv_heads; ++head) {
        Query* own = queries.data() + head * num;
        Score(own, num, 2 * head, size);
        for (Query* query = own; query < own + num; ++query) {
          const int64_t begin = std::max<int64_t>(query->first - from, 0);
          const int64_t last = std::min(size, query->end - from);
          if (begin < last) Weigh(*query, begin, last);
        }
        Add(own, num, 2 * head + 1, from, size);
      }
    }
  }
};

template <class Stored>
void AttendUnits(const Attention<Stored>& p, int64_t begin, int64_t end) {
  const int64_t kv_heads = p.vectors / 2, group = p.heads / kv_heads;
  const int64_t num = p.rows * p.heads, size = p.channels + 2;
  const int64_t of_head = p.rows * group;  // queries
  Unit<Stored> unit{p};
  thread_local Floats room;  // kept: the system clears new memory
  unit.tile = room.Room(kTile * p.vectors * p.channels);
  for (int64_t index = begin; index < end; ++index) {
    const int64_t share = index % p.shares, part = index / p.shares;
    const int64_t sequence = part / p.spans, span = part % p.spans;
    const int64_t head = kv_heads * share / p.shares;
    const int64_t last = kv_heads * (share + 1) / p.shares;
    unit.first_vector = 2 * head;
    unit.vectors = 2 * (last - head);
    unit.queries.resize((last - head) * of_head);
    for (int64_t m = head * of_head; m < last * of_head; ++m) {
      // Queries of a head of keys lie together: rows of its heads.
      const int64_t rest = m % of_head;
      const int64_t row = sequence * p.rows + rest / group;
      const int64_t place = row * p.heads + m / of_head * group + rest % group;
      Query& query = unit.queries[m - head * of_head];
      query.q = p.q + place * p.channels;
      query.out = p.parts + (part * num + m) * size;
      const int64_t seen = std::max<int64_t>(p.positions[row] + 1, 0);
      query.first = std::max(
          span * kSpan, p.window ? std::max<int64_t>(seen - p.window, 0) : 0);
      query.end = std::min(seen, (span + 1) * kSpan);
      query.most = kMasked;
      query.sum = 0.0f;
      std::fill(query.out, query.out + p.channels, 0.0f);
    }
    unit.Attend(p.table + sequence * p.table_width);
    for (Query& query : unit.queries) {
      query.out[p.channels] = query.most;
      query.out[p.channels + 1] = query.sum;
    }
  }
}

// Adds the spans of each query, in order.
template <class Stored>
void AddSpans(const Attention<Stored>& p, int64_t sequences) {
  const int64_t group = p.heads / (p.vectors / 2);
  const int64_t num = p.rows * p.heads, size = p.channels + 2;
  for (int64_t index = 0; index < sequences * num; ++index) {
    const int64_t sequence = index / num, m = index % num;
    const int64_t head = m / (p.rows * group), rest = m % (p.rows * group);
    const int64_t row = sequence * p.rows + rest / group;
    float* out =
        p.out + (row * p.heads + head * group + rest % group) * p.channels;
    const float* first = p.parts + (sequence * p.spans * num + m) * size;
    float most = kMasked, sum = 0.0f;
    for (int64_t span = 0; span < p.spans; ++span)
      most = std::max(most, first[span * num * size + p.channels]);
    std::fill(out, out + p.channels, 0.0f);
    for (int64_t span = 0; span < p.spans; ++span) {
      const float* part = first + span * num * size;
      const float keep = Exp(part[p.channels] - most);
      sum += keep * part[p.channels + 1];
      for (int64_t i = 0; i < p.channels; ++i) out[i] += keep * part[i];
    }
    const float factor = sum ? 1.0f / sum : 1.0f;
    float mark = 0.0f;  // NaN if any number is not finite
    for (int64_t i = 0; i < p.channels; ++i) {
      out[i] *= factor;
      mark += out[i] * 0.0f;
    }
    for (int64_t i = 0; i < p.channels; ++i) out[i] += mark;
  }
}

template <class Stored>
ffi::Error AttendAs(const Attention<float>& given, const void* pages,
                    int64_t sequences, ffi::ThreadPool pool) {
  int64_t keys = 0, most = 1;
  for (int64_t i = 0; i < sequences * given.rows; ++i) {
    const int64_t seen = std::max<int64_t>(given.positions[i] + 1, 0);
    keys += seen;
    most = std::max(most, seen);
  }
  const int64_t spans = (most + kSpan - 1) / kSpan;
  const int64_t units = sequences * spans;
  const int64_t wanted = kLeastUnits * pool.num_threads();
  const int64_t shares =
      std::clamp<int64_t>((wanted + units - 1) / std::max<int64_t>(units, 1), 1,
                          given.vectors / 2);
  // Not cleared: units write all of it.
  const std::unique_ptr<float[]> parts(
      new float[sequences * spans * given.rows * given.heads *
                (given.channels + 2)]);
  const Attention<Stored> p{
      given.q, static_cast<const Stored*>(pages), given.scales, given.table,
      given.positions, given.out, given.rows, given.heads, given.channels,
      given.page_size, given.vectors, given.width, given.table_width,
      given.window, given.softcap, spans, shares, parts.get()};
  Run(p, AttendUnits<Stored>, units * shares,
      2 * keys * p.heads * p.channels, 1, kUnitsPerThread, pool);
  AddSpans(p, sequences);
  return ffi::Error::Success();
}

ffi::Error AttendPages(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> q,
                       ffi::AnyBuffer pages, ffi::Buffer<ffi::F32> scales,
                       ffi::Buffer<ffi::S32> table,
                       ffi::Buffer<ffi::S32> positions, int64_t window,
                       float softcap, ffi::ResultBuffer<ffi::F32> out) {
  const auto of_q = q.dimensions(), of_pages = pages.dimensions();
  const auto of_table = table.dimensions();
  if (of_q.size() != 4 || of_pages.size() != 4 || of_table.size() != 2 ||
      of_table[0] != of_q[0] || of_pages[2] % 2 || of_pages[3] < of_q[3] ||
      of_q[2] % (of_pages[2] / 2))
    return ffi::Error::InvalidArgument("attention over pages: unknown shapes");
  const Attention<float> given{
      q.typed_data(), nullptr,
      scales.element_count() ? scales.typed_data() : nullptr,
      table.typed_data(), positions.typed_data(), out->typed_data(),
      of_q[1], of_q[2], of_q[3], of_pages[1], of_pages[2], of_pages[3],
      of_table[1], window, softcap, 0, 1, nullptr};
  const void* data = pages.untyped_data();
  switch (pages.element_type()) {
    case ffi::F32: return AttendAs<float>(given, data, of_q[0], pool);
    case ffi::U16: return AttendAs<Bfloat16>(given, data, of_q[0], pool);
    case ffi::S8: return AttendAs<Int8>(given, data, of_q[0], pool);
    case ffi::U8: return AttendAs<Float8>(given, data, of_q[0], pool);
    default:
      return ffi::Error::InvalidArgument("attention over pages: unknown dtype");
  }
}

}  // namespace
}  // namespace two_lives

XLA_FFI_DEFINE_HANDLER_SYMBOL(TwoLivesAttend, two_lives::AttendPages,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Attr<int64_t>("window")
                                  .Attr<float>("softcap")
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>());

extern "C" const char* TwoLivesInstructions() {
  return two_lives::kInstructions;
}
