/* The arithmetic of all three kernels, for one instruction set (VARIANT) and one type (REAL).
 *
 * Included twice by each variant. A group of neighbouring full blocks, or one partial block, goes
 * through every step of quantizers.py together in memory that stays in the first-level cache, so that
 * the latency of one block's sums and divisions hides behind the other blocks. */

#define PASTE_(a, b) a##_##b
#define PASTE(a, b) PASTE_(a, b)
#define FN(name) PASTE(name, REAL)
#define SCRATCH FN(Scratch)

#if REAL_IS_DOUBLE
#define UINT uint64_t
#define INT int64_t
#define MANTISSA_BITS 52
#define BIAS 1023
#define EXPONENT_LIMIT 1022
#define BITS_OF bits_of_double
#define REAL_OF double_of_bits
#define ABS __builtin_fabs
#define SQRT __builtin_sqrt
#define STORE_REAL STORE_F64
#define SMALLEST_NORMAL 0x1p-1022
#define LARGEST 0x1.fffffffffffffp1023
#else
#define UINT uint32_t
#define INT int32_t
#define MANTISSA_BITS 23
#define BIAS 127
#define EXPONENT_LIMIT 126
#define BITS_OF bits_of_float
#define REAL_OF float_of_bits
#define ABS __builtin_fabsf
#define SQRT __builtin_sqrtf
#define STORE_REAL STORE_F32
#define SMALLEST_NORMAL 0x1p-126f
#define LARGEST 0x1.fep127f /* that bfloat16 has */
#endif

#define INFINITE_BITS ((UINT)(2 * BIAS + 1) << MANTISSA_BITS)
#define TINY_BITS ((UINT)(BIAS - 100) << MANTISSA_BITS)

typedef REAL FN(any) __attribute__((aligned(1), may_alias));
#define REAL_ANY FN(any)

typedef struct {
    REAL value[MAX_BLOCK];   /* what is quantized, zeros up to a multiple of LANES */
    REAL total[MAX_BLOCK];   /* the same before preconditioning */
    REAL divisor[MAX_BLOCK]; /* of the preconditioner */
    REAL exp_avg[MAX_BLOCK], exp_avg_sq[MAX_BLOCK];
    REAL mean[MAX_BLOCK + 2 * LANES]; /* sums may spill beyond a block */
    float level[MAX_BLOCK + LANES];
    INT wide[MAX_BLOCK + LANES]; /* codes in lanes as wide as the arithmetic */
    uint8_t code[CODE_ROOM];
} SCRATCH;

typedef struct {
    UINT largest;  /* bits of the largest magnitude, not finite if anything is not */
    REAL power, inverse_power, provisional;
} FN(Block);
#define BLOCK FN(Block)

/* Converts elements from their storage. */
static void FN(fetch)(const void *x, int store, int64_t numel, REAL *restrict out) {
    switch (store) {
    case STORE_F32: {
        const f32_any *in = x;
        for (int64_t i = 0; i < numel; i++) out[i] = (REAL)in[i];
        break;
    }
    case STORE_F64: {
        const f64_any *in = x;
        for (int64_t i = 0; i < numel; i++) out[i] = (REAL)in[i];
        break;
    }
    case STORE_F16: {
        const u16_any *in = x;
        for (int64_t i = 0; i < numel; i++) out[i] = (REAL)float_of_f16(in[i]);
        break;
    }
    default: {
        const u16_any *in = x;
        for (int64_t i = 0; i < numel; i++) out[i] = (REAL)float_of_bf16(in[i]);
    }
    }
}

/* Converts elements into their storage. */
static void FN(stash)(const REAL *restrict in, int64_t numel, void *x, int store) {
    switch (store) {
    case STORE_F32: {
        f32_any *out = x;
        for (int64_t i = 0; i < numel; i++) out[i] = (float)in[i];
        break;
    }
    case STORE_F64: {
        f64_any *out = x;
        for (int64_t i = 0; i < numel; i++) out[i] = (double)in[i];
        break;
    }
    case STORE_F16: {
        u16_any *out = x;
        for (int64_t i = 0; i < numel; i++) out[i] = f16_of_float((float)in[i]);
        break;
    }
    default: {
        u16_any *out = x;
        for (int64_t i = 0; i < numel; i++) out[i] = bf16_of_float((float)in[i]);
    }
    }
}

/* From one storage to another. */
static void FN(convert)(const void *in, int in_store, int64_t numel, void *out, int out_store,
                        REAL *value) {
    if (in_store == out_store) {
        memcpy(out, in, (size_t)(numel * bytes_of_store[in_store]));
    } else {
        FN(fetch)(in, in_store, numel, value);
        FN(stash)(value, numel, out, out_store);
    }
}

static void *FN(at)(const void *x, int store, int64_t index) {
    return (char *)x + index * bytes_of_store[store];
}

/* The same within the largest magnitude; NaN stays NaN. */
static inline REAL FN(limit)(REAL value) {
    value = value > LARGEST ? LARGEST : value;
    return value < -LARGEST ? -LARGEST : value;
}

/* A result of a finite operand, where an infinity is an overflow; of another, the same. */
static inline REAL FN(saturate)(REAL result, REAL operand) {
    UINT operand_bits = BITS_OF(operand) & (~(UINT)0 >> 1), bits = BITS_OF(result) & (~(UINT)0 >> 1);
    return operand_bits < INFINITE_BITS && bits == INFINITE_BITS ? FN(limit)(result) : result;
}

/* Bits of the largest magnitude: above INFINITE_BITS if there is a NaN. */
static UINT FN(largest_of)(const REAL *restrict value, int64_t numel) {
    INT largest = 0;
    for (int64_t i = 0; i < numel; i++) {
        INT bits = (INT)(BITS_OF(value[i]) & (~(UINT)0 >> 1));
        largest = bits > largest ? bits : largest;
    }
    return (UINT)largest;
}

static REAL FN(sum_of_lanes)(const REAL *lanes) {
    REAL eight[8], four[4], two[2];
    for (int lane = 0; lane < 8; lane++) eight[lane] = lanes[lane] + lanes[lane + 8];
    for (int lane = 0; lane < 4; lane++) four[lane] = eight[lane] + eight[lane + 4];
    for (int lane = 0; lane < 2; lane++) two[lane] = four[lane] + four[lane + 2];
    return two[0] + two[1];
}

/* The lanes of a sum, in vectors of the variant's width: compilers keep an array of them in registers,
 * and an array of numbers in memory. */
typedef REAL FN(Vector) __attribute__((vector_size(VECTOR_BYTES)));
#define VECTOR FN(Vector)
#define WIDTH (VECTOR_BYTES / (int)sizeof(REAL))
#define PARTS (LANES / WIDTH)

static inline VECTOR FN(load)(const REAL *from) {
    VECTOR vector;
    memcpy(&vector, from, sizeof vector);
    return vector;
}

static inline VECTOR FN(load_levels)(const float *from) {
#if REAL_IS_DOUBLE
    typedef float Narrow __attribute__((vector_size(VECTOR_BYTES / 2)));
    Narrow narrow;
    memcpy(&narrow, from, sizeof narrow);
    return __builtin_convertvector(narrow, VECTOR);
#else
    return FN(load)(from);
#endif
}

static inline REAL FN(sum_of)(const VECTOR *parts) {
    REAL lanes[LANES];
    memcpy(lanes, parts, sizeof lanes);
    return FN(sum_of_lanes)(lanes);
}

#define FOR_PARTS UNROLL for (int part = 0; part < PARTS; part++)

/* The sum of `rows` rows of LANES elements. */
static REAL FN(lane_sum)(const REAL *value, int64_t rows) {
    VECTOR sum[PARTS] = {{0}};
    for (int64_t row = 0; row < rows; row++)
        FOR_PARTS sum[part] += FN(load)(value + row * LANES + part * WIDTH);
    return FN(sum_of)(sum);
}

/* The same of the squares of the elements times a factor. */
static REAL FN(lane_squares)(const REAL *value, REAL factor, int64_t rows) {
    VECTOR sum[PARTS] = {{0}};
    for (int64_t row = 0; row < rows; row++)
        FOR_PARTS {
            VECTOR y = FN(load)(value + row * LANES + part * WIDTH) * factor;
            sum[part] += y * y;
        }
    return FN(sum_of)(sum);
}

/* <y, q> / <q, q> */
static REAL FN(least_squares)(const REAL *value, REAL factor, const float *level, int64_t rows) {
    VECTOR products[PARTS] = {{0}}, squares[PARTS] = {{0}};
    for (int64_t row = 0; row < rows; row++)
        FOR_PARTS {
            VECTOR y = FN(load)(value + row * LANES + part * WIDTH) * factor;
            VECTOR q = FN(load_levels)(level + row * LANES + part * WIDTH);
            products[part] += y * q;
            squares[part] += q * q;
        }
    return FN(sum_of)(products) / FN(sum_of)(squares);
}

typedef INT FN(Integers) __attribute__((vector_size(VECTOR_BYTES)));
#define INTEGERS FN(Integers)

/* Code = positive + index for y >= 0, else negative - index; index counts the thresholds below, or
 * rounds halves down where levels are integers. Codes are made in wide lanes, and narrowed after. */
static inline __attribute__((always_inline)) void
FN(count_codes)(const Quantizer *quantizer, int thresholds, const REAL *restrict value, int64_t numel,
                REAL factor, REAL inverse, INT *restrict wide) {
    const INTEGERS magnitude = (INTEGERS){0} + (INT)(~(UINT)0 >> 1);
    const INT negative = quantizer->magnitudes - 1;
    const INT positive = negative + !quantizer->has_zero;
    for (int64_t i = 0; i < numel; i += WIDTH) {
        VECTOR y = FN(load)(value + i) * factor;
        VECTOR ratio = (VECTOR)((INTEGERS)y & magnitude) * inverse;
        INTEGERS index = {0};
        if (thresholds == 0 && quantizer->linear) {
            index = __builtin_convertvector(ratio, INTEGERS);
            index -= ratio - __builtin_convertvector(index, VECTOR) > (REAL)0.5;
            INTEGERS beyond = index > negative;
            index = (beyond & negative) | (~beyond & index);
        }
        UNROLL for (int t = 0; t < thresholds; t++)
            index -= ratio > (REAL)quantizer->thresholds[t];
        INTEGERS below = y < 0;
        INTEGERS code = (below & (negative - index)) | (~below & (positive + index));
        memcpy(wide + i, &code, sizeof code);
    }
}

static void FN(choose_codes)(const Quantizer *quantizer, const REAL *value, int64_t numel, REAL factor,
                             REAL inverse, INT *restrict wide, uint8_t *restrict code) {
    switch (quantizer->linear ? 0 : quantizer->magnitudes - 1) {
#if !FUSED /* which has its own path for these */
    case 0: FN(count_codes)(quantizer, 0, value, numel, factor, inverse, wide); break;
    case 1: FN(count_codes)(quantizer, 1, value, numel, factor, inverse, wide); break;
    case 3: FN(count_codes)(quantizer, 3, value, numel, factor, inverse, wide); break;
    case 7: FN(count_codes)(quantizer, 7, value, numel, factor, inverse, wide); break;
#endif
    default:
        FN(count_codes)(quantizer, quantizer->magnitudes - 1, value, numel, factor, inverse, wide);
    }
    for (int64_t i = 0; i < numel; i++) code[i] = (uint8_t)wide[i];
}

/* Steps [3] and [4]: codes, levels, and the scale in units of the block's power of two. */
static REAL FN(quantize)(const Quantizer *quantizer, const void *cells, const Ahead *ahead,
                         const REAL *value, int64_t numel, REAL factor, REAL provisional,
                         uint8_t *code, float *level, INT *wide) {
#if FUSED && !REAL_IS_DOUBLE
    if (cells)
        return fused_quantize(quantizer, cells, ahead, value, numel, factor, provisional, code, level);
#else
    (void)cells;
#endif
    for (int64_t byte = 0; byte < numel * (int64_t)sizeof(REAL); byte += 64) prefetch(ahead, byte);
    REAL inverse = 1 / provisional;
    int64_t rows = (numel + LANES - 1) / LANES;
    FN(choose_codes)(quantizer, value, numel, factor, inverse, wide, code);
    expand_codes(quantizer, code, numel, level);
    for (int64_t i = numel; i < rows * LANES; i++) level[i] = 0;
    return quantizer->absmax ? provisional : FN(least_squares)(value, factor, level, rows);
}

/* Step [1]. */
static void FN(normalize)(BLOCK *block) {
    int exponent = (int)(block->largest >> MANTISSA_BITS) - BIAS;
    exponent = exponent < EXPONENT_LIMIT ? exponent : EXPONENT_LIMIT;
    block->power = REAL_OF((UINT)(BIAS + exponent) << MANTISSA_BITS);
    block->inverse_power = REAL_OF((UINT)(BIAS - exponent) << MANTISSA_BITS);
}

/* What the gradient is divided by: sqrt(v + mean(v) / 1000), or 1 where that means nothing. */
static void FN(divisor_of)(const REAL_ANY *moment, int64_t numel, REAL *restrict divisor) {
    int64_t rows = (numel + LANES - 1) / LANES;
    memcpy(divisor, moment, (size_t)numel * sizeof(REAL));
    for (int64_t i = numel; i < rows * LANES; i++) divisor[i] = 0;
    REAL floor = FN(lane_sum)(divisor, rows) / (REAL)numel * (REAL)1e-3;
    int usable = floor >= SMALLEST_NORMAL && BITS_OF(floor) < INFINITE_BITS;
    for (int64_t i = 0; i < numel; i++) divisor[i] = usable ? SQRT(divisor[i] + floor) : 1;
}

/* Turns the gradients in `value` into Adam updates, with the new moments in the scratch. */
static UINT FN(adam_updates)(const double *terms, const REAL_ANY *exp_avg, const REAL_ANY *exp_avg_sq,
                             int64_t numel, REAL *restrict value, REAL *restrict new_exp_avg,
                             REAL *restrict new_exp_avg_sq) {
    const REAL beta1 = (REAL)terms[0], rest1 = (REAL)terms[1], beta2 = (REAL)terms[2],
               rest2 = (REAL)terms[3], step = (REAL)terms[4], correction = (REAL)terms[5],
               eps = (REAL)terms[6];
    for (int64_t i = 0; i < numel; i++) {
        REAL g = value[i];
        REAL v = exp_avg_sq[i] * beta2 + g * g * rest2;
        REAL m = exp_avg[i] * beta1 + g * rest1;
        REAL numerator = m * step;
        REAL denominator = SQRT(v) * correction + eps;
        REAL update = numerator / denominator;
        value[i] = numerator == 0 && denominator == 0 ? 0 : update;
        new_exp_avg[i] = m;
        new_exp_avg_sq[i] = v;
    }
    return FN(largest_of)(new_exp_avg_sq, numel);
}

/* Fetches x + e and finds the largest magnitude, in one pass for the common case. */
static UINT FN(fetch_total)(const void *x, int store, const REAL_ANY *residual, int64_t numel,
                            REAL *restrict value) {
    if (store == STORE_REAL && residual) {
        const REAL_ANY *in = x;
        INT largest = 0;
        for (int64_t i = 0; i < numel; i++) {
            REAL total = in[i] + residual[i];
            INT bits = (INT)(BITS_OF(total) & (~(UINT)0 >> 1));
            value[i] = total;
            largest = bits > largest ? bits : largest;
        }
        return (UINT)largest;
    }
    FN(fetch)(x, store, numel, value);
    if (residual)
        for (int64_t i = 0; i < numel; i++) value[i] += residual[i];
    return FN(largest_of)(value, numel);
}

/* Where the elements of a group are. */
typedef struct {
    const void *x, *x_ahead;
    int store;
    REAL_ANY *residual;
    const REAL_ANY *moment;
    REAL_ANY *exp_avg, *exp_avg_sq;
    const double *terms;
    uint8_t *scales, *codes;
} FN(Group);
#define GROUP FN(Group)

/* x + e, and divided by the divisor if there is one, where finite terms overflow; from gathered ones. */
static __attribute__((noinline, cold)) UINT FN(gather_saturated)(const GROUP *group, int64_t first,
                                                                 int64_t numel, int64_t at,
                                                                 SCRATCH *scratch) {
    const REAL_ANY *residual = group->residual ? group->residual + first : NULL;
    REAL *value = scratch->value + at;
    REAL *total = group->moment ? scratch->total + at : value;
    FN(fetch)(FN(at)(group->x, group->store, first), group->store, numel, total);
    if (group->exp_avg)
        FN(adam_updates)(group->terms, group->exp_avg + first, group->exp_avg_sq + first, numel, total,
                         scratch->exp_avg + at, scratch->exp_avg_sq + at);
    if (residual)
        for (int64_t i = 0; i < numel; i++)
            total[i] = FN(saturate)(total[i] + residual[i], total[i]);
    if (group->moment) {
        const REAL *divisor = scratch->divisor + at;
        for (int64_t i = 0; i < numel; i++)
            value[i] = FN(saturate)(total[i] / divisor[i], total[i]);
    }
    return FN(largest_of)(value, numel);
}

/* Fills value (and total, divisor) of the block at `first`, and says how large it is. */
static UINT FN(gather)(const GROUP *group, int64_t first, int64_t numel, int64_t at, SCRATCH *scratch) {
    const void *x = FN(at)(group->x, group->store, first);
    const REAL_ANY *residual = group->residual ? group->residual + first : NULL;
    REAL *value = scratch->value + at;
    UINT largest, second = 0;
    if (group->exp_avg) {
        FN(fetch)(x, group->store, numel, value);
        second = FN(adam_updates)(group->terms, group->exp_avg + first, group->exp_avg_sq + first,
                                       numel, value, scratch->exp_avg + at, scratch->exp_avg_sq + at);
        if (residual)
            for (int64_t i = 0; i < numel; i++) value[i] += residual[i];
        largest = FN(largest_of)(value, numel);
    } else if (group->moment) {
        REAL *total = scratch->total + at, *divisor = scratch->divisor + at;
        FN(divisor_of)(group->moment + first, numel, divisor);
        FN(fetch)(x, group->store, numel, total);
        if (residual)
            for (int64_t i = 0; i < numel; i++) total[i] += residual[i];
        for (int64_t i = 0; i < numel; i++) value[i] = total[i] / divisor[i];
        largest = FN(largest_of)(value, numel);
    } else {
        largest = FN(fetch_total)(x, group->store, residual, numel, value);
    }
    if (largest >= INFINITE_BITS) largest = FN(gather_saturated)(group, first, numel, at, scratch);
    if (second >= INFINITE_BITS) largest = INFINITE_BITS;
    for (int64_t i = numel; i % LANES; i++) value[i] = 0;
    return largest;
}

/* Quantizes one gathered block, writes it, and leaves its error in the residual. */
static void FN(emit)(const Quantizer *quantizer, const void *cells, const Ahead *ahead,
                     const GROUP *group, const BLOCK *block, int64_t first, int64_t numel, int64_t at, uint8_t *code,
                     uint8_t *out, uint8_t *scale_out, SCRATCH *scratch) {
    REAL_ANY *residual = group->residual ? group->residual + first : NULL;
    const REAL *value = scratch->value + at;
    const REAL *total = group->moment ? scratch->total + at : value;
    float *level = scratch->level;
    uint16_t scale_bits;
    int finite = block->largest < INFINITE_BITS;
    if (finite && block->largest >= TINY_BITS) {
        REAL scale = block->power * FN(quantize)(quantizer, cells, ahead, value, numel,
                                                 block->inverse_power, block->provisional, code, level,
                                                 scratch->wide);
        scale = scale < (REAL)quantizer->largest_scale ? scale : (REAL)quantizer->largest_scale;
        scale_bits = bf16_of_float((float)scale);
        pack_codes(quantizer, code, numel, out);
        scale = (REAL)float_of_bf16(scale_bits);
        if (residual && group->moment) {
            const REAL *divisor = scratch->divisor + at;
            for (int64_t i = 0; i < numel; i++)
                residual[i] = total[i] - FN(limit)(scale * (REAL)level[i] * divisor[i]);
        } else if (residual) {
            for (int64_t i = 0; i < numel; i++) residual[i] = value[i] - scale * (REAL)level[i];
        }
    } else {
        scale_bits = finite ? 0 : 0x7FC0;
        memset(out, 0, (size_t)code_bytes_of(quantizer, numel));
        if (residual && finite) memcpy(residual, total, (size_t)numel * sizeof(REAL));
    }
    memcpy(scale_out, &scale_bits, sizeof scale_bits);
    if (group->exp_avg && finite) {
        memcpy(group->exp_avg + first, scratch->exp_avg + at, (size_t)numel * sizeof(REAL));
        memcpy(group->exp_avg_sq + first, scratch->exp_avg_sq + at, (size_t)numel * sizeof(REAL));
    }
}

/* Encodes `blocks` neighbouring blocks of `numel` elements each. */
static void FN(encode_group)(const Quantizer *quantizer, const void *cells, const GROUP *group,
                             int64_t blocks, int64_t numel, SCRATCH *scratch) {
    int64_t width = (numel + LANES - 1) / LANES * LANES;
    int64_t code_bytes = code_bytes_of(quantizer, numel);
    BLOCK block[GROUP_BLOCKS];
    for (int64_t b = 0; b < blocks; b++) {
        block[b].largest = FN(gather)(group, b * numel, numel, b * width, scratch);
        FN(normalize)(&block[b]);
    }
    for (int64_t b = 0; b < blocks; b++) {
        REAL factor = block[b].inverse_power;
        if (quantizer->absmax || quantizer->spread == 0)
            block[b].provisional = REAL_OF(block[b].largest) * factor / (REAL)quantizer->top;
        else
            block[b].provisional = FN(lane_squares)(scratch->value + b * width, factor, width / LANES);
    }
    if (!quantizer->absmax && quantizer->spread != 0)
        for (int64_t b = 0; b < blocks; b++)
            block[b].provisional =
                SQRT(block[b].provisional / (REAL)numel) * (REAL)quantizer->spread;
    for (int64_t b = 0; b < blocks; b++) {
        int64_t next = (blocks + b) * numel;
        Ahead ahead = {ahead_of(group->x_ahead, scratch, next * bytes_of_store[group->store]),
                       ahead_of(group->residual, scratch, next * (int64_t)sizeof(REAL))};
        FN(emit)(quantizer, cells, &ahead, group, &block[b], b * numel, numel, b * width, scratch->code,
                 group->codes + b * code_bytes, group->scales + 2 * b, scratch);
    }
}

static int64_t FN(group_blocks)(int64_t block_size) {
    int64_t blocks = GROUP_NUMEL / block_size;
    return blocks < 1 ? 1 : blocks > GROUP_BLOCKS ? GROUP_BLOCKS : blocks;
}

static const REAL_ANY *FN(moment_of)(const Job *job, const Piece *piece) {
    const void *moment = job->moments && !piece->raw ? job->moments[piece->slot] : NULL;
    return moment ? (const REAL_ANY *)moment + piece->offset : NULL;
}

/* Where a block's codes are, and its scale. What comes soon is asked for. */
static const uint8_t *FN(find_block)(const Wire *wire, const uint8_t *payload, const Piece *piece,
                                     int64_t index, REAL *scale) {
    int64_t code_bytes = code_bytes_of(&wire->quantizer, wire->block_size);
    const uint8_t *codes = payload + piece->data_at + index * code_bytes;
    uint16_t scale_bits;
    memcpy(&scale_bits, payload + piece->scales_at + 2 * index, sizeof scale_bits);
    *scale = (REAL)float_of_bf16(scale_bits);
    for (int64_t byte = 0; byte < code_bytes; byte += 64)
        __builtin_prefetch((const void *)((uintptr_t)codes + READ_AHEAD + (uintptr_t)byte));
    return codes;
}

/* out = scale * level */
static void FN(decode_block)(const Quantizer *quantizer, const uint8_t *codes, REAL scale,
                             int64_t numel, REAL_ANY *restrict out, SCRATCH *scratch) {
#if FUSED && !REAL_IS_DOUBLE
    (void)scratch;
    fused_decode(quantizer, codes, scale, numel, (float *)out);
#else
    float *level = scratch->level;
    unpack_codes(quantizer, codes, numel, scratch->code);
    expand_codes(quantizer, scratch->code, numel, level);
    for (int64_t i = 0; i < numel; i++) out[i] = scale * (REAL)level[i];
#endif
}

/* The sum of a few workers' blocks, from 0 or onto what is there. */
static void FN(sum_blocks)(const Quantizer *quantizer, int count, int onto, const uint8_t *const *codes,
                           const REAL *scales, int64_t numel, REAL *restrict out, SCRATCH *scratch) {
#if FUSED && !REAL_IS_DOUBLE
    (void)scratch;
    fused_sum(quantizer, count, onto, codes, scales, numel, out);
#else
    const float *level = scratch->level;
    if (!onto) memset(out, 0, (size_t)numel * sizeof(REAL));
    for (int w = 0; w < count; w++) {
        REAL scale = scales[w];
        unpack_codes(quantizer, codes[w], numel, scratch->code);
        expand_codes(quantizer, scratch->code, numel, scratch->level);
        for (int64_t i = 0; i < numel; i++) out[i] += scale * (REAL)level[i];
    }
#endif
}

/* The workers' mean of one quantized block. */
static void FN(average)(const Job *job, const Piece *piece, int64_t index, int64_t numel,
                        REAL *restrict mean, SCRATCH *scratch) {
    const uint8_t *codes[FUSED_WORKERS];
    REAL scales[FUSED_WORKERS];
    for (int64_t worker = 0; worker < job->workers; worker += FUSED_WORKERS) {
        int64_t left = job->workers - worker;
        int count = left < FUSED_WORKERS ? (int)left : FUSED_WORKERS;
        for (int w = 0; w < count; w++) {
            const uint8_t *payload = job->payloads + (worker + w) * job->stride;
            codes[w] = FN(find_block)(job->uplink, payload, piece, index, &scales[w]);
            scales[w] /= (REAL)job->workers;
        }
        FN(sum_blocks)(&job->uplink->quantizer, count, worker > 0, codes, scales, numel, mean, scratch);
    }
}

/* The sum over `count` workers of their raw elements, each divided by the number of workers, onto
 * what is there or from 0. */
static inline __attribute__((always_inline)) void
FN(add_raw)(const REAL_ANY *const *in, int count, int exact, int onto, REAL workers, int64_t numel,
            REAL_ANY *restrict mean) {
    const int64_t strip = 256, line = 64 / (int64_t)sizeof(REAL);
    REAL share = 1 / workers;
    for (int64_t first = 0; first < numel; first += strip) {
        int64_t last = first + strip < numel ? first + strip : numel;
        for (int w = 0; w < count; w++)
            for (int64_t i = first; i < last; i += line)
                __builtin_prefetch((const void *)((uintptr_t)(in[w] + i) + READ_AHEAD));
        for (int64_t i = first; i < last; i++) {
            REAL sum = onto ? mean[i] : 0;
            UNROLL for (int w = 0; w < count; w++) sum += exact ? in[w][i] * share : in[w][i] / workers;
            mean[i] = sum;
        }
    }
}

/* The workers' mean of raw elements. */
static void FN(average_raw)(const Job *job, const Piece *piece, int64_t from, int64_t numel,
                            REAL_ANY *mean, REAL *value) {
    REAL workers = (REAL)job->workers;
    /* Where the quotient is a product, to the bit, a product is much faster. */
    int exact = (job->workers & (job->workers - 1)) == 0;
    int together = job->raw_store == STORE_REAL && exact ? FUSED_WORKERS : 1;
    const REAL_ANY *in[FUSED_WORKERS];
    for (int64_t worker = 0; worker < job->workers;) {
        int count = together <= job->workers - worker ? together : 1;
        int onto = worker > 0;
        for (int w = 0; w < count; w++, worker++) {
            const uint8_t *payload = job->payloads + worker * job->stride + piece->data_at;
            in[w] = FN(at)(payload, job->raw_store, from);
        }
        if (job->raw_store != STORE_REAL) {
            FN(fetch)(in[0], job->raw_store, numel, value);
            in[0] = value;
        }
        if (count == FUSED_WORKERS && onto)
            FN(add_raw)(in, FUSED_WORKERS, 1, 1, workers, numel, mean);
        else if (count == FUSED_WORKERS)
            FN(add_raw)(in, FUSED_WORKERS, 1, 0, workers, numel, mean);
        else
            FN(add_raw)(in, 1, exact, onto, workers, numel, mean);
    }
}

/* The workers' mean of at most a block, in gradient units. */
static void FN(mean_of)(const Job *job, const Piece *piece, int64_t from, int64_t numel,
                        REAL *mean, SCRATCH *scratch) {
    if (piece->raw) {
        FN(average_raw)(job, piece, from, numel, mean, scratch->value);
        return;
    }
    FN(average)(job, piece, from / job->uplink->block_size, numel, mean, scratch);
    const REAL_ANY *moment = FN(moment_of)(job, piece);
    if (moment) {
        FN(divisor_of)(moment + from, numel, scratch->divisor);
        for (int64_t i = 0; i < numel; i++) mean[i] = FN(limit)(mean[i] * scratch->divisor[i]);
    }
}

/* Raw elements as Adam updates; an element that is not finite is sent as NaN and changes nothing. */
static void FN(encode_raw_updates)(const GROUP *group, int64_t numel, int raw_store, void *out,
                                   SCRATCH *scratch) {
    REAL *value = scratch->value;
    FN(fetch)(group->x, group->store, numel, value);
    FN(adam_updates)(group->terms, group->exp_avg, group->exp_avg_sq, numel, value, scratch->exp_avg,
                     scratch->exp_avg_sq);
    for (int64_t i = 0; i < numel; i++) {
        UINT second = BITS_OF(scratch->exp_avg_sq[i]) & (~(UINT)0 >> 1);
        UINT update = BITS_OF(value[i]) & (~(UINT)0 >> 1);
        if (second < INFINITE_BITS && update < INFINITE_BITS) {
            group->exp_avg[i] = scratch->exp_avg[i];
            group->exp_avg_sq[i] = scratch->exp_avg_sq[i];
        } else {
            value[i] = (REAL)NAN;
        }
    }
    FN(stash)(value, numel, out, raw_store);
}

/* Elements [from, to) of a raw piece, worker side or server side. */
static void FN(encode_raw)(const Job *job, const Piece *piece, const Piece *source, int64_t from,
                           int64_t to, SCRATCH *scratch) {
    int64_t most = source && !source->raw ? job->wire->block_size : MAX_BLOCK;
    for (int64_t numel; from < to; from += numel) {
        numel = to - from < most ? to - from : most;
        void *out = FN(at)(job->payload + piece->data_at, job->raw_store, from);
        if (job->task == TASK_REDUCE_ENCODE && source->raw && job->raw_store == STORE_REAL) {
            FN(average_raw)(job, source, from, numel, out, scratch->value);
            continue;
        }
        if (job->task == TASK_REDUCE_ENCODE) {
            FN(mean_of)(job, source, from, numel, scratch->mean, scratch);
            FN(stash)(scratch->mean, numel, out, job->raw_store);
            continue;
        }
        int64_t at = piece->start + from;
        const void *x = FN(at)(job->x, job->x_store, at);
        if (job->adam) {
            GROUP group = {.x = x,
                           .store = job->x_store,
                           .exp_avg = (REAL_ANY *)job->adam->exp_avg + at,
                           .exp_avg_sq = (REAL_ANY *)job->adam->exp_avg_sq + at,
                           .terms = job->adam->terms + 7 * piece->slot};
            FN(encode_raw_updates)(&group, numel, job->raw_store, out, scratch);
        } else {
            FN(convert)(x, job->x_store, numel, out, job->raw_store, scratch->value);
        }
    }
}

/* Blocks [first, last) of one piece, worker side or server side. */
static void FN(encode_piece)(const Job *job, const Piece *piece, const Piece *source, int64_t first,
                             int64_t last, const void *cells, SCRATCH *scratch) {
    const Quantizer *quantizer = &job->wire->quantizer;
    int64_t size = job->wire->block_size, most = FN(group_blocks)(size);
    const REAL_ANY *moment = FN(moment_of)(job, piece);
    for (int64_t index = first, blocks; index < last; index += blocks) {
        int64_t from = index * size, left = piece->numel - from;
        int64_t numel = left < size ? left : size;
        blocks = left < size ? 1 : left / size < most ? left / size : most;
        blocks = blocks < last - index ? blocks : last - index;
        int64_t at = (job->task == TASK_ENCODE ? piece->start : piece->local) + from;
        GROUP group = {.residual = job->residual ? (REAL_ANY *)job->residual + at : NULL,
                       .moment = moment ? moment + from : NULL,
                       .scales = job->payload + piece->scales_at + 2 * index,
                       .codes = job->payload + piece->data_at + index * code_bytes_of(quantizer, size)};
        if (job->task == TASK_ENCODE) {
            group.x = FN(at)(job->x, job->x_store, at);
            group.x_ahead = group.x;
            group.store = job->x_store;
        } else {
            for (int64_t b = 0; b < blocks; b++)
                FN(mean_of)(job, source, from + b * size, numel, scratch->mean + b * size, scratch);
            group.x = scratch->mean;
            group.store = STORE_REAL;
        }
        if (job->adam) {
            group.exp_avg = (REAL_ANY *)job->adam->exp_avg + at;
            group.exp_avg_sq = (REAL_ANY *)job->adam->exp_avg_sq + at;
            group.terms = job->adam->terms + 7 * piece->slot;
        }
        FN(encode_group)(quantizer, cells, &group, blocks, numel, scratch);
    }
}

static void FN(decode_raw)(const Job *job, const Piece *piece, int64_t from, int64_t to,
                           SCRATCH *scratch) {
    for (int64_t numel; from < to; from += numel) {
        numel = to - from < MAX_BLOCK ? to - from : MAX_BLOCK;
        const void *in = FN(at)(job->payload + piece->data_at, job->raw_store, from);
        void *out = FN(at)(job->x, job->x_store, piece->start + from);
        FN(convert)(in, job->raw_store, numel, out, job->x_store, scratch->value);
    }
}

/* Blocks [first, last) of one piece. */
static void FN(decode_piece)(const Job *job, const Piece *piece, int64_t first, int64_t last,
                             SCRATCH *scratch) {
    const Quantizer *quantizer = &job->wire->quantizer;
    int64_t size = job->wire->block_size;
    const REAL_ANY *moment = FN(moment_of)(job, piece);
    for (int64_t index = first; index < last; index++) {
        int64_t from = index * size, left = piece->numel - from;
        int64_t numel = left < size ? left : size;
        REAL scale;
        const uint8_t *codes = FN(find_block)(job->wire, job->payload, piece, index, &scale);
        void *out = FN(at)(job->x, job->x_store, piece->start + from);
        int direct = !moment && job->x_store == STORE_REAL;
        REAL_ANY *value = direct ? out : scratch->value;
        FN(decode_block)(quantizer, codes, scale, numel, value, scratch);
        if (moment) {
            FN(divisor_of)(moment + from, numel, scratch->divisor);
            for (int64_t i = 0; i < numel; i++) value[i] = FN(limit)(value[i] * scratch->divisor[i]);
        }
        if (!direct) FN(stash)(scratch->value, numel, out, job->x_store);
    }
}

/* The engine: walks the pieces and runs the blocks that are in its share. */
static void FN(run)(const Job *job, int64_t first, int64_t last) {
    SCRATCH scratch;
    const Wire *wire = job->wire;
    int64_t seen = 0;
#if FUSED && !REAL_IS_DOUBLE
    Cells table;
    const void *cells = find_cells(&wire->quantizer, &table) ? &table : NULL;
#else
    const void *cells = NULL;
#endif
    for (int64_t p = 0; p < wire->count && seen < last; p++) {
        const Piece *piece = &wire->pieces[p];
        int64_t blocks = (piece->numel + wire->block_size - 1) / wire->block_size;
        int64_t from = first > seen ? first - seen : 0;
        int64_t to = last - seen < blocks ? last - seen : blocks;
        seen += blocks;
        if (from >= to) continue;
        const Piece *source = job->uplink ? &job->uplink->pieces[p] : NULL;
        int64_t end = to * wire->block_size < piece->numel ? to * wire->block_size : piece->numel;
        if (piece->raw && job->task == TASK_DECODE)
            FN(decode_raw)(job, piece, from * wire->block_size, end, &scratch);
        else if (piece->raw)
            FN(encode_raw)(job, piece, source, from * wire->block_size, end, &scratch);
        else if (job->task == TASK_DECODE)
            FN(decode_piece)(job, piece, from, to, &scratch);
        else
            FN(encode_piece)(job, piece, source, from, to, cells, &scratch);
    }
}

#undef PASTE_
#undef PASTE
#undef FN
#undef SCRATCH
#undef UINT
#undef INT
#undef MANTISSA_BITS
#undef BIAS
#undef EXPONENT_LIMIT
#undef BITS_OF
#undef REAL_OF
#undef ABS
#undef SQRT
#undef STORE_REAL
#undef SMALLEST_NORMAL
#undef LARGEST
#undef INFINITE_BITS
#undef TINY_BITS
#undef REAL_ANY
#undef VECTOR
#undef INTEGERS
#undef WIDTH
#undef PARTS
#undef FOR_PARTS
#undef BLOCK
#undef GROUP
#undef REAL
#undef REAL_IS_DOUBLE
