/* AVX2: the plain engine compiled for 256 bits, with levels looked up in registers. */
#if defined(__x86_64__)

#include <immintrin.h>
#include <math.h>
#include <stddef.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,f16c,bmi2"))), apply_to = function)
#else
#pragma GCC target("avx2,f16c,bmi2")
#endif

#include "convert.h"
#include "effadam_kernels.h"

#define VARIANT effadam_avx2
#define VARIANT_NAME "avx2"
#define FUSED 0
#define HAS_DOUBLE 0
#define VECTOR_BYTES 32
#define STRIP 32

#include "codes.h"

/* `code` and `level` have room up to a multiple of 8. */
static void expand_codes(const Quantizer *quantizer, const uint8_t *restrict code, int64_t numel,
                         float *restrict level) {
    __m256i zero = _mm256_set1_epi32(quantizer->magnitudes - 1);
    __m256 low = _mm256_loadu_ps(quantizer->levels);
    __m256 high = _mm256_loadu_ps(quantizer->levels + 8);
    for (int64_t i = 0; i < numel; i += 8) {
        __m256i index = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(code + i)));
        __m256 value;
        if (quantizer->linear) {
            value = _mm256_cvtepi32_ps(_mm256_sub_epi32(index, zero));
        } else {
            __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
            value = _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index),
                                     _mm256_permutevar8x32_ps(high, index), upper);
        }
        _mm256_storeu_ps(level + i, value);
    }
}

#include "variant.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif

#else
typedef int effadam_no_avx2;
#endif
