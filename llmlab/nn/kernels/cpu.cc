// A decoding step's two large pieces of work on CPUs: products of few rows with a matrix of weights, and attention of
// one query a row over what its cache holds. What they compute and why they exist is told in cpu.py, which compiles
// this file for the processor at hand and calls it.
//
// Shapes are written as in Python: R rows, D inputs, F outputs; B rows, K key/value heads, G queries of each, T slots,
// H dimensions of a head. Vectors are those of GCC and Clang (vector_size), as wide as the processor's registers.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <thread>
#include <type_traits>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t IntVec __attribute__((vector_size(4 * kLanes)));
typedef uint16_t HalfVec __attribute__((vector_size(2 * kLanes)));
typedef int16_t ShortVec __attribute__((vector_size(2 * kLanes)));
typedef int16_t Shorts __attribute__((vector_size(32)));
typedef int8_t Bytes __attribute__((vector_size(16)));
typedef int64_t Words __attribute__((vector_size(16)));

// Numbers as they are stored. All arithmetic is in float32.
struct Bfloat16 {
  uint16_t bits;
};

template <class To, class From>
inline To bits_of(const From* from) {
  To to;
  std::memcpy(&to, from, sizeof to);
  return to;
}

inline float number(float x) { return x; }
inline float number(int8_t x) { return x; }
inline float number(Bfloat16 x) {
  uint32_t bits = uint32_t{x.bits} << 16;
  return bits_of<float>(&bits);
}

inline Vec load(const float* x) { return bits_of<Vec>(x); }
inline Vec load(const int8_t* x) {
  Words words = {};  // of sixteen, and by way of int16: GCC converts 8 one by one
  if constexpr (kLanes == 16)
    words = bits_of<Words>(x);
  else
    words[0] = bits_of<std::conditional_t<kLanes == 8, int64_t, int32_t>>(x);
  Shorts shorts = __builtin_convertvector(bits_of<Bytes>(&words), Shorts);
  return __builtin_convertvector(__builtin_convertvector(bits_of<ShortVec>(&shorts), IntVec), Vec);
}
inline Vec load(const Bfloat16* x) {
  IntVec bits = __builtin_convertvector(bits_of<HalfVec>(x), IntVec) << 16;
  return bits_of<Vec>(&bits);
}

inline void store(Vec v, float* y) { std::memcpy(y, &v, sizeof v); }

// Rows of a matrix are short for the processor to see a pattern in them, so they are asked for ahead of time: without,
// one core of an EPYC read 10 GB/s instead of 25. A line of the cache is 64 bytes, 16 numbers or more.
constexpr int kLine = 16;
inline void prefetch(const void* x) { __builtin_prefetch(x, 0, 1); }

typedef float Four __attribute__((vector_size(16)));
inline float sum(Vec v) {
  Four part[kLanes / 4], total = {};
  std::memcpy(part, &v, sizeof v);
  for (Four four : part) total += four;
  return (total[0] + total[2]) + (total[1] + total[3]);
}

// e^x for x <= 0, to 2 units in the last place: e^x = 2^n e^r with |r| <= log(2)/2, and a polynomial for e^r
// (coefficients of Cephes' expf). What is below the smallest normal number becomes zero.
inline Vec exp_of(Vec x) {
  IntVec tiny = x < -87.0f;
  x = tiny ? Vec{} - 87.0f : x;
  IntVec n = __builtin_convertvector(x * 1.44269504f - 0.5f, IntVec);  // rounds to nearest, for x <= 0
  Vec whole = __builtin_convertvector(n, Vec);
  Vec r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
  Vec e = Vec{} + 1.9875691500e-4f;
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    e = e * r + c;
  e = e * r * r + r + 1.0f;
  IntVec power = (n + 127) << 23;
  return tiny ? Vec{} : e * bits_of<Vec>(&power);
}

// Memory of this thread, aligned to vectors; what is in it goes with the next call for the same purpose.
template <int purpose>
float* scratch(size_t size) {
  thread_local std::vector<float> memory;
  if (memory.size() < size + kLanes) memory.resize(size + kLanes);
  void* start = memory.data();
  size_t space = memory.size() * sizeof(float);
  return static_cast<float*>(std::align(sizeof(Vec), size * sizeof(float), start, space));
}

// Runs task(0) ... task(count - 1) on this thread and on those of XLA that have nothing else to do. A thread that comes
// when all tasks are taken does nothing, so nobody waits for a thread that may itself be waiting here.
template <class Task>
void share(ffi::ThreadPool& pool, int64_t count, const Task& task) {
  struct Work {
    std::atomic<int64_t> next{0}, done{0};
    int64_t count;
    const Task* task;

    void run() {
      for (int64_t i; (i = next.fetch_add(1)) < count; done.fetch_add(1, std::memory_order_release)) (*task)(i);
    }
  };
  auto work = std::make_shared<Work>();
  work->count = count;
  work->task = &task;
  int64_t helpers = std::min<int64_t>(pool.num_threads(), count) - 1;
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule([work] { work->run(); });
  work->run();
  for (int spins = 0; work->done.load(std::memory_order_acquire) < count; ++spins)
    if (spins > 1000) std::this_thread::yield();
}

// ---- products -------------------------------------------------------------------------------------------------------

// Outputs that a task computes are those of about so many bytes of weights, and a multiple of every tile's (3, 4, 6).
constexpr int64_t kTaskBytes = 64 << 10;

// One to four rows: every output is a sum along memory, of kOutputs x kRows of them at a time.
template <int kRows, class W>
void few_rows(const float* x_RD, const W* w_FD, float* y_RF, int64_t rows, int64_t inputs, int64_t outputs,
              int64_t first, int64_t last) {
  constexpr int kOutputs = kRows == 4 ? 3 : 4;
  const float* x[kRows];
  for (int r = 0; r < kRows; ++r) x[r] = x_RD + std::min<int64_t>(r, rows - 1) * inputs;
  for (int64_t f = first; f < last; f += kOutputs) {
    const W* w[kOutputs];
    for (int i = 0; i < kOutputs; ++i) w[i] = w_FD + std::min(f + i, last - 1) * inputs;
    Vec acc[kOutputs][kRows] = {};
    int64_t d = 0;
    for (; d + kLine <= inputs; d += kLine) {
      for (int i = 0; i < kOutputs; ++i) prefetch(w[i] + kOutputs * inputs + d);  // the next ones
      for (int l = 0; l < kLine; l += kLanes) {
        Vec weight[kOutputs];
        for (int i = 0; i < kOutputs; ++i) weight[i] = load(w[i] + d + l);
        for (int r = 0; r < kRows; ++r) {
          Vec input = load(x[r] + d + l);
          for (int i = 0; i < kOutputs; ++i) acc[i][r] += input * weight[i];
        }
      }
    }
    float total[kOutputs][kRows];
    for (int i = 0; i < kOutputs; ++i)
      for (int r = 0; r < kRows; ++r) total[i][r] = sum(acc[i][r]);
    for (; d < inputs; ++d)
      for (int i = 0; i < kOutputs; ++i)
        for (int r = 0; r < kRows; ++r) total[i][r] += x[r][d] * number(w[i][d]);
    for (int i = 0; i < kOutputs && f + i < last; ++i)
      for (int r = 0; r < kRows && r < rows; ++r) y_RF[r * outputs + f + i] = total[i][r];
  }
}

// More rows, kVecs vectors of them side by side (groups of inputs x kVecs x kLanes numbers). A weight is multiplied
// with all rows of a group, by broadcasting; the sums of a tile, outputs x rows, stay in registers.
template <int kVecs, class W>
void many_rows(const float* x_GDR, const W* w_FD, float* y_RF, int64_t rows, int64_t inputs, int64_t outputs,
               int64_t first, int64_t last) {
  constexpr int kOutputs = 6, kWidth = kVecs * kLanes;
  constexpr int kSums = kVecs == 1 ? 2 : 1;  // as many sums as a processor needs to have two under way in every cycle
  for (int64_t f = first; f < last; f += kOutputs) {
    const W* w[kOutputs];
    for (int i = 0; i < kOutputs; ++i) w[i] = w_FD + std::min(f + i, last - 1) * inputs;
    for (int64_t start = 0; start < rows; start += kWidth) {
      const float* x_DR = x_GDR + start * inputs;
      Vec acc[kSums][kOutputs][kVecs] = {};
      auto add = [&](int64_t d, int s) __attribute__((always_inline)) {
        Vec x[kVecs];
        for (int v = 0; v < kVecs; ++v) x[v] = load(x_DR + d * kWidth + v * kLanes);
        for (int i = 0; i < kOutputs; ++i)
          for (int v = 0; v < kVecs; ++v) acc[s][i][v] += x[v] * number(w[i][d]);
      };
      int64_t d = 0;
      for (; d + kLine <= inputs; d += kLine) {
        for (int i = 0; i < kOutputs; ++i) prefetch(w[i] + kOutputs * inputs + d);  // the next ones
        for (int l = 0; l < kLine; l += kSums)
          for (int s = 0; s < kSums; ++s) add(d + l + s, s);
      }
      for (; d < inputs; ++d) add(d, 0);
      float y[kOutputs][kWidth];
      for (int i = 0; i < kOutputs; ++i)
        for (int v = 0; v < kVecs; ++v)
          store(kSums == 1 ? acc[0][i][v] : acc[0][i][v] + acc[kSums - 1][i][v], &y[i][v * kLanes]);
      for (int64_t r = 0; r < std::min<int64_t>(kWidth, rows - start); ++r)
        for (int64_t i = 0; i < std::min<int64_t>(kOutputs, last - f); ++i)
          y_RF[(start + r) * outputs + f + i] = y[i][r];
    }
  }
}

// y[r, f] = sum_d x[r, d] w[f, d]
template <class W>
void product(ffi::ThreadPool& pool, const float* x_RD, const W* w_FD, float* y_RF, int64_t rows, int64_t inputs,
             int64_t outputs) {
  int64_t size = std::max<int64_t>(12, kTaskBytes / (inputs * sizeof(W)) / 12 * 12);
  auto shared = [&](auto compute, const float* x) {
    share(pool, (outputs + size - 1) / size, [&](int64_t i) {
      compute(x, w_FD, y_RF, rows, inputs, outputs, i * size, std::min(outputs, (i + 1) * size));
    });
  };
  if (rows == 1) return shared(few_rows<1, W>, x_RD);
  if (rows == 2) return shared(few_rows<2, W>, x_RD);
  if (rows <= 4) return shared(few_rows<4, W>, x_RD);
  constexpr int kMany = 16 / kLanes;
  int64_t width = rows <= kLanes ? kLanes : kMany * kLanes, groups = (rows + width - 1) / width;
  float* x_GDR = scratch<0>(groups * inputs * width);
  for (int64_t start = 0; start < inputs; start += kLine)  // a line of every row at a time
    for (int64_t r = 0; r < groups * width; ++r)
      for (int64_t d = start; d < std::min(start + kLine, inputs); ++d)
        x_GDR[(r / width * inputs + d) * width + r % width] = r < rows ? x_RD[r * inputs + d] : 0.0f;
  if (width == kLanes) return shared(many_rows<1, W>, x_GDR);
  shared(many_rows<kMany, W>, x_GDR);
}

ffi::Error Product(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x_RD, ffi::AnyBuffer w_FD,
                   ffi::ResultBuffer<ffi::F32> y_RF) {
  int64_t rows = x_RD.dimensions()[0], inputs = x_RD.dimensions()[1], outputs = w_FD.dimensions()[0];
  auto with = [&](auto* w) { product(pool, x_RD.typed_data(), w, y_RF->typed_data(), rows, inputs, outputs); };
  switch (w_FD.element_type()) {
    case ffi::F32: with(static_cast<const float*>(w_FD.untyped_data())); break;
    case ffi::BF16: with(static_cast<const Bfloat16*>(w_FD.untyped_data())); break;
    default: return ffi::Error::InvalidArgument("weights are float32 or bfloat16");
  }
  return ffi::Error::Success();
}

// ---- attention ------------------------------------------------------------------------------------------------------

// A slot that is asked for, so many before it is read.
constexpr int64_t kAhead = 16;
template <class S>
inline void prefetch_slot(const S* x_H, int64_t dim) {
  for (int64_t h = 0; h < dim; h += 64 / sizeof(S)) prefetch(x_H + h);
}

// sum_h a[h] b[h]
template <class S>
inline float dot(const float* a_H, const S* b_H, int64_t dim) {
  Vec acc[2] = {};
  int64_t h = 0;
  for (; h + 2 * kLanes <= dim; h += 2 * kLanes)
    for (int i = 0; i < 2; ++i) acc[i] += load(a_H + h + i * kLanes) * load(b_H + h + i * kLanes);
  for (; h + kLanes <= dim; h += kLanes) acc[0] += load(a_H + h) * load(b_H + h);
  float total = sum(acc[0] + acc[1]);
  for (; h < dim; ++h) total += a_H[h] * number(b_H[h]);
  return total;
}

// o[h] = sum_t weight[t] v[t, h] for kVecs vectors of h
template <int kVecs, class S>
inline void weigh(const float* weight_T, const S* v_TH, float* o_H, int64_t slots, int64_t dim) {
  Vec acc[kVecs] = {};
  for (int64_t t = 0; t < slots; ++t) {
    prefetch_slot(v_TH + (t + kAhead) * dim, kVecs * kLanes);
    for (int i = 0; i < kVecs; ++i) acc[i] += weight_T[t] * load(v_TH + t * dim + i * kLanes);
  }
  for (int i = 0; i < kVecs; ++i) store(acc[i], o_H + i * kLanes);
}

// One query: softmax(scale q K^T) V over the first slots. k_scale and v_scale are those of an int8 cache, or null.
template <class S>
void attend(const float* q_H, const S* k_TH, const S* v_TH, const float* k_scale_T, const float* v_scale_T, float* o_H,
            int64_t slots, int64_t dim, float scale, float softcap) {
  float* weight_T = scratch<1>(slots + kLanes);
  float largest = -std::numeric_limits<float>::infinity();
  for (int64_t t = 0; t < slots; ++t) {
    prefetch_slot(k_TH + (t + kAhead) * dim, dim);
    float logit = scale * dot(q_H, k_TH + t * dim, dim);
    if (k_scale_T) logit *= k_scale_T[t];
    if (softcap > 0) logit = softcap * std::tanh(logit / softcap);
    weight_T[t] = logit;
    largest = logit > largest ? logit : largest;
  }
  std::fill_n(weight_T + slots, kLanes, -std::numeric_limits<float>::infinity());
  Vec totals = {};
  for (int64_t t = 0; t < slots; t += kLanes) {
    Vec weight = exp_of(load(weight_T + t) - largest);
    totals += weight;
    store(weight, weight_T + t);
  }
  float inverse = 1.0f / sum(totals);
  for (int64_t t = 0; t < slots; ++t) weight_T[t] *= v_scale_T ? inverse * v_scale_T[t] : inverse;
  int64_t h = 0;
  for (; h + 8 * kLanes <= dim; h += 8 * kLanes) weigh<8>(weight_T, v_TH + h, o_H + h, slots, dim);
  for (; h + 4 * kLanes <= dim; h += 4 * kLanes) weigh<4>(weight_T, v_TH + h, o_H + h, slots, dim);
  for (; h + kLanes <= dim; h += kLanes) weigh<1>(weight_T, v_TH + h, o_H + h, slots, dim);
  for (; h < dim; ++h) {
    o_H[h] = 0.0f;
    for (int64_t t = 0; t < slots; ++t) o_H[h] += weight_T[t] * number(v_TH[t * dim + h]);
  }
}

ffi::Error Attend(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> q_BKGH, ffi::AnyBuffer k_BKTH, ffi::AnyBuffer v_BKTH,
                  ffi::RemainingArgs rest, ffi::ResultBuffer<ffi::F32> o_BKGH, float scale, float softcap) {
  auto shape = q_BKGH.dimensions();
  int64_t heads = shape[1], group = shape[2], dim = shape[3], length = k_BKTH.dimensions()[2];
  auto position_B = rest.get<ffi::Buffer<ffi::S32>>(0);
  if (!position_B.has_value()) return position_B.error();
  const float *k_scale = nullptr, *v_scale = nullptr;
  if (rest.size() == 3) {
    auto k = rest.get<ffi::Buffer<ffi::F32>>(1), v = rest.get<ffi::Buffer<ffi::F32>>(2);
    if (!k.has_value()) return k.error();
    if (!v.has_value()) return v.error();
    k_scale = k->typed_data(), v_scale = v->typed_data();
  }
  auto with = [&](auto* k, auto* v) {
    share(pool, shape[0] * heads, [&](int64_t i) {
      int64_t slots = std::min<int64_t>(position_B->typed_data()[i / heads] + 1, length);
      for (int64_t g = i * group; g < (i + 1) * group; ++g) {
        float* o_H = o_BKGH->typed_data() + g * dim;
        if (slots <= 0)
          std::fill_n(o_H, dim, 0.0f);
        else
          attend(q_BKGH.typed_data() + g * dim, k + i * length * dim, v + i * length * dim,
                 k_scale ? k_scale + i * length : nullptr, v_scale ? v_scale + i * length : nullptr, o_H, slots, dim,
                 scale, softcap);
      }
    });
  };
  const void *k = k_BKTH.untyped_data(), *v = v_BKTH.untyped_data();
  switch (k_BKTH.element_type()) {
    case ffi::F32: with(static_cast<const float*>(k), static_cast<const float*>(v)); break;
    case ffi::BF16: with(static_cast<const Bfloat16*>(k), static_cast<const Bfloat16*>(v)); break;
    case ffi::S8: with(static_cast<const int8_t*>(k), static_cast<const int8_t*>(v)); break;
    default: return ffi::Error::InvalidArgument("keys and values are float32, bfloat16 or int8");
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(llmlab_product, Product,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(llmlab_attend, Attend,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<float>("scale")
                                  .Attr<float>("softcap"));
