// Normal numbers as torch draws them on a CPU with AVX2: from the same stream, by the same formulas.
//
// Box and Muller make sixteen of sixteen uniform numbers, the first eight of which give the radius
// and the others the angle. Those come from a Mersenne Twister (Matsumoto and Nishimura 1998);
// logarithm, sine and cosine are those of Cephes in single precision. torch takes numbers from its
// twister one by one, which is most of its time; here some hundred come at once.
//
// `gaussian_draws.py` compiles this file.

#if defined(__AVX2__) && defined(__FMA__)

#include <immintrin.h>

#include <algorithm>
#include <cstdint>

namespace {

// Half of a group of sixteen, also where registers are wider.
constexpr int EIGHT = 8;
using Floats = __m256;
using Whole = int32_t __attribute__((vector_size(32)));

inline Floats all(float x) { return _mm256_set1_ps(x); }
inline Floats bits(Whole x) { return (Floats)x; }
inline Whole bits(Floats x) { return (Whole)x; }
inline Floats choose(Whole which, Floats then, Floats otherwise) {
  return _mm256_blendv_ps(otherwise, then, bits(which));
}

// ---- uniform numbers

class Twister {
public:
  // Numbers at once: as many sixteens as none of them is made of another.
  static constexpr int COUNT = 208;

  explicit Twister(uint32_t seed) {
    sequence[0] = seed;
    for (int k = 1; k < STATE; k++) {
      sequence[k] = 1812433253u * (sequence[k - 1] ^ (sequence[k - 1] >> 30)) + k;
    }
  }

  // The next COUNT numbers, multiples of 2^-24 in [0, 1).
  void next(float *out) {
    if (known == LENGTH) {
      std::copy_n(sequence + known - STATE, STATE, sequence);
      known = STATE;
    }
    const uint32_t *past = sequence + known - STATE;
    uint32_t *fresh = sequence + known;
#pragma omp simd
    for (int k = 0; k < COUNT; k++) {
      const uint32_t high = past[k] & 0x80000000u, low = past[k + 1] & 0x7fffffffu;
      const uint32_t twisted = ((high | low) >> 1) ^ (-(low & 1) & 0x9908b0dfu);
      uint32_t y = fresh[k] = past[k + 397] ^ twisted;
      y ^= y >> 11;
      y ^= (y << 7) & 0x9d2c5680u;
      y ^= (y << 15) & 0xefc60000u;
      y ^= y >> 18;
      out[k] = (int32_t)(y & 0xffffff) * 0x1p-24f;
    }
    known += COUNT;
  }

private:
  static constexpr int STATE = 624, LENGTH = STATE + 16 * COUNT;
  uint32_t sequence[LENGTH];
  int known = STATE;
};

// ---- from uniform to normal ones

// log x for x in (0, 1].
inline Floats logarithm(Floats x) {
  Floats exponent = __builtin_convertvector((bits(x) >> 23) - 126, Floats);
  x = bits((bits(x) & 0x007fffff) | 0x3f000000); // in [1/2, 1)
  const Whole small = x < all(0.707106781186547524f);
  exponent -= choose(small, all(1), all(0));
  x = (x - 1) + choose(small, x, all(0));
  const Floats square = x * x;
  Floats y = all(7.0376836292e-2f);
  y = y * x - 1.1514610310e-1f;
  y = y * x + 1.1676998740e-1f;
  y = y * x - 1.2420140846e-1f;
  y = y * x + 1.4249322787e-1f;
  y = y * x - 1.6668057665e-1f;
  y = y * x + 2.0000714765e-1f;
  y = y * x - 2.4999993993e-1f;
  y = y * x + 3.3333331174e-1f;
  y = y * x * square;
  y = y + exponent * -2.12194440e-4f;
  y = y - square * 0.5f;
  return (x + y) + exponent * 0.693359375f;
}

// Sine and cosine of x >= 0.
inline void sine_and_cosine(Floats x, Floats &sine, Floats &cosine) {
  // Eighths of a turn, up to an even one.
  const Whole octant = (__builtin_convertvector(x * 1.27323954473516f, Whole) + 1) & ~1;
  const Floats turned = __builtin_convertvector(octant, Floats);
  x = x + turned * -0.78515625f; // pi / 4 in three parts
  x = x + turned * -2.4187564849853515625e-4f;
  x = x + turned * -3.77489497744594108e-8f;
  const Floats square = x * x;
  Floats even = all(2.443315711809948e-5f);
  even = even * square - 1.388731625493765e-3f;
  even = even * square + 4.166664568298827e-2f;
  even = even * square * square;
  even = (even - square * 0.5f) + 1;
  Floats odd = all(-1.9515295891e-4f);
  odd = odd * square + 8.3321608736e-3f;
  odd = odd * square - 1.6666654611e-1f;
  odd = odd * square * x + x;
  const Whole straight = (octant & 2) == 0;
  sine = bits(bits(choose(straight, odd, even)) ^ ((octant & 4) << 29));
  cosine = bits(bits(choose(straight, even, odd)) ^ ((~(octant - 2) & 4) << 29));
}

// Sixteen normal numbers of as many uniform ones.
inline void box_muller(const float *uniform, float deviation, float *out) {
  const Floats radius = _mm256_sqrt_ps(logarithm(1 - _mm256_loadu_ps(uniform)) * -2.0f);
  Floats sine, cosine;
  sine_and_cosine(_mm256_loadu_ps(uniform + EIGHT) * 6.283185307179586f, sine, cosine);
  _mm256_storeu_ps(out, radius * cosine * deviation);
  _mm256_storeu_ps(out + EIGHT, radius * sine * deviation);
}

} // namespace

// Draw k fills row k of out, (draws, count), from the twister of the seed `first_seed` + k; count
// is a multiple of 16.
extern "C" void draw(long first_seed, float deviation, long draws, long count, float *out,
                     int threads) {
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (long k = 0; k < draws; k++) {
    Twister twister(first_seed + k);
    float uniform[Twister::COUNT];
    for (long begin = 0; begin < count; begin += Twister::COUNT) {
      twister.next(uniform);
      float *here = out + k * count + begin;
      const long rest = std::min<long>(Twister::COUNT, count - begin);
      for (long j = 0; j < rest; j += 2 * EIGHT) box_muller(uniform + j, deviation, here + j);
    }
  }
}

#endif
