/* Packing codes into planes, and unpacking them; one byte a code outside the payload.
 *
 * Included by every variant, so that the loops compile for its instruction set. */

static int64_t columns_of(const Quantizer *quantizer, int64_t numel) {
    return (numel + quantizer->planes - 1) / quantizer->planes;
}

static int64_t code_bytes_of(const Quantizer *quantizer, int64_t numel) {
    return quantizer->plane_bytes * columns_of(quantizer, numel);
}

/* `code` has room for whole columns; what is beyond `numel` becomes zero. */
static void pack_codes(const Quantizer *quantizer, uint8_t *restrict code, int64_t numel,
                       uint8_t *restrict out) {
    int64_t P = columns_of(quantizer, numel);
    memset(code + numel, 0, (size_t)(quantizer->planes * P - numel));
    const uint8_t *c0 = code, *c1 = c0 + P, *c2 = c1 + P, *c3 = c2 + P, *c4 = c3 + P;
    if (quantizer->planes == 5) {
        for (int64_t j = 0; j < P; j++)
            out[j] = (uint8_t)(c0[j] + 3 * c1[j] + 9 * c2[j] + 27 * c3[j] + 81 * c4[j]);
        return;
    }
    const uint8_t *c5 = c4 + P, *c6 = c5 + P, *c7 = c6 + P;
    switch (quantizer->plane_bytes) {
    case 1:
        for (int64_t j = 0; j < P; j++)
            out[j] = (uint8_t)(c0[j] | c1[j] << 1 | c2[j] << 2 | c3[j] << 3 | c4[j] << 4 |
                               c5[j] << 5 | c6[j] << 6 | c7[j] << 7);
        break;
    case 2:
        for (int64_t j = 0; j < P; j++) {
            out[j] = (uint8_t)(c0[j] | c1[j] << 2 | c2[j] << 4 | c3[j] << 6);
            out[P + j] = (uint8_t)(c4[j] | c5[j] << 2 | c6[j] << 4 | c7[j] << 6);
        }
        break;
    case 3:
        for (int64_t j = 0; j < P; j++) {
            out[j] = (uint8_t)(c0[j] | c1[j] << 3 | c2[j] << 6);
            out[P + j] = (uint8_t)(c2[j] >> 2 | c3[j] << 1 | c4[j] << 4 | c5[j] << 7);
            out[2 * P + j] = (uint8_t)(c5[j] >> 1 | c6[j] << 2 | c7[j] << 5);
        }
        break;
    case 4:
        for (int64_t j = 0; j < P; j++) {
            out[j] = (uint8_t)(c0[j] | c1[j] << 4);
            out[P + j] = (uint8_t)(c2[j] | c3[j] << 4);
            out[2 * P + j] = (uint8_t)(c4[j] | c5[j] << 4);
            out[3 * P + j] = (uint8_t)(c6[j] | c7[j] << 4);
        }
        break;
    default:
        memcpy(out, code, (size_t)(8 * P));
    }
}

/* The inverse: `code` has room for whole columns. */
static void unpack_codes(const Quantizer *quantizer, const uint8_t *restrict in, int64_t numel,
                         uint8_t *restrict code) {
    int64_t P = columns_of(quantizer, numel);
    if (quantizer->planes == 5) {
        for (int64_t j = 0; j < P; j++) {
            uint16_t word = in[j];
            for (int plane = 0; plane < 5; plane++) {
                uint16_t third = (uint16_t)((uint16_t)(word * 171) >> 9);
                code[plane * P + j] = (uint8_t)(word - 3 * third);
                word = third;
            }
        }
        return;
    }
    switch (quantizer->plane_bytes) {
    case 1:
        for (int plane = 0; plane < 8; plane++)
            for (int64_t j = 0; j < P; j++) code[plane * P + j] = (in[j] >> plane) & 1;
        break;
    case 2:
        for (int plane = 0; plane < 8; plane++)
            for (int64_t j = 0; j < P; j++)
                code[plane * P + j] = (in[plane / 4 * P + j] >> (plane % 4 * 2)) & 3;
        break;
    case 3:
        for (int64_t j = 0; j < P; j++) {
            uint8_t b0 = in[j], b1 = in[P + j], b2 = in[2 * P + j];
            code[j] = b0 & 7;
            code[P + j] = (b0 >> 3) & 7;
            code[2 * P + j] = (uint8_t)(b0 >> 6 | (b1 & 1) << 2);
            code[3 * P + j] = (b1 >> 1) & 7;
            code[4 * P + j] = (b1 >> 4) & 7;
            code[5 * P + j] = (uint8_t)(b1 >> 7 | (b2 & 3) << 1);
            code[6 * P + j] = (b2 >> 2) & 7;
            code[7 * P + j] = b2 >> 5;
        }
        break;
    case 4:
        for (int row = 0; row < 4; row++)
            for (int64_t j = 0; j < P; j++) {
                code[2 * row * P + j] = in[row * P + j] & 15;
                code[(2 * row + 1) * P + j] = in[row * P + j] >> 4;
            }
        break;
    default:
        memcpy(code, in, (size_t)(8 * P));
    }
}
