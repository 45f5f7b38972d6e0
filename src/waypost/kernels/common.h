// Vectors of sixteen lanes, bfloat16 and a fixed exp, in GCC's portable vector extensions: one source for every processor.
//
// Reductions have one order: lanes add in a fixed tree, rows and keys in ascending order. Nothing here depends on the number
// of threads, so neither do the bits.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <type_traits>
#if defined(__AVX512F__) || defined(__FMA__)
#include <immintrin.h>
#endif

namespace waypost {

constexpr int kLanes = 16;
#define ALONE __attribute__((noinline))  // inlined into several callers, a loop is compiled for each, and may lose its registers

template <class A> struct VecOf { typedef A type __attribute__((vector_size(kLanes * sizeof(A)))); };
template <class A> using Vec = typename VecOf<A>::type;
typedef int32_t VecI __attribute__((vector_size(kLanes * 4)));
typedef int64_t VecL __attribute__((vector_size(kLanes * 8)));
typedef uint32_t VecU __attribute__((vector_size(kLanes * 4)));
typedef uint16_t VecH __attribute__((vector_size(kLanes * 2)));
typedef uint16_t VecW __attribute__((vector_size(kLanes * 4)));

struct bf16 {
  uint16_t bits;
};

// The type in which an element type is computed: float for bf16 and float, double for double.
template <class T> struct WideOf { typedef float type; };
template <> struct WideOf<double> { typedef double type; };
template <class T> using Wide = typename WideOf<T>::type;

template <class A> inline Vec<A> splat(A x) { return x - Vec<A>{}; }  // x - 0 is x for every x, so it folds to a broadcast

inline Vec<float> load(const float *p) { Vec<float> v; std::memcpy(&v, p, sizeof v); return v; }
inline Vec<double> load(const double *p) { Vec<double> v; std::memcpy(&v, p, sizeof v); return v; }
inline Vec<float> load(const bf16 *p) {
  VecH h;
  std::memcpy(&h, p, sizeof h);
#if defined(__AVX512F__)  // in one step: the compiler would go by halves
  return (Vec<float>)((VecU)_mm512_cvtepu16_epi32((__m256i)h) << 16);
#else
  return (Vec<float>)(__builtin_convertvector(h, VecU) << 16);
#endif
}

inline VecW load_wide(const void *p) { VecW v; std::memcpy(&v, p, sizeof v); return v; }  // 32 bfloat16 as they lie

inline void store(float *p, Vec<float> v) { std::memcpy(p, &v, sizeof v); }
inline void store(double *p, Vec<double> v) { std::memcpy(p, &v, sizeof v); }
inline void store(bf16 *p, Vec<float> v) {  // round to nearest even; NaN stays NaN
#if defined(__AVX512BF16__) && defined(__AVX512DQ__)
  // The processor's own conversion does the same but for NaN, whose payload it keeps, and denormals, which it takes for zero.
  constexpr int nan_or_denormal = 0x01 | 0x80 | 0x20;
  if (__builtin_expect(_mm512_fpclass_ps_mask((__m512)v, nan_or_denormal) == 0, 1)) {
    const __m256bh h = _mm512_cvtneps_pbh((__m512)v);
    std::memcpy(p, &h, sizeof h);
    return;
  }
#endif
  VecU u;
  std::memcpy(&u, &v, sizeof u);
  VecU rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  VecU nan = (VecU)(v != v);
  VecH h = __builtin_convertvector((nan & 0x7fc0u) | (~nan & rounded), VecH);
  std::memcpy(p, &h, sizeof h);
}

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(bf16 x) {
  uint32_t u = (uint32_t)x.bits << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

// The first n < 16 elements; the other lanes are zero on loading and untouched on storing.
template <class T> inline Vec<Wide<T>> load_part(const T *p, int n) {
  Wide<T> buffer[kLanes] = {};
  for (int i = 0; i < n; ++i) buffer[i] = widen(p[i]);
  return load(buffer);
}
template <class T> inline void store_part(T *p, Vec<Wide<T>> v, int n) {
  T buffer[kLanes];
  store(buffer, v);
  std::memcpy(p, buffer, n * sizeof(T));
}
template <class T> inline Vec<Wide<T>> load_some(const T *p, int n) { return n >= kLanes ? load(p) : load_part(p, n); }
template <class T> inline void store_some(T *p, Vec<Wide<T>> v, int n) {
  if (n >= kLanes) store(p, v);
  else store_part(p, v, n);
}

// to = from + with, `width` elements, rounded.
template <class T> ALONE void add_row(const T *from, const T *with, long width, T *to) {
  for (long k = 0; k < width; k += kLanes) {
    const int n = (int)(width - k < kLanes ? width - k : kLanes);
    store_some(to + k, load_some(from + k, n) + load_some(with + k, n), n);
  }
}

// a * b + c with one rounding where the processor has it, two where it has not: written out, never left to the compiler,
// which might contract one copy of a loop and not another (the sources are compiled with -ffp-contract=off).
template <class A> inline Vec<A> fma(Vec<A> a, Vec<A> b, Vec<A> c) {
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4) {
    return (Vec<A>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
  } else {
    __m512d x[2], y[2], z[2];
    std::memcpy(x, &a, sizeof x), std::memcpy(y, &b, sizeof y), std::memcpy(z, &c, sizeof z);
    for (int i = 0; i < 2; ++i) z[i] = _mm512_fmadd_pd(x[i], y[i], z[i]);
    std::memcpy(&c, z, sizeof z);
    return c;
  }
#elif defined(__FMA__)
  constexpr int n = sizeof(A) / 2;  // 256-bit halves
  if constexpr (sizeof(A) == 4) {
    __m256 x[n], y[n], z[n];
    std::memcpy(x, &a, sizeof x), std::memcpy(y, &b, sizeof y), std::memcpy(z, &c, sizeof z);
    for (int i = 0; i < n; ++i) z[i] = _mm256_fmadd_ps(x[i], y[i], z[i]);
    std::memcpy(&c, z, sizeof z);
  } else {
    __m256d x[n], y[n], z[n];
    std::memcpy(x, &a, sizeof x), std::memcpy(y, &b, sizeof y), std::memcpy(z, &c, sizeof z);
    for (int i = 0; i < n; ++i) z[i] = _mm256_fmadd_pd(x[i], y[i], z[i]);
    std::memcpy(&c, z, sizeof z);
  }
  return c;
#else
  return a * b + c;
#endif
}

// What the products of attention and of linear layers take at once: a value, or in bfloat16 a pair of neighbours, the first in
// the low half. `one` is broadcast, `many` has one a lane, and both are added to a vector of sums in the wide type.
typedef uint32_t Pair;
template <class T> struct UnitOf {
  typedef T one;
  typedef Vec<T> many;
  static constexpr int size = 1;
};
template <> struct UnitOf<bf16> {
  typedef Pair one;
  typedef VecU many;
  static constexpr int size = 2;
};
template <class T> using Unit = typename UnitOf<T>::one;
template <class T> using Units = typename UnitOf<T>::many;
template <class T> constexpr int kUnit = UnitOf<T>::size;

inline VecU splat(Pair x) { return x | VecU{}; }
inline VecU load(const Pair *p) { VecU v; std::memcpy(&v, p, sizeof v); return v; }
inline void store(Pair *p, VecU v) { std::memcpy(p, &v, sizeof v); }

// c + a * b over units: of a pair the first product is added first.
inline Vec<float> add_product(Vec<float> a, Vec<float> b, Vec<float> c) { return fma<float>(a, b, c); }
inline Vec<double> add_product(Vec<double> a, Vec<double> b, Vec<double> c) { return fma<double>(a, b, c); }
inline Vec<float> add_product(VecU a, VecU b, Vec<float> c) {
#if defined(__AVX512BF16__)
  return (Vec<float>)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
#else
  const VecU a_low = a << 16, a_high = a & 0xffff0000u, b_low = b << 16, b_high = b & 0xffff0000u;
  c = fma<float>((Vec<float>)a_low, (Vec<float>)b_low, c);
  return fma<float>((Vec<float>)a_high, (Vec<float>)b_high, c);
#endif
}

// Lane by lane, the unit of x[i] and, in a pair, y[i].
inline Vec<float> zip(const float *x, const float *) { return load(x); }
inline Vec<double> zip(const double *x, const double *) { return load(x); }
inline VecU zip(const bf16 *x, const bf16 *y) {
  VecH low, high;
  std::memcpy(&low, x, sizeof low), std::memcpy(&high, y, sizeof high);
  return __builtin_convertvector(low, VecU) | __builtin_convertvector(high, VecU) << 16;
}
// The units of N vectors of two rows: out[i] of x[16 i ...] and y[16 i ...].
template <int N, class T> inline void zip_many(const T *x, const T *y, Units<T> (&out)[N]) {
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) out[i] = zip(x + i * kLanes, y + i * kLanes);
}
// The units of two rows of sixteen that lie one behind the other.
template <class T> inline Units<T> zip_next(const T *x) { return zip(x, x + kLanes); }
#if defined(__AVX512BW__)  // whole registers in one shuffle
inline VecU zip_next(const bf16 *x) {
  return (VecU)__builtin_shuffle(load_wide(x), VecW{0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                    8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31});
}
inline void zip_many(const bf16 *x, const bf16 *y, VecU (&out)[4]) {
#pragma GCC unroll 2
  for (int i = 0; i < 4; i += 2) {
    const VecW a = load_wide(x + i * kLanes), b = load_wide(y + i * kLanes);
    out[i] = (VecU)__builtin_shuffle(a, b, VecW{0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47});
    out[i + 1] = (VecU)__builtin_shuffle(a, b, VecW{16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55,
                                                    24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63});
  }
}
#endif
// Rounds factors of products: as store, but magnitudes below 2^-126 become zero where the processor's own conversion does that.
template <class T> inline void store_factors(T *p, Vec<T> v) { store(p, v); }
inline void store_factors(bf16 *p, Vec<float> v) {
#if defined(__AVX512BF16__)
  const __m256bh h = _mm512_cvtneps_pbh((__m512)v);
  std::memcpy(p, &h, sizeof h);
#else
  store(p, v);
#endif
}
template <class T> inline void store_factors(T *p, Vec<Wide<T>> low, Vec<Wide<T>> high) {  // two vectors, one behind the other
  store_factors(p, low), store_factors(p + kLanes, high);
}
#if defined(__AVX512BF16__)
inline void store_factors(bf16 *p, Vec<float> low, Vec<float> high) {
  const __m512bh both = _mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
  std::memcpy(p, &both, sizeof both);
}
#endif
template <class T> inline Units<T> zip_factors(Vec<Wide<T>> x, Vec<Wide<T>> y) {  // units of x and, in a pair, y
  if constexpr (kUnit<T> == 1) {
    return x;
  } else {
    bf16 low[kLanes], high[kLanes];
    store_factors(low, x), store_factors(high, y);
    return zip(low, high);
  }
}
// The unit without what lies past its first element, or without its first: a zero, whatever stood there.
template <class T> inline Units<T> only_first(Units<T> x) {
  if constexpr (kUnit<T> == 1) return x;
  else return x & 0xffffu;
}
template <class T> inline Units<T> only_last(Units<T> x) {
  if constexpr (kUnit<T> == 1) return x;
  else return x & 0xffff0000u;
}

// Holds a value in a register where it is used several times; the compiler would load it again for each use.
inline void hold(Vec<float> &x) {
#if defined(__AVX512F__)
  asm("" : "+v"(x));
#endif
}
inline void hold(VecU &x) {
#if defined(__AVX512F__)
  asm("" : "+v"(x));
#endif
}
inline void hold(Vec<double> &) {}

// Folds a vector onto its lower half four times: lane i with lane i + 8, then i + 4, i + 2, i + 1.
template <class A, class F> inline A fold_lanes(Vec<A> v, F f) {
  typedef std::conditional_t<sizeof(A) == 4, VecI, VecL> Lanes;
  v = f(v, __builtin_shuffle(v, Lanes{8, 9, 10, 11, 12, 13, 14, 15}));
  v = f(v, __builtin_shuffle(v, Lanes{4, 5, 6, 7}));
  v = f(v, __builtin_shuffle(v, Lanes{2, 3}));
  v = f(v, __builtin_shuffle(v, Lanes{1}));
  return v[0];
}
// fold_lanes of each of four vectors, to out[0 .. 4]: the same steps, taken together.
template <class A, class F> inline void fold_four(const Vec<A> (&v)[4], F f, A *out) {
  typedef std::conditional_t<sizeof(A) == 4, VecI, VecL> Lanes;
  constexpr Lanes low_halves{0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23};
  constexpr Lanes low_quarters{0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27};
  Vec<A> two[2];
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i)
    two[i] = f(__builtin_shuffle(v[2 * i], v[2 * i + 1], low_halves), __builtin_shuffle(v[2 * i], v[2 * i + 1], low_halves + 8));
  Vec<A> all = f(__builtin_shuffle(two[0], two[1], low_quarters), __builtin_shuffle(two[0], two[1], low_quarters + 4));
  all = f(all, __builtin_shuffle(all, Lanes{2, 3, 2, 3, 6, 7, 6, 7, 10, 11, 10, 11, 14, 15, 14, 15}));
  all = f(all, __builtin_shuffle(all, Lanes{1, 1, 1, 1, 5, 5, 5, 5, 9, 9, 9, 9, 13, 13, 13, 13}));
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) out[i] = all[4 * i];
}
template <class A> inline A sum_lanes(Vec<A> v) {
  return fold_lanes<A>(v, [](Vec<A> x, Vec<A> y) { return x + y; });
}
template <class A> inline A max_lanes(Vec<A> v) {
  return fold_lanes<A>(v, [](Vec<A> x, Vec<A> y) { return x > y ? x : y; });
}

// A bit for each lane that is not zero, the first lane the lowest.
inline uint32_t mask_of(VecI lanes) {
#if defined(__AVX512DQ__)
  return _mm512_movepi32_mask((__m512i)lanes);
#else
  uint32_t mask = 0;
  for (int i = 0; i < kLanes; ++i) mask |= (lanes[i] ? 1u : 0u) << i;
  return mask;
#endif
}

// The largest of a row; a NaN counts as smaller than everything.
template <class T> inline Wide<T> peak_of(const T *row, long width) {
  typedef Wide<T> A;
  constexpr int many = 4;  // one comparison does not wait for another
  Vec<A> high[many];
  for (Vec<A> &each : high) each = splat(-std::numeric_limits<A>::infinity());
  long k = 0;
  for (; k + many * kLanes <= width; k += many * kLanes)
    for (int i = 0; i < many; ++i) {
      const Vec<A> x = load(row + k + i * kLanes);
      high[i] = x > high[i] ? x : high[i];
    }
  for (int i = 1; i < many; ++i) high[0] = high[i] > high[0] ? high[i] : high[0];
  A peak = max_lanes<A>(high[0]);
  for (; k < width; ++k) peak = widen(row[k]) > peak ? widen(row[k]) : peak;
  return peak;
}

// exp, Cody and Waite's reduction and a Taylor polynomial of degree 7 on |r| <= ln(2) / 2: below 2 units in the last place.
inline Vec<float> exp_lanes(Vec<float> x) {
  const Vec<float> low = splat(-87.0f), high = splat(88.0f), magic = splat(12582912.0f);
#if defined(__AVX512F__)  // the same bits with fewer instructions: max and min give their second operand if one is NaN
  const Vec<float> y = (Vec<float>)_mm512_min_ps((__m512)high, _mm512_max_ps((__m512)low, (__m512)x));
#else
  const VecI tiny = x < low, nan = x != x;
  Vec<float> y = x < low ? low : x;
  y = y > high ? high : y;
#endif
  const Vec<float> t = fma<float>(y, splat(1.44269504088896341f), magic);
  const Vec<float> n = t - magic;
  Vec<float> r = fma<float>(n, splat(-0.693145751953125f), y);
  r = fma<float>(n, splat(-1.42860682030941723212e-6f), r);
  Vec<float> p = splat(1.0f / 5040);
  for (float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) p = fma<float>(p, r, splat(c));
#if defined(__AVX512F__)
  const __mmask16 not_tiny = _mm512_cmp_ps_mask((__m512)x, (__m512)low, _CMP_NLT_UQ);
  return (Vec<float>)_mm512_maskz_scalef_ps(not_tiny, (__m512)p, (__m512)n);
#else
  VecI bits;
  std::memcpy(&bits, &p, sizeof bits);
  bits += __builtin_convertvector(n, VecI) << 23;
  Vec<float> out;
  std::memcpy(&out, &bits, sizeof out);
  out = tiny ? splat(0.0f) : out;
  return nan ? x : out;
#endif
}
inline Vec<double> exp_lanes(Vec<double> x) {
  double buffer[kLanes];
  store(buffer, x);
  for (double &value : buffer) value = std::exp(value);
  return load(buffer);
}

// A source is compiled once for every element type that it serves: -DWAYPOST_ELEMENT=float, bf16 or double. What it exports has
// the type in its name, so that one library can hold them all.
typedef WAYPOST_ELEMENT Element;

}  // namespace waypost

#define WAYPOST_JOIN(a, b) a##b
#define WAYPOST_NAME(name, element) WAYPOST_JOIN(waypost_##name##_, element)
#define EXPORT(name) WAYPOST_NAME(name, WAYPOST_ELEMENT)
