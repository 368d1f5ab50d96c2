/* The types that cross the C ABI, and what a variant (one instruction set) provides.
 *
 * The arithmetic is defined by ../reference.py and reproduced to the bit: sums over 16 lanes, no
 * contraction of multiply and add, round to nearest even. cpu.py mirrors the structures. */
#ifndef EFFADAM_KERNELS_H
#define EFFADAM_KERNELS_H

#include <stdint.h>

enum { MAX_BLOCK = 4096, LANES = 16, TABLE_CODES = 16, TABLE_THRESHOLDS = 8 };

/* Codes of a block in whole columns and a strip, and how many workers are averaged at once. */
enum { CODE_ROOM = MAX_BLOCK + 64, FUSED_WORKERS = 4 };

/* Before a short loop whose bound is a constant where it is compiled. */
#define UNROLL _Pragma("GCC unroll 8")

/* How elements are stored. */
enum { STORE_F32, STORE_F64, STORE_F16, STORE_BF16 };

/* One row of Wire.tables, with byte offsets counted from the start of the whole payload. */
typedef struct {
    int64_t start, local, numel, raw, scales_at, data_at, slot, offset;
} Piece;

typedef struct {
    int32_t planes, plane_bytes; /* the packing of codes */
    int32_t magnitudes;          /* how many levels are not negative */
    int32_t has_zero, linear, absmax;
    double spread; /* provisional scale over root mean square; 0: from the largest magnitude */
    double top;
    double largest_scale;
    float levels[TABLE_CODES];          /* by code, unless linear */
    float thresholds[TABLE_THRESHOLDS]; /* between magnitudes, unless linear */
} Quantizer;

typedef struct {
    const Piece *pieces;
    int64_t count;
    int64_t block_size;
    Quantizer quantizer;
} Wire;

/* What encode_ turns into updates instead of encoding it. The terms are 7 doubles a slot. */
typedef struct {
    void *exp_avg, *exp_avg_sq;
    const double *terms;
} Adam;

typedef enum { TASK_ENCODE, TASK_REDUCE_ENCODE, TASK_DECODE } Task;

/* One call of one kernel. */
typedef struct {
    Task task;
    const Wire *wire;   /* what is encoded or decoded */
    const Wire *uplink; /* reduce_encode_: what came in */
    void *x;            /* encode_: the input; decode: the output */
    int32_t x_store, raw_store;
    void *residual; /* of the arithmetic's type; NULL: no error feedback */
    uint8_t *payload;
    const uint8_t *payloads; /* reduce_encode_: one chunk a worker, stride bytes apart */
    int64_t workers, stride;
    const void *const *moments; /* by slot, NULL where not preconditioned; NULL: nowhere */
    const Adam *adam;
} Job;

/* What the next group will read, to be asked for while this one is computed. Only addresses. */
typedef struct {
    uintptr_t x, residual;
} Ahead;

/* Runs the blocks [first, last) of a job, counted over all its pieces. */
typedef void (*Engine)(const Job *job, int64_t first, int64_t last);

/* The engine for float64, the same in every variant. */
void effadam_run_double(const Job *job, int64_t first, int64_t last);

typedef struct {
    const char *name;
    Engine f32, f64;
} Variant;

#if defined(__x86_64__)
extern const Variant effadam_avx512, effadam_avx2;
#endif
extern const Variant effadam_plain;

#endif
