/* Sixteen-bit floats by integer arithmetic: exact, round to nearest even, and vectorizable. */
#ifndef EFFADAM_CONVERT_H
#define EFFADAM_CONVERT_H

#include <stdint.h>
#include <string.h>

/* Elements of a payload or of a tensor: nothing is promised about alignment or effective type. */
typedef float f32_any __attribute__((aligned(1), may_alias));
typedef double f64_any __attribute__((aligned(1), may_alias));
typedef uint16_t u16_any __attribute__((aligned(1), may_alias));

static inline uint32_t bits_of_float(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float float_of_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint64_t bits_of_double(double value) {
    uint64_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline double double_of_bits(uint64_t bits) {
    double value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline float float_of_bf16(uint16_t half) { return float_of_bits((uint32_t)half << 16); }

static inline uint16_t bf16_of_float(float value) {
    uint32_t bits = bits_of_float(value);
    uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    return (uint16_t)((bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : rounded);
}

static inline float float_of_f16(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000) << 16;
    uint32_t magnitude = (uint32_t)(half & 0x7FFF) << 13;
    /* The exponent moves by 112 through a product, which makes subnormal halves normal too. */
    uint32_t finite = bits_of_float(float_of_bits(magnitude) * 0x1p112f);
    uint32_t special = magnitude | 0x7F800000;
    return float_of_bits(sign | (magnitude >= 0x0F800000 ? special : finite));
}

static inline uint16_t f16_of_float(float value) {
    uint32_t bits = bits_of_float(value);
    uint32_t sign = (bits >> 16) & 0x8000;
    uint32_t magnitude = bits & 0x7FFFFFFF;
    uint32_t normal = (magnitude + 0xFFF + ((magnitude >> 13) & 1) - 0x38000000) >> 13;
    /* Adding 0.5 puts the last place of a subnormal half at the last place of the float. */
    uint32_t subnormal = bits_of_float(float_of_bits(magnitude) + 0.5f) - 0x3F000000;
    uint32_t half = magnitude < 0x38800000 ? subnormal : normal;
    half = magnitude >= 0x477FF000 ? 0x7C00 : half;
    half = magnitude > 0x7F800000 ? 0x7E00 : half;
    return (uint16_t)(sign | half);
}

#endif
