/* Packing codes into planes, and unpacking them; one byte a code outside the payload.
 *
 * Included by every variant, so that the loops compile for its instruction set. Columns go in strips
 * of constant width, which compilers turn into a few vector instructions; a last strip may overrun its
 * plane, so planes are written in ascending order, and code arrays end with a strip to spare. */

enum { ROW_BYTES = MAX_BLOCK / 5 + 2 * STRIP };

static int64_t columns_of(const Quantizer *quantizer, int64_t numel) {
    return quantizer->planes == 8 ? (numel + 7) / 8 : (numel + quantizer->planes - 1) / quantizer->planes;
}

static int64_t code_bytes_of(const Quantizer *quantizer, int64_t numel) {
    return quantizer->plane_bytes * columns_of(quantizer, numel);
}

#define COLUMNS(j)                                     \
    for (int64_t strip = 0; strip < P; strip += STRIP) \
        for (int64_t j = strip; j < strip + STRIP; j++)


/* `code` has room for whole columns; what is beyond `numel` becomes zero. */
static void pack_codes(const Quantizer *quantizer, uint8_t *restrict code, int64_t numel,
                       uint8_t *restrict out) {
    int64_t P = columns_of(quantizer, numel);
    memset(code + numel, 0, (size_t)(quantizer->planes * P - numel));
    if (quantizer->plane_bytes == 8) {
        memcpy(out, code, (size_t)(8 * P));
        return;
    }
    const uint8_t *c0 = code, *c1 = c0 + P, *c2 = c1 + P, *c3 = c2 + P, *c4 = c3 + P;
    const uint8_t *c5 = c4 + P, *c6 = c5 + P, *c7 = c6 + P;
    uint8_t spare[4 * ROW_BYTES];
    int64_t width = (P + STRIP - 1) / STRIP * STRIP;
    uint8_t *r0 = width == P ? out : spare, *r1 = r0 + width, *r2 = r1 + width, *r3 = r2 + width;
    if (quantizer->planes == 5) {
        COLUMNS(j) {
            uint8_t word = c4[j];
            word = (uint8_t)(word + word + word + c3[j]);
            word = (uint8_t)(word + word + word + c2[j]);
            word = (uint8_t)(word + word + word + c1[j]);
            r0[j] = (uint8_t)(word + word + word + c0[j]);
        }
    } else if (quantizer->plane_bytes == 1) {
        COLUMNS(j)
        r0[j] = (uint8_t)(c0[j] | c1[j] << 1 | c2[j] << 2 | c3[j] << 3 | c4[j] << 4 | c5[j] << 5 |
                          c6[j] << 6 | c7[j] << 7);
    } else if (quantizer->plane_bytes == 2) {
        COLUMNS(j) r0[j] = (uint8_t)(c0[j] | c1[j] << 2 | c2[j] << 4 | c3[j] << 6);
        COLUMNS(j) r1[j] = (uint8_t)(c4[j] | c5[j] << 2 | c6[j] << 4 | c7[j] << 6);
    } else if (quantizer->plane_bytes == 3) {
        COLUMNS(j) r0[j] = (uint8_t)(c0[j] | c1[j] << 3 | c2[j] << 6);
        COLUMNS(j) r1[j] = (uint8_t)(c2[j] >> 2 | c3[j] << 1 | c4[j] << 4 | c5[j] << 7);
        COLUMNS(j) r2[j] = (uint8_t)(c5[j] >> 1 | c6[j] << 2 | c7[j] << 5);
    } else {
        COLUMNS(j) r0[j] = (uint8_t)(c0[j] | c1[j] << 4);
        COLUMNS(j) r1[j] = (uint8_t)(c2[j] | c3[j] << 4);
        COLUMNS(j) r2[j] = (uint8_t)(c4[j] | c5[j] << 4);
        COLUMNS(j) r3[j] = (uint8_t)(c6[j] | c7[j] << 4);
    }
    if (r0 == spare)
        for (int row = 0; row < quantizer->plane_bytes; row++)
            memcpy(out + row * P, spare + row * width, (size_t)P);
}

#if !FUSED
/* The inverse; `code` has room for whole columns and a strip. */
static void unpack_codes(const Quantizer *quantizer, const uint8_t *in, int64_t numel,
                         uint8_t *restrict code) {
    int64_t P = columns_of(quantizer, numel);
    if (quantizer->plane_bytes == 8) {
        memcpy(code, in, (size_t)(8 * P));
        return;
    }
    int64_t width = (P + STRIP - 1) / STRIP * STRIP;
    uint8_t spare[4 * ROW_BYTES];
    if (width != P) {
        for (int row = 0; row < quantizer->plane_bytes; row++)
            memcpy(spare + row * width, in + row * P, (size_t)P);
        in = spare;
    }
    const uint8_t *restrict r0 = in, *restrict r1 = r0 + width, *restrict r2 = r1 + width;
    if (quantizer->planes == 5) {
        /* word / 243 as a fraction of 2**16, from above: every product with 3 carries a digit out. */
        uint16_t fraction[ROW_BYTES];
        uint8_t digits[5 * ROW_BYTES];
        COLUMNS(j) fraction[j] = (uint16_t)(r0[j] * 270);
        for (int plane = 4; plane >= 0; plane--) {
            uint8_t *restrict digit = digits + plane * width;
            COLUMNS(j) {
                digit[j] = (uint8_t)((uint32_t)(fraction[j] * 3) >> 16);
                fraction[j] = (uint16_t)(fraction[j] * 3);
            }
        }
        for (int plane = 0; plane < 5; plane++)
            COLUMNS(j) code[plane * P + j] = digits[plane * width + j];
    } else if (quantizer->plane_bytes == 1) {
        COLUMNS(j) code[j] = r0[j] & 1;
        code += P;
        COLUMNS(j) code[j] = (r0[j] >> 1) & 1;
        code += P;
        COLUMNS(j) code[j] = (r0[j] >> 2) & 1;
        code += P;
        COLUMNS(j) code[j] = (r0[j] >> 3) & 1;
        code += P;
        COLUMNS(j) code[j] = (r0[j] >> 4) & 1;
        code += P;
        COLUMNS(j) code[j] = (r0[j] >> 5) & 1;
        code += P;
        COLUMNS(j) code[j] = (r0[j] >> 6) & 1;
        code += P;
        COLUMNS(j) code[j] = r0[j] >> 7;
    } else if (quantizer->plane_bytes == 2) {
        for (int row = 0; row < 2; row++, r0 += width) {
            COLUMNS(j) code[j] = r0[j] & 3;
            code += P;
            COLUMNS(j) code[j] = (r0[j] >> 2) & 3;
            code += P;
            COLUMNS(j) code[j] = (r0[j] >> 4) & 3;
            code += P;
            COLUMNS(j) code[j] = r0[j] >> 6;
            code += P;
        }
    } else if (quantizer->plane_bytes == 3) {
        COLUMNS(j) code[j] = r0[j] & 7;
        code += P;
        COLUMNS(j) code[j] = (r0[j] >> 3) & 7;
        code += P;
        COLUMNS(j) code[j] = (uint8_t)(r0[j] >> 6 | (r1[j] & 1) << 2);
        code += P;
        COLUMNS(j) code[j] = (r1[j] >> 1) & 7;
        code += P;
        COLUMNS(j) code[j] = (r1[j] >> 4) & 7;
        code += P;
        COLUMNS(j) code[j] = (uint8_t)(r1[j] >> 7 | (r2[j] & 3) << 1);
        code += P;
        COLUMNS(j) code[j] = (r2[j] >> 2) & 7;
        code += P;
        COLUMNS(j) code[j] = r2[j] >> 5;
    } else {
        for (int row = 0; row < 4; row++, r0 += width) {
            COLUMNS(j) code[j] = r0[j] & 15;
            code += P;
            COLUMNS(j) code[j] = r0[j] >> 4;
            code += P;
        }
    }
}
#endif

#undef COLUMNS

/* A pointer that is not in use stands for memory that is near anyway. */
static inline uintptr_t ahead_of(const void *start, const void *fallback, int64_t bytes) {
    return start ? (uintptr_t)start + (uintptr_t)bytes : (uintptr_t)fallback;
}

static inline void prefetch(const Ahead *ahead, int64_t byte) {
    __builtin_prefetch((const void *)(ahead->x + (uintptr_t)byte));
    __builtin_prefetch((const void *)(ahead->residual + (uintptr_t)byte));
}
