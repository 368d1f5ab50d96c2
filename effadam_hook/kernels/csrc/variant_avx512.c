/* AVX-512: codes, levels and least-squares sums of a block in one pass over registers.
 *
 * The index of a magnitude is found without comparing with every threshold: the ratio falls into one
 * of 16 cells, and no cell holds more than one threshold. */
#if defined(__x86_64__)

#include <immintrin.h>
#include <math.h>
#include <stddef.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,f16c,bmi2"))), \
                             apply_to = function)
#else
#pragma GCC target(                                                                                \
    "avx512f,avx512bw,avx512dq,avx512vl,f16c,bmi2,prefer-vector-width=512")
#endif

#include "convert.h"
#include "effadam_kernels.h"

#define VARIANT effadam_avx512
#define VARIANT_NAME "avx512"
#define FUSED_QUANTIZE 1

#include "codes.h"

/* `code` and `level` have room up to a multiple of 16. */
static void expand_codes(const Quantizer *quantizer, const uint8_t *restrict code, int64_t numel,
                         float *restrict level) {
    if (quantizer->linear) {
        __m512i zero = _mm512_set1_epi32(quantizer->magnitudes - 1);
        for (int64_t i = 0; i < numel; i += 16) {
            __m512i index = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(code + i)));
            _mm512_storeu_ps(level + i, _mm512_cvtepi32_ps(_mm512_sub_epi32(index, zero)));
        }
    } else {
        __m512 levels = _mm512_loadu_ps(quantizer->levels);
        for (int64_t i = 0; i < numel; i += 16) {
            __m512i index = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(code + i)));
            _mm512_storeu_ps(level + i, _mm512_permutexvar_ps(index, levels));
        }
    }
}

enum { CELLS = 16 };

typedef enum { CELL_WIDTH, CELL_OCTAVE, CELL_NONE } CellKind;

/* Per cell, the thresholds in lower cells and the threshold inside. */
typedef struct {
    CellKind kind;
    float per_unit;
    int32_t below[CELLS];
    float inside[CELLS];
} Cells;

enum { LOWEST_OCTAVE = 127 - 8 };

static int cell_of(const Cells *cells, float ratio) {
    int cell = cells->kind == CELL_OCTAVE ? (int)(bits_of_float(ratio) >> 23) - LOWEST_OCTAVE
                                          : (int)(ratio * cells->per_unit);
    return cell < 0 ? 0 : cell < CELLS ? cell : CELLS - 1;
}

static int fill_cells(const Quantizer *quantizer, Cells *cells) {
    int count[CELLS] = {0};
    for (int cell = 0; cell < CELLS; cell++) cells->inside[cell] = INFINITY;
    for (int t = 0; t < quantizer->magnitudes - 1; t++) {
        int cell = cell_of(cells, quantizer->thresholds[t]);
        if (count[cell]++) return 0;
        cells->inside[cell] = quantizer->thresholds[t];
    }
    for (int cell = 0, below = 0; cell < CELLS; below += count[cell++]) cells->below[cell] = below;
    return 1;
}

/* Finds cells that part the thresholds; without any, the general path is taken. */
static int find_cells(const Quantizer *quantizer, Cells *cells) {
    if (quantizer->magnitudes > TABLE_THRESHOLDS) {
        cells->kind = CELL_NONE;
        return quantizer->linear;
    }
    cells->kind = CELL_WIDTH;
    for (cells->per_unit = 1; cells->per_unit <= 16; cells->per_unit *= 2)
        if (fill_cells(quantizer, cells)) return 1;
    cells->kind = CELL_OCTAVE;
    return fill_cells(quantizer, cells);
}

static float sum_of_register(__m512 lanes) {
    __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(lanes), _mm512_extractf32x8_ps(lanes, 1));
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

static inline __attribute__((always_inline)) float
quantize_by(CellKind kind, const Quantizer *quantizer, const Cells *cells, const float *value,
            int64_t numel, float factor, float provisional, uint8_t *code, float *level) {
    const int absmax = quantizer->absmax;
    const __m512 zero = _mm512_setzero_ps();
    const __m512 normal = _mm512_set1_ps(factor), inverse = _mm512_set1_ps(1 / provisional);
    const __m512 per_unit = _mm512_set1_ps(cells->per_unit);
    const __m512 inside = _mm512_loadu_ps(cells->inside), levels = _mm512_loadu_ps(quantizer->levels);
    const __m512i below = _mm512_loadu_si512(cells->below), last = _mm512_set1_epi32(CELLS - 1);
    const __m512i one = _mm512_set1_epi32(1), octave = _mm512_set1_epi32(LOWEST_OCTAVE);
    const __m512i top = _mm512_set1_epi32(quantizer->magnitudes - 1);
    const __m512i positive = _mm512_set1_epi32(quantizer->magnitudes - quantizer->has_zero);
    __m512 products = zero, squares = zero;
    for (int64_t i = 0; i < numel; i += 16) {
        __mmask16 live = numel - i >= 16 ? 0xFFFF : (__mmask16)((1u << (numel - i)) - 1);
        __m512 y = _mm512_mul_ps(_mm512_loadu_ps(value + i), normal);
        __m512 ratio = _mm512_mul_ps(_mm512_abs_ps(y), inverse);
        __mmask16 negative = _mm512_cmp_ps_mask(y, zero, _CMP_LT_OQ);
        __m512i index;
        __mmask16 above;
        if (kind == CELL_NONE) {
            index = _mm512_cvttps_epi32(ratio);
            __m512 rest = _mm512_sub_ps(ratio, _mm512_cvtepi32_ps(index));
            above = _mm512_cmp_ps_mask(rest, _mm512_set1_ps(0.5f), _CMP_GT_OQ);
            index = _mm512_min_epi32(_mm512_mask_add_epi32(index, above, index, one), top);
        } else {
            __m512i cell;
            if (kind == CELL_WIDTH) {
                cell = _mm512_cvttps_epi32(_mm512_mul_ps(ratio, per_unit));
            } else {
                cell = _mm512_sub_epi32(_mm512_srli_epi32(_mm512_castps_si512(ratio), 23), octave);
                cell = _mm512_max_epi32(cell, _mm512_setzero_si512());
            }
            cell = _mm512_min_epi32(cell, last);
            above = _mm512_cmp_ps_mask(ratio, _mm512_permutexvar_ps(cell, inside), _CMP_GT_OQ);
            index = _mm512_permutexvar_epi32(cell, below);
            index = _mm512_mask_add_epi32(index, above, index, one);
        }
        __m512i both = _mm512_add_epi32(positive, index);
        both = _mm512_mask_sub_epi32(both, negative, top, index);
        __m512 q = kind == CELL_NONE ? _mm512_cvtepi32_ps(_mm512_sub_epi32(both, top))
                                     : _mm512_permutexvar_ps(both, levels);
        q = _mm512_maskz_mov_ps(live, q);
        _mm_storeu_si128((__m128i *)(code + i), _mm512_cvtepi32_epi8(both));
        _mm512_storeu_ps(level + i, q);
        if (!absmax) {
            products = _mm512_add_ps(products, _mm512_mul_ps(y, q));
            squares = _mm512_add_ps(squares, _mm512_mul_ps(q, q));
        }
    }
    return absmax ? provisional : sum_of_register(products) / sum_of_register(squares);
}

static float fused_quantize(const Quantizer *quantizer, const void *table, const float *value,
                            int64_t numel, float factor, float provisional, uint8_t *code,
                            float *level) {
    const Cells *cells = table;
    switch (cells->kind) {
    case CELL_WIDTH:
        return quantize_by(CELL_WIDTH, quantizer, cells, value, numel, factor, provisional, code, level);
    case CELL_OCTAVE:
        return quantize_by(CELL_OCTAVE, quantizer, cells, value, numel, factor, provisional, code, level);
    default:
        return quantize_by(CELL_NONE, quantizer, cells, value, numel, factor, provisional, code, level);
    }
}

#include "variant.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif

#else
typedef int effadam_no_avx512;
#endif
