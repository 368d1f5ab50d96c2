/* Plain C: whatever the compiler makes of it for the baseline of the architecture (SSE2, NEON). */

/* Few x86-64 processors run this variant: half the code is worth more there than the last percent. */
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("Os")
#endif

#include <math.h>
#include <stddef.h>

#include "convert.h"
#include "effadam_kernels.h"

#define VARIANT effadam_plain
#define VARIANT_NAME "plain"
#define FUSED 0
#define HAS_DOUBLE 1
#define VECTOR_BYTES 16
#define STRIP 16

#include "codes.h"

static void expand_codes(const Quantizer *quantizer, const uint8_t *restrict code, int64_t numel,
                         float *restrict level) {
    if (quantizer->linear) {
        int zero = quantizer->magnitudes - 1;
        for (int64_t i = 0; i < numel; i++) level[i] = (float)(code[i] - zero);
    } else {
        for (int64_t i = 0; i < numel; i++) level[i] = quantizer->levels[code[i] % TABLE_CODES];
    }
}

#include "variant.h"
