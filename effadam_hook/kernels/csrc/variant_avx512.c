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
#define FUSED 1
#define HAS_DOUBLE 0
#define VECTOR_BYTES 64
#define STRIP 32

#include "codes.h"

static inline __m512i codes_at(const uint8_t *code) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)code));
}

static inline __mmask16 live_of(int64_t left) {
    return left >= 16 ? 0xFFFF : (__mmask16)((1u << left) - 1);
}

/* `code` and `level` have room up to a multiple of 16. */
static void expand_codes(const Quantizer *quantizer, const uint8_t *restrict code, int64_t numel,
                         float *restrict level) {
    if (quantizer->linear) {
        __m512i zero = _mm512_set1_epi32(quantizer->magnitudes - 1);
        for (int64_t i = 0; i < numel; i += 16) {
            __m512i index = codes_at(code + i);
            _mm512_storeu_ps(level + i, _mm512_cvtepi32_ps(_mm512_sub_epi32(index, zero)));
        }
    } else {
        __m512 levels = _mm512_loadu_ps(quantizer->levels);
        for (int64_t i = 0; i < numel; i += 16) {
            __m512i index = codes_at(code + i);
            _mm512_storeu_ps(level + i, _mm512_permutexvar_ps(index, levels));
        }
    }
}

/* Decoding leaves codes in 32-bit lanes, where a shift brings the next plane down and the lookup of a
 * level, already times its scale, reads only as many low bits as a code has: tables repeat. Ternary
 * digits come down in pairs: `table` knows the second of a pair, `pairs` the first. */
typedef struct {
    const uint8_t *codes;
    __m512 scale, table, pairs;
} Sent;

static inline Sent sent_by(const Quantizer *quantizer, const uint8_t *codes, float scale) {
    const __m512i seconds = _mm512_setr_epi32(0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 0, 0, 0, 0, 0, 0);
    const __m512i firsts = _mm512_setr_epi32(0, 0, 0, 1, 1, 1, 2, 2, 2, 0, 0, 0, 0, 0, 0, 0);
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    __m512i code = _mm512_and_si512(lanes, _mm512_set1_epi32((1 << quantizer->plane_bytes) - 1));
    __m512 levels = _mm512_loadu_ps(quantizer->levels), factor = _mm512_set1_ps(scale);
    code = quantizer->planes == 5 ? seconds : code;
    return (Sent){.codes = codes,
                  .scale = factor,
                  .table = _mm512_mul_ps(factor, _mm512_permutexvar_ps(code, levels)),
                  .pairs = _mm512_mul_ps(factor, _mm512_permutexvar_ps(firsts, levels))};
}

/* Where sums go: to the caller's memory, to the last byte; to a scratch that may be written beyond the
 * block's end; or there, onto what is there. */
typedef enum { TO_CALLER, TO_SCRATCH, ONTO_SCRATCH } Target;

/* The sum over senders, in their order, of a block in columns of `rows` bytes. Strips of columns are
 * taken from the last to the first, so that one overwrites what spilled into its plane. */
static inline __attribute__((always_inline)) void
sum_planes(int planes, int rows, int senders, int whole, Target target, const Sent *sent, int64_t P,
           int64_t numel, float *out) {
    const __m512i three = _mm512_set1_epi32(3), nine = _mm512_set1_epi32(9);
    for (int64_t column = (P - 1) / 16 * 16; column >= 0; column -= 16) {
        __mmask16 live = whole ? 0xFFFF : live_of(P - column);
        __m512i word[FUSED_WORKERS];
        UNROLL for (int w = 0; w < senders; w++) {
            word[w] = _mm512_setzero_si512();
            UNROLL for (int row = 0; row < rows; row++) {
                const uint8_t *from = sent[w].codes + row * P + column;
                __m128i bytes = whole ? _mm_loadu_si128((const __m128i *)from)
                                      : _mm_maskz_loadu_epi8(live, from);
                __m512i lanes = _mm512_slli_epi32(_mm512_cvtepu8_epi32(bytes), (unsigned)(8 * row));
                word[w] = row ? _mm512_or_si512(word[w], lanes) : lanes;
            }
            if (planes == 5) word[w] = _mm512_mullo_epi16(word[w], _mm512_set1_epi32(270));
        }
        __m512i pair[FUSED_WORKERS];
        UNROLL for (int step = 0; step < planes; step++) {
            int64_t i = (planes == 5 ? 4 - step : step) * P + column;
            __mmask16 kept = 0xFFFF;
            if (!whole && target != TO_SCRATCH)
                kept = live & live_of(numel > i ? numel - i : 0);
            __m512 sum = target != ONTO_SCRATCH ? _mm512_setzero_ps()
                         : whole                ? _mm512_loadu_ps(out + i)
                                                : _mm512_maskz_loadu_ps(kept, out + i);
            UNROLL for (int w = 0; w < senders; w++) {
                __m512i code = word[w];
                if (planes == 5 && step % 2 == 0) {
                    /* See unpack_codes: the fraction's product with 9 carries two digits out. */
                    const __m512i base = step == 4 ? three : nine;
                    word[w] = _mm512_mullo_epi16(code, base);
                    pair[w] = code = _mm512_mulhi_epu16(code, base);
                } else if (planes == 5) {
                    code = pair[w];
                } else {
                    word[w] = _mm512_srli_epi32(code, (unsigned)rows);
                }
                int first = planes == 5 && step % 2 == 0 && step < 4;
                __m512 value = _mm512_permutexvar_ps(code, first ? sent[w].pairs : sent[w].table);
                sum = w == 0 && target != ONTO_SCRATCH ? value : _mm512_add_ps(sum, value);
            }
            if (whole || target == TO_SCRATCH)
                _mm512_storeu_ps(out + i, sum);
            else
                _mm512_mask_storeu_ps(out + i, kept, sum);
        }
    }
}

/* The same for blocks of 8 planes that are not whole columns of 16, such as the last one of a piece: rare,
 * so this is small, with one sender at a time and one loop for all widths of codes. */
static __attribute__((noinline, cold)) void
sum_partial_planes(int rows, int senders, Target target, const Sent *sent, int64_t P, int64_t numel,
                   float *out) {
    for (int w = 0; w < senders; w++)
        sum_planes(8, rows, 1, 0, w ? ONTO_SCRATCH : target, sent + w, P, numel, out);
}

/* The sum of 16 elements, of senders whose codes are whole bytes. Where a product with a level is exact,
 * adding it in one step rounds as adding it in two does. */
static inline __attribute__((always_inline)) __m512
sum_levels(int senders, int exact, Target target, const Sent *sent, const __m512i *levels, __m512 sum) {
    UNROLL for (int w = 0; w < senders; w++) {
        __m512 level = _mm512_cvtepi32_ps(levels[w]);
        if (target == TO_CALLER)
            sum = _mm512_mul_ps(sent[w].scale, level);
        else if (exact)
            sum = _mm512_fmadd_ps(sent[w].scale, level, sum);
        else
            sum = _mm512_add_ps(sum, _mm512_mul_ps(sent[w].scale, level));
    }
    return sum;
}

/* The same as sum_planes for codes that are whole bytes, of integer levels from -zero. */
static inline __attribute__((always_inline)) void
sum_bytes(int senders, int exact, Target target, const Sent *sent, int zero, int64_t numel, float *out) {
    __m512i levels[FUSED_WORKERS];
    int8_t bytes[FUSED_WORKERS][64];
    int64_t i = 0;
    for (; i + 64 <= numel; i += 64) {
        UNROLL for (int w = 0; w < senders; w++) {
            __m512i codes = _mm512_loadu_si512(sent[w].codes + i);
            _mm512_storeu_si512(bytes[w], _mm512_sub_epi8(codes, _mm512_set1_epi8((char)zero)));
        }
        UNROLL for (int part = 0; part < 64; part += 16) {
            UNROLL for (int w = 0; w < senders; w++)
                levels[w] = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(bytes[w] + part)));
            __m512 sum = target == ONTO_SCRATCH ? _mm512_loadu_ps(out + i + part) : _mm512_setzero_ps();
            _mm512_storeu_ps(out + i + part, sum_levels(senders, exact, target, sent, levels, sum));
        }
    }
    for (; i < numel; i += 16) {
        __mmask16 live = live_of(numel - i);
        UNROLL for (int w = 0; w < senders; w++) {
            __m512i codes = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(live, sent[w].codes + i));
            levels[w] = _mm512_sub_epi32(codes, _mm512_set1_epi32(zero));
        }
        __m512 sum = target == ONTO_SCRATCH ? _mm512_maskz_loadu_ps(live, out + i) : _mm512_setzero_ps();
        sum = sum_levels(senders, exact, target, sent, levels, sum);
        _mm512_mask_storeu_ps(out + i, live, sum);
    }
}

/* Whether the products of these scales with levels of 7 bits have at most 24. */
static int products_are_exact(int senders, const float *scale) {
    uint32_t low = 0;
    for (int w = 0; w < senders; w++) low |= bits_of_float(scale[w]) & 0x7F;
    return low == 0;
}

static inline __attribute__((always_inline)) void
sum_sent(int senders, Target target, const Quantizer *quantizer, const uint8_t *const *codes,
         const float *scale, int64_t numel, float *out) {
    Sent sent[FUSED_WORKERS];
    UNROLL for (int w = 0; w < senders; w++) sent[w] = sent_by(quantizer, codes[w], scale[w]);
    /* A sum begins at +0, which matters where the first term is -0. */
    if (target == TO_SCRATCH) {
        sent[0].table = _mm512_add_ps(_mm512_setzero_ps(), sent[0].table);
        sent[0].pairs = _mm512_add_ps(_mm512_setzero_ps(), sent[0].pairs);
    }
    int64_t P = columns_of(quantizer, numel);
    int whole = P % 16 == 0 && P * quantizer->planes == numel;
    switch (quantizer->planes * 16 + quantizer->plane_bytes) {
#define CASE(rows)                                                           \
    case 8 * 16 + rows:                                                      \
        if (whole)                                                           \
            sum_planes(8, rows, senders, 1, target, sent, P, numel, out);    \
        else                                                                 \
            sum_partial_planes(rows, senders, target, sent, P, numel, out);  \
        break;
        CASE(1)
        CASE(2)
        CASE(3)
        CASE(4)
#undef CASE
    case 5 * 16 + 1: /* blocks are seldom multiples of 80 */
        sum_planes(5, 1, senders, 0, target, sent, P, numel, out);
        break;
    default:
        if (target != TO_CALLER && products_are_exact(senders, scale))
            sum_bytes(senders, 1, target, sent, quantizer->magnitudes - 1, numel, out);
        else
            sum_bytes(senders, 0, target, sent, quantizer->magnitudes - 1, numel, out);
    }
}

static void fused_decode(const Quantizer *quantizer, const uint8_t *codes, float scale, int64_t numel,
                         float *out) {
    sum_sent(1, TO_CALLER, quantizer, &codes, &scale, numel, out);
}

/* The first or the next few workers, from 0 or onto what is there. */
static void fused_sum(const Quantizer *quantizer, int count, int onto, const uint8_t *const *codes,
                      const float *scales, int64_t numel, float *out) {
    /* Digits come from the last plane to the first, so a single strip would spill into a plane that
     * is complete already. */
    int spills = quantizer->planes == 5 && columns_of(quantizer, numel) < 16;
    if (count == FUSED_WORKERS && !onto && !spills) {
        sum_sent(FUSED_WORKERS, TO_SCRATCH, quantizer, codes, scales, numel, out);
        return;
    }
    if (!onto) memset(out, 0, (size_t)numel * sizeof(float));
    if (count == FUSED_WORKERS) {
        sum_sent(FUSED_WORKERS, ONTO_SCRATCH, quantizer, codes, scales, numel, out);
        return;
    }
    for (int w = 0; w < count; w++)
        sum_sent(1, ONTO_SCRATCH, quantizer, codes + w, scales + w, numel, out);
}

enum { CELLS = 16, LOWEST_OCTAVE = 127 - 8 };

/* How a cell is found: it has a constant width, or is an octave; with at most one threshold there is but
 * one cell. Integer levels up to the largest magnitude need none. */
typedef enum { CELL_WIDTH, CELL_OCTAVE, CELL_ONLY, CELL_NONE } CellKind;

/* Per cell, the thresholds in lower cells and the threshold inside. Ratios are in cell widths. */
typedef struct {
    CellKind kind;
    float per_unit;
    int32_t below[CELLS]; /* plus the code of magnitude 0 */
    float inside[CELLS];
} Cells;

static int cell_of(const Cells *cells, float ratio) {
    int cell = cells->kind == CELL_OCTAVE ? (int)(bits_of_float(ratio) >> 23) - LOWEST_OCTAVE : (int)ratio;
    return cell < 0 ? 0 : cell < CELLS ? cell : CELLS - 1;
}

static int fill_cells(const Quantizer *quantizer, Cells *cells) {
    int count[CELLS] = {0};
    for (int cell = 0; cell < CELLS; cell++) cells->inside[cell] = INFINITY;
    for (int t = 0; t < quantizer->magnitudes - 1; t++) {
        float threshold = quantizer->thresholds[t] * cells->per_unit;
        int cell = cell_of(cells, threshold);
        if (count[cell]++) return 0;
        cells->inside[cell] = threshold;
    }
    int below = quantizer->magnitudes - quantizer->has_zero;
    for (int cell = 0; cell < CELLS; below += count[cell++]) cells->below[cell] = below;
    return 1;
}

/* Finds cells that part the thresholds; without any, the general path is taken. */
static int find_cells(const Quantizer *quantizer, Cells *cells) {
    cells->per_unit = 1;
    if (quantizer->magnitudes <= 2) {
        cells->kind = CELL_ONLY;
        cells->below[0] = quantizer->magnitudes - quantizer->has_zero;
        cells->inside[0] = quantizer->magnitudes == 2 ? quantizer->thresholds[0] : INFINITY;
        return 1;
    }
    if (quantizer->linear && quantizer->spread == 0) {
        cells->kind = CELL_NONE;
        return 1;
    }
    if (quantizer->magnitudes > TABLE_THRESHOLDS) return 0;
    cells->kind = CELL_WIDTH;
    for (; cells->per_unit <= 16; cells->per_unit *= 2)
        if (fill_cells(quantizer, cells)) return 1;
    cells->kind = CELL_OCTAVE;
    cells->per_unit = 1;
    return fill_cells(quantizer, cells);
}

static float sum_of_register(__m512 lanes) {
    __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(lanes), _mm512_extractf32x8_ps(lanes, 1));
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

typedef struct {
    __m512 normal, inverse, inside, levels, products, squares;
    __m512i below, both_signs, top;
} Quantizing;

/* The codes of one row of a block, as much of it as is live. */
static inline __attribute__((always_inline)) __m512i
quantize_row(CellKind kind, Quantizing *state, const float *value, __mmask16 live,
             float *level) {
    const __m512i one = _mm512_set1_epi32(1);
    __m512 y = _mm512_mul_ps(_mm512_loadu_ps(value), state->normal);
    __m512 ratio = _mm512_mul_ps(_mm512_abs_ps(y), state->inverse);
    __mmask16 negative = _mm512_cmp_ps_mask(y, _mm512_setzero_ps(), _CMP_LT_OQ);
    __m512i chosen;
    __m512 q;
    if (kind == CELL_NONE) {
        /* Halves go down. A ratio exceeds the top level by no more than rounding does. */
        __m512 half_less = _mm512_sub_ps(ratio, _mm512_set1_ps(0.5f));
        chosen = _mm512_cvt_roundps_epi32(half_less, _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC);
        chosen = _mm512_mask_sub_epi32(chosen, negative, _mm512_setzero_si512(), chosen);
        q = _mm512_cvtepi32_ps(chosen);
        chosen = _mm512_add_epi32(chosen, state->top);
    } else if (kind == CELL_ONLY) {
        __mmask16 above = _mm512_cmp_ps_mask(ratio, state->inside, _CMP_GT_OQ);
        chosen = _mm512_mask_add_epi32(state->below, above, state->below, one);
    } else {
        __m512i cell = _mm512_cvttps_epi32(ratio);
        if (kind == CELL_OCTAVE) {
            cell = _mm512_srli_epi32(_mm512_castps_si512(ratio), 23);
            cell = _mm512_sub_epi32(cell, _mm512_set1_epi32(LOWEST_OCTAVE));
            cell = _mm512_max_epi32(cell, _mm512_setzero_si512());
        }
        cell = _mm512_min_epi32(cell, _mm512_set1_epi32(CELLS - 1));
        __mmask16 above =
            _mm512_cmp_ps_mask(ratio, _mm512_permutexvar_ps(cell, state->inside), _CMP_GT_OQ);
        chosen = _mm512_permutexvar_epi32(cell, state->below);
        chosen = _mm512_mask_add_epi32(chosen, above, chosen, one);
    }
    if (kind != CELL_NONE) {
        chosen = _mm512_mask_sub_epi32(chosen, negative, state->both_signs, chosen);
        q = _mm512_permutexvar_ps(chosen, state->levels);
    }
    q = _mm512_maskz_mov_ps(live, q);
    _mm512_storeu_ps(level, q);
    state->products = _mm512_add_ps(state->products, _mm512_mul_ps(y, q));
    state->squares = _mm512_add_ps(state->squares, _mm512_mul_ps(q, q));
    return chosen;
}

/* Four rows of codes in as many instructions as one row would take. */
static inline void store_codes(const __m512i *chosen, uint8_t *code) {
    const __m512i in_order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    __m512i first = _mm512_packs_epi32(chosen[0], chosen[1]);
    __m512i second = _mm512_packs_epi32(chosen[2], chosen[3]);
    __m512i bytes = _mm512_packus_epi16(first, second);
    _mm512_storeu_si512(code, _mm512_permutexvar_epi32(in_order, bytes));
}

static inline __attribute__((always_inline)) float
quantize_by(CellKind kind, const Quantizer *quantizer, const Cells *cells,
            const Ahead *ahead, const float *value, int64_t numel, float factor, float provisional,
            uint8_t *code, float *level) {
    int top = quantizer->magnitudes - 1, only = kind == CELL_ONLY;
    Quantizing state = {
        .normal = _mm512_set1_ps(factor),
        .inverse = _mm512_set1_ps(1 / provisional * cells->per_unit),
        .inside = only ? _mm512_set1_ps(*cells->inside) : _mm512_loadu_ps(cells->inside),
        .levels = _mm512_loadu_ps(quantizer->levels),
        .products = _mm512_setzero_ps(),
        .squares = _mm512_setzero_ps(),
        .below = only ? _mm512_set1_epi32(*cells->below) : _mm512_loadu_si512(cells->below),
        .both_signs = _mm512_set1_epi32(2 * top + !quantizer->has_zero),
        .top = _mm512_set1_epi32(top),
    };
    int64_t i = 0;
    for (; i + 64 <= numel; i += 64) {
        __m512i chosen[4];
        UNROLL for (int row = 0; row < 4; row++) {
            int64_t at = i + 16 * row;
            prefetch(ahead, 4 * at);
            chosen[row] = quantize_row(kind, &state, value + at, 0xFFFF, level + at);
        }
        store_codes(chosen, code + i);
    }
    for (; i < numel; i += 16) {
        prefetch(ahead, 4 * i);
        __mmask16 live = live_of(numel - i);
        __m512i chosen = quantize_row(kind, &state, value + i, live, level + i);
        _mm_storeu_si128((__m128i *)(code + i), _mm512_cvtepi32_epi8(chosen));
    }
    if (quantizer->absmax) return provisional;
    return sum_of_register(state.products) / sum_of_register(state.squares);
}

static float fused_quantize(const Quantizer *quantizer, const void *table, const Ahead *ahead,
                            const float *value, int64_t numel, float factor, float provisional,
                            uint8_t *code, float *level) {
    const Cells *cells = table;
    switch (cells->kind) {
#define CASE(kind)                                                                                  \
    case kind:                                                                                      \
        return quantize_by(kind, quantizer, cells, ahead, value, numel, factor, provisional, code,  \
                           level);
        CASE(CELL_WIDTH)
        CASE(CELL_OCTAVE)
        CASE(CELL_ONLY)
#undef CASE
    default:
        return quantize_by(CELL_NONE, quantizer, cells, ahead, value, numel, factor, provisional, code,
                           level);
    }
}

#include "variant.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif

#else
typedef int effadam_no_avx512;
#endif
