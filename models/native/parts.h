// The outputs of a product in parts, which threads take one after the other.

#ifndef TWO_LIVES_NATIVE_PARTS_H_
#define TWO_LIVES_NATIVE_PARTS_H_

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>

#include "xla/ffi/api/ffi.h"

namespace two_lives {

// Products of fewer multiplications than this are computed by one thread.
constexpr int64_t kLeastWork = 1 << 16;

// A thread that XLA starts late finds no part left, and touches nothing else.
template <class Product>
struct Parts {
  // Computes the outputs from `begin` to `end`.
  typedef void (*Part)(const Product&, int64_t begin, int64_t end);

  Product product;
  Part part;
  int64_t outputs, size, count;
  std::atomic<int64_t> next{0}, done{0};

  void Work() {
    for (int64_t i; (i = next.fetch_add(1)) < count; done.fetch_add(1))
      part(product, i * size, std::min((i + 1) * size, outputs));
  }
};

// Computes all outputs. Parts are multiples of `unit` outputs, and about
// `per_thread` for each thread.
template <class Product>
void Run(const Product& product, typename Parts<Product>::Part part,
         int64_t outputs, int64_t work, int64_t unit, int64_t per_thread,
         xla::ffi::ThreadPool pool) {
  const int64_t threads = work < kLeastWork ? 1 : pool.num_threads();
  if (threads <= 1) return part(product, 0, outputs);
  auto parts = std::make_shared<Parts<Product>>();
  parts->product = product;
  parts->part = part;
  parts->outputs = outputs;
  const int64_t most = per_thread * threads;
  const int64_t wanted = (outputs + most - 1) / most;
  parts->size = (wanted + unit - 1) / unit * unit;
  parts->count = (outputs + parts->size - 1) / parts->size;
  for (int64_t i = 1; i < std::min(threads, parts->count); ++i)
    pool.Schedule([parts] { parts->Work(); });
  parts->Work();
  // What is left is being computed by a thread that runs.
  while (parts->done.load() < parts->count) std::this_thread::yield();
}

}  // namespace two_lives

#endif  // TWO_LIVES_NATIVE_PARTS_H_
