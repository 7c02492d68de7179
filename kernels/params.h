/* params.h: what the host passes to the kernels, defined once.
 *
 * Plain C. Read by nvcc (the kernels), g++ (the emulation) and, through
 * bindgen, by Rust (`src/backend/device/params.rs`), which checks every offset.
 * A kernel takes one of the `...Params` structs by value as its only argument.
 * Pointers are device addresses; regions of the one workspace do not overlap.
 *
 * Rows are in class order in everything but the final results: sorted by
 * (label, original index), rows of ignored labels last.
 */
#ifndef DDTAS_PARAMS_H
#define DDTAS_PARAMS_H

#include <stdint.h>

/* Rows (and columns) of a tile of S. */
#define TILE 128
/* Threads of a block in every kernel that is not warp-specialised. */
#define THREADS 256
/* Bytes of one row in a pipeline stage. The stride of prepared rows is a multiple of it. */
#define STAGE_BYTES 128
/* Shared memory of the pipeline that computes a tile of S: 3 stages of two operands. */
#define SIMILARITY_STAGES_BYTES (3 * 2 * TILE * STAGE_BYTES)
/* The same for 16-bit rows where two blocks share a multiprocessor (sm_80, sm_100): 2 stages. */
#define SHARING_STAGES_BYTES (2 * 2 * TILE * STAGE_BYTES)
/* The sweep: the stages, and two bounds for each row and column. */
#define SWEEP_SHARED_BYTES (SHARING_STAGES_BYTES + TILE * 16)
#define SWEEP_EXACT_SHARED_BYTES (SIMILARITY_STAGES_BYTES + TILE * 16)
/* On Hopper: 4 stages, each with a barrier; one block a multiprocessor. */
#define HOPPER_STAGES_BYTES (4 * 2 * TILE * STAGE_BYTES)
#define HOPPER_SHARED_BYTES (HOPPER_STAGES_BYTES + 4 * 8)
/* The same-class pass: the stages, and the duplicate bounds of a tile's references; on Hopper also of the 32 on either side. */
#define SAME_CLASS_SHARED_BYTES (SIMILARITY_STAGES_BYTES + TILE * 4)
#define SAME_CLASS_HOPPER_SHARED_BYTES (HOPPER_SHARED_BYTES + (TILE + 2 * 32) * 4)
/* Words of a tile's candidate mask, which has a bit for each pair: two words for each thread of the sweep. */
#define TILE_MASK_WORDS (TILE * TILE / 32)
/* The sweep on Hopper: two teams of 8 warps, and a warpgroup of which one thread copies operands and one for each team stores
 * candidates. Shared memory: a row tile of up to 512 dimensions and 4 stages of 16 KB for column tiles (wider rows use both
 * as stages); for each team staged values and masks, bounds of its columns, counts of its warps and of the tile; 14 barriers;
 * padded to a multiple of 16 bytes. */
#define SWEEP_HOPPER_THREADS 640
#define SWEEP_HOPPER_RESIDENT 8
#define SWEEP_HOPPER_STAGES 4
#define SWEEP_HOPPER_STAGED 3520
/* Most tiles that a block takes in a row, before all blocks move on to the next part of S together. */
#define SWEEP_HOPPER_RUN 64
#define SWEEP_HOPPER_SHARED_BYTES                                                                                        \
    ((SWEEP_HOPPER_RESIDENT + SWEEP_HOPPER_STAGES) * TILE * STAGE_BYTES +                                                \
     2 * (SWEEP_HOPPER_STAGED * 4 + TILE_MASK_WORDS * 4 + TILE * 12 + 44) + 15 * 8)
/* The sweep on Hopper for exact f32: one team, the high parts of a row tile, and 5 stages for the columns' parts and the rows'
 * low parts; 29 barriers; padded to a multiple of 16 bytes. */
#define SWEEP_HOPPER_EXACT_THREADS 384
#define SWEEP_HOPPER_EXACT_STAGES 5
#define SWEEP_HOPPER_EXACT_SHARED_BYTES                                                                                  \
    ((SWEEP_HOPPER_RESIDENT + SWEEP_HOPPER_EXACT_STAGES) * TILE * STAGE_BYTES + SWEEP_HOPPER_STAGED * 4 +                \
     TILE_MASK_WORDS * 4 + TILE * 12 + 44 + 4 + (2 * (SWEEP_HOPPER_RESIDENT + SWEEP_HOPPER_EXACT_STAGES) + 4) * 8)
/* order_tiles: keys of a tile, and how many of them one block places. order_merge: sorted runs that one launch merges into one.
 * Powers of two. */
#define ORDER_TILE 2048
#define ORDER_OWN 64
#define ORDER_RUNS 32
/* order_tiles_wide, for more rows than one merge of such tiles can take: four times the keys, sorted by one block. */
#define ORDER_WIDE_TILE 8192
#define ORDER_WIDE_THREADS 1024
/* Labels as i64 and as f32, a count for each warp and key that the block places, and a flag for each warp. The wide form: keys of
 * 10 bytes with a gap after every 8. */
#define ORDER_SHARED_BYTES (ORDER_TILE * (8 + 4) + THREADS / 32 * (ORDER_OWN + 1) * 4)
/* order_merge: keys of a block. In shared memory, where its first and last key belong in each run, and a count for each warp and
 * key. */
#define ORDER_MERGED 128
#define ORDER_MERGE_SHARED_BYTES ((2 * ORDER_RUNS + THREADS / 32 * ORDER_MERGED) * 4)
#define ORDER_WIDE_SHARED_BYTES ((ORDER_WIDE_TILE + ORDER_WIDE_TILE / 8) * 10)
/* The selection: bounds, class ranges and sums of the 128 rows and 128 columns of a tile, and what all pairs share. */
#define SELECT_SHARED_BYTES (TILE * (2 * 8 + 8 + 2 * (3 * 5 + 2) * 4) + 80)
/* select_stored: also values and places of up to SELECT_PLACES candidates, 12 bytes a thread, a count for each warp, and what was
 * looked up of 32 tiles. SELECT_BLOCKS persistent blocks a multiprocessor. */
#define SELECT_PLACES 3520
#define SELECT_STORED_SHARED_BYTES (SELECT_SHARED_BYTES + SELECT_PLACES * 6 + THREADS * 12 + THREADS / 32 * 4 + 32 * 8 + 16)
#define SELECT_BLOCKS 5
/* Sums that the blocks of `weigh` add up. */
#define WEIGH_SUMS 10
/* A sum over a block: one f64 for each warp. `weigh`: that for each of its sums and for the candidates of two row tiles, one f64
 * for each warp and 32 columns of both sides, and a flag. */
#define SUM_SHARED_BYTES (THREADS / 32 * 8)
#define WEIGH_SHARED_BYTES ((WEIGH_SUMS + 2) * SUM_SHARED_BYTES + WEIGH_SUMS * 8 + 2 * THREADS / 32 * 32 * 8 + 8)
/* Whether `weigh` turns candidates' words into elements of M, and for which type of rows. */
#define WEIGH_NO_WORDS 0
#define WEIGH_WORDS_F16 1
#define WEIGH_WORDS_BF16 2
/* The gradient by tiles: a block has this many rows and columns of dE, 128 sums a thread; f32 has half of the rows, since its
 * fragments take twice the registers. Every block reads the other side once for its columns: the more rows, the less traffic. */
#define GRADIENT_ROWS_16BIT 128
#define GRADIENT_ROWS_32BIT 64
#define GRADIENT_COLUMNS 256
/* Splits of the gradient whose partial sums one block adds; where there are more, the results are added in a second step. */
#define SPLITS_ADDED 8
/* Rows of the other side in a pipeline stage, and the bytes of all stages: four for 16-bit types, two for exact f32. */
#define GRADIENT_DEPTH 32
#define GRADIENT_STAGES_BYTES (4 * GRADIENT_DEPTH * GRADIENT_COLUMNS * 2)
/* Behind the tile of M: its largest element, and two barriers. */
#define GRADIENT_EXTRA_BYTES 24
/* The gradient on Hopper is warp-specialised: 8 warps multiply, 3 build M, 1 copies; with more threads the product of 256 columns
 * would have too few registers (ptxas wants 154 for the whole kernel). 4 stages of half a tile's rows (32 KB), three tiles of M
 * (32 KB): one is cleared, one built and one multiplied at a time; 16 barriers, and a flag. */
#define GRADIENT_HOPPER_THREADS 384
#define GRADIENT_HOPPER_STAGES 4
#define GRADIENT_HOPPER_SHARED_BYTES \
    (GRADIENT_HOPPER_STAGES * TILE / 2 * GRADIENT_COLUMNS * 2 + (GRADIENT_HOPPER_STAGES / 2 + 1) * TILE * TILE * 2 + 17 * 8)
/* The same for exact f32: 6 stages of 32 rows and 128 columns in two parts (16 KB), two tiles of M in two parts; 20 barriers, and
 * a flag. */
#define GRADIENT_HOPPER_EXACT_STAGES 6
#define GRADIENT_HOPPER_EXACT_SHARED_BYTES (GRADIENT_HOPPER_EXACT_STAGES * 32 * 128 * 2 * 2 + 2 * 2 * TILE * TILE * 2 + 21 * 8)
/* The gradient by lists: columns of dE that a block has as f32. */
#define LISTS_COLUMNS 256
/* Retrieval: the least room of a list beyond the keys that shortening leaves: a tile's keys, or those of a round of the merge. */
#define RETRIEVAL_SLACK THREADS
/* A warp shortens one list a tile, if one has so many keys more than shortening leaves. */
#define RETRIEVAL_SPARE 96
/* Most keys that retrieval_merge holds in shared memory, after their number; more are merged in the place of the first list. */
#define RETRIEVAL_MERGED 8192
#define RETRIEVAL_MERGE_EXTRA_BYTES 16
/* Retrieval on Hopper: the query tile, the stages, and the barriers of two teams; for exact f32 of one team. */
#define RETRIEVAL_HOPPER_SHARED_BYTES ((SWEEP_HOPPER_RESIDENT + SWEEP_HOPPER_STAGES) * TILE * STAGE_BYTES + 10 * 8)
#define RETRIEVAL_HOPPER_EXACT_SHARED_BYTES                                  \
    ((SWEEP_HOPPER_RESIDENT + SWEEP_HOPPER_EXACT_STAGES) * TILE * STAGE_BYTES + \
     (2 * (SWEEP_HOPPER_RESIDENT + SWEEP_HOPPER_EXACT_STAGES) + 1) * 8)
/* No row. */
#define NO_ROW 0xffffffffu

/* References of one anchor's class, [begin, end); an ignored anchor has begin > end. */
typedef struct ClassRange {
    uint32_t begin;
    uint32_t end;
} ClassRange;

/* One side of the comparison, prepared: class order, zero padding. */
typedef struct Side {
    const void *rows;       /* [tiles, stages, TILE, STAGE_BYTES], swizzled: prepared_offset() in prepared_rows.cuh */
    const uint32_t *order;  /* [count], original index of each row */
    const float *duplicate; /* [tiles * TILE]; a pair of one class at least as similar as both rows' bounds is a duplicate */
    uint32_t count;         /* B or N */
    uint32_t tiles;         /* ceil(count / TILE) */
} Side;

/* LossSettings as the kernels need them. */
typedef struct Settings {
    double gamma_pos;            /* tolerances before adaptation; may be +inf */
    double gamma_neg;
    double probe;                /* tolerance of the probe */
    double candidate;            /* the larger of `probe` and `gamma_neg` */
    double tolerance;            /* factor k of the adaptation */
    double alpha;
    double beta;
    double lambda_pos;
    double lambda_neg;
    uint64_t lambda;             /* address of two doubles in place of lambda_pos and lambda_neg; or 0 */
    double sum_scale;            /* fixed-point units of MinedSums in 1.0, a power of two */
    double more_scale;           /* the same for softplus - sigmoid: at most sum_scale, and every term below 2^41 units */
    uint32_t adaptive;           /* AT-ASMS, otherwise the tolerances stay */
    uint32_t reserved;
} Settings;

/* Sums over all blocks; integers, so that their order does not matter. */
typedef struct Counters {
    uint64_t probe_neg;          /* n_neg of the probe */
    uint64_t total_pos;          /* N_pos */
    uint32_t valid_anchors;      /* rows whose label is not ignored; ignored rows come after them */
    uint32_t valid_references;
    uint32_t bad_anchor;         /* smallest original index of a row that is not of unit length, or NO_ROW */
    uint32_t bad_reference;
    uint64_t pool_units;         /* units of the pool that tiles asked for; if more than it has, some tiles are recomputed */
    uint32_t largest_weight;     /* the most that one row adds to the weight of a pair, over all rows: bits of an f32 */
    uint32_t unused;
} Counters;

/* Sums over each anchor's mined positives or negatives, from the selection. A list of [B] for each quantity: what a warp adds to
 * neighbouring rows falls into few sectors of L2. Fixed point, so that the order of additions does not matter. */
typedef struct MinedSums {
    int64_t *softplus;           /* sum of log(1 + exp(-beta (S - lambda_pos))) over P_i, or of N_i's terms */
    int64_t *sigmoid;            /* sum of its derivative */
    uint32_t *count;             /* |P_i| or |N_i| */
} MinedSums;

/* Per anchor: what turns a similarity into a pair weight. No similarity passes the bounds of an inactive row. */
typedef struct RowWeights {
    float pos_bound;             /* positives below it are mined */
    float neg_bound;             /* negatives above it are mined */
    float pos_scale;             /* 2 / (B |P_i|) */
    float neg_scale;             /* 2 / (B |N_i|) */
} RowWeights;

/* Per anchor, from the same-class pass. */
typedef struct RowSame {
    float min_pos;               /* m+, +inf without a positive */
    uint32_t count;              /* positives */
    float sum_pos;               /* over positives */
    float sum_same;              /* over all valid references of the class, itself and duplicates included */
} RowSame;

/* Per reference that is an anchor in another part of the batch: what that anchor's mining needs. */
typedef struct RowNumbers {
    float min_pos;               /* m+, +inf without a positive */
    uint32_t max_neg;            /* ordered key of m-, 0 without a negative */
    uint32_t count_pos;          /* |P| */
    uint32_t count_neg;          /* |N| */
} RowNumbers;

/* The scalars of LossOutput. */
typedef struct LossScalars {
    double loss;
    double dloss_dlambda_pos;
    double dloss_dlambda_neg;
    double mean_pos;
    double mean_neg;
    double gamma_pos;
    double gamma_neg;
    uint64_t probe_neg;
    uint64_t total_pos;
    uint64_t total_neg;
    uint64_t active;
    double bad_square_sum;       /* of the bad row, if there is one */
    uint32_t bad_anchor;         /* original index or NO_ROW */
    uint32_t bad_reference;
    uint64_t mined_pos;          /* sum of |P_i| over active anchors */
    uint64_t mined_neg;          /* sum of |N_i| */
} LossScalars;

/* The pairs of a batch and what is known about them. All passes of a loss share it. */
typedef struct Pairs {
    Side anchors;
    Side references;             /* the anchors in the square form */
    uint32_t square;
    uint32_t stride;             /* elements between rows: whole stages of STAGE_BYTES */
    uint32_t dim;                /* D */
    uint32_t pool;               /* size of the pool of candidates, in units of 4 */
    uint64_t tiles;              /* tiles of S: of the upper triangle in the square form, else all */
    uint32_t total;              /* the B of 1/B, of the whole batch if this is a part of one */
    uint32_t band;               /* tile columns of a band of the sweep, a power of two: tile_at() in tile_order.cuh */
    ClassRange *classes;         /* [B] */
    RowSame *same;               /* [B] */
    uint32_t *max_neg;           /* [B], ordered key of m-, 0 without a negative */
    Counters *counters;          /* [1] */
    MinedSums positives;
    MinedSums negatives;
    RowWeights *weights;         /* [anchor tiles * TILE] */
    /* Rectangular form: the position of each anchor's own reference, NO_ROW if it has none; null if the caller does not say. */
    const uint32_t *identity;    /* [B] */
    /* Null if references select no pairs. */
    RowNumbers *columns;         /* [N] */
    RowWeights *column_weights;  /* [reference tiles * TILE]; in the square form the anchors' */
    uint64_t *totals;            /* [2], n_neg of the probe and N_pos, of the whole batch */
    /* Candidates: every positive, and the negatives above either row's candidate bound, in the order of the sweep's threads and
     * of the bits in their masks. The sweep writes the masks to where the selection then writes the words. */
    uint32_t *tile_counts;       /* [tiles], candidates */
    uint32_t *tile_segments;     /* [tiles]: where a tile's candidates begin in the pool, in units of 4; NO_ROW: it has none,
                                  * or they are not stored and the tile is recomputed */
    float *pool_values;          /* [4 * pool], S */
    uint32_t *pool_words;        /* [4 * pool], from the selection on: candidate_word.cuh */
    Settings settings;
} Pairs;

/* invert_order: the position of each of the caller's rows. */
typedef struct InvertParams {
    const uint32_t *order;       /* [count] */
    uint32_t *positions;         /* [count] */
    uint32_t count;
    uint32_t reserved;
} InvertParams;

/* identity: which reference is each anchor, by position. */
typedef struct IdentityParams {
    const uint32_t *order;       /* [count], of the anchors */
    const uint32_t *positions;   /* [references], of the references, by original index */
    const uint32_t *list;        /* [count], original order, NO_ROW for an anchor without one; or null: first + i */
    uint64_t first;
    uint32_t *identity;          /* [count] */
    uint32_t count;
    uint32_t references;
} IdentityParams;

/* Which numbers of a row are taken or reported between two steps. */
#define NUMBERS_MIN_POS 0
#define NUMBERS_MAX_NEG 1
#define NUMBERS_COUNTS 2

/* take_numbers: the caller's numbers of anchors and references, in place of those found here. */
typedef struct TakeParams {
    Pairs pairs;
    uint32_t which;
    uint32_t given;              /* references that have numbers: the first ones in original order */
    const void *anchors;         /* [B] f32, or |P| as u32, original order */
    const void *anchors_neg;     /* [B], |N| */
    const void *references;      /* [given], likewise */
    const void *references_neg;
    const uint64_t *totals;      /* [2], copied to Pairs.totals; or null */
} TakeParams;

/* report_numbers: the numbers that a step found, in original order. */
typedef struct ReportParams {
    Pairs pairs;
    uint32_t which;
    uint32_t reserved;
    void *anchors;               /* [B] f32, or |P| as u32 */
    void *anchors_neg;           /* [B], |N| */
    uint64_t *totals;            /* [2], n_neg of the probe and N_pos of these anchors; or null */
} ReportParams;

/* Words that order_tiles sets to 0. */
typedef struct Zeroed {
    uint32_t *words;
    uint64_t count;
} Zeroed;
#define ZEROED 7

/* order_tiles, order_tiles_wide: sorts the keys of each tile, a block for every ORDER_OWN keys or for a wide tile, and sets the
 * counters and sums of the later passes to their initial values. */
typedef struct OrderParams {
    const int64_t *labels;       /* [count], original order */
    uint32_t count;
    uint32_t reserved;
    uint64_t *keys;              /* [count], labels sorted within each tile; ignored ones are UINT64_MAX */
    uint32_t *order;             /* [count], their original indices */
    uint32_t *valid;             /* out: number of rows that are not ignored; null if order_merge follows, which counts */
    uint32_t *valid_too;         /* out: the same for the other side; null in the rectangular form */
    Counters *counters;          /* null if another launch sets them */
    Zeroed zeroed[ZEROED];
} OrderParams;

/* order_merge: merges ORDER_RUNS sorted runs into one, by the place of each key among all. A block every ORDER_MERGED keys. */
typedef struct MergeParams {
    const uint64_t *from_keys;   /* [count], sorted within each run */
    const uint32_t *from_order;
    uint64_t *keys;              /* out: [count], sorted within every ORDER_RUNS runs */
    uint32_t *order;
    uint32_t count;
    uint32_t run;                /* keys of a run, a power of two; the last run may have fewer */
    uint32_t *valid;             /* counted up from 0 by the last launch; null in those before */
    uint32_t *valid_too;         /* the same for the other side; null in the rectangular form */
} MergeParams;

/* prepare: gathers rows in class order, pads with zeros, checks norms. One block for each row tile, and after these, if class
 * ranges are wanted, one for every THREADS anchors. */
typedef struct PrepareParams {
    const void *input;           /* [count, dim], original order */
    void *rows;                  /* as in Side */
    const uint32_t *order;       /* null: the rows keep their order */
    const uint32_t *valid;       /* read for the column sums only */
    uint32_t count;
    uint32_t dim;
    uint32_t stride;
    uint32_t check;              /* whether norms are checked */
    double norm_tolerance;
    double *square_sums;         /* out: [count], original order; written only for rows that may be bad */
    uint32_t *bad;               /* smallest index of a bad row */
    float *column_sums;          /* out: [tiles, stride], sums of the valid rows of each tile; null: not wanted */
    float *duplicate;            /* out: as in Side, (1 - 1e-6) |e|^2 by the products of S; null: not wanted */
    double *lengths;             /* out: [count], original order; the rows are brought to unit length. Null: they are not */
    const uint64_t *keys;        /* [count], in class order; null: no class ranges are wanted */
    const uint64_t *reference_keys;
    ClassRange *classes;         /* out: [count], where the references of each row's class are */
    uint32_t references;
    uint32_t reserved;
} PrepareParams;

/* same_class, sweep, select_stored, select_recomputed. */
typedef struct PairsParams {
    Pairs pairs;
} PairsParams;

/* weigh: per-row weights, the scalars, per-anchor results in original order, and which row tiles' gradients go by lists. A block
 * for each row tile (of the references too, if they have weights or `by_lists`) and, if words are finished, for each tile of S. */
typedef struct WeighParams {
    Pairs pairs;
    const float *anchor_column_sums;     /* [anchor tiles, stride] */
    const float *reference_column_sums;  /* [reference tiles, stride] */
    const double *anchor_square_sums;    /* [B] */
    const double *reference_square_sums; /* [N] */
    LossScalars *scalars;
    float *loss;                 /* [1], the loss as f32; or null */
    float *min_pos;              /* [B], original order, as the three below */
    float *max_neg;
    uint32_t *count_pos;
    uint32_t *count_neg;
    double *parts;               /* [blocks, WEIGH_SUMS] */
    uint32_t *arrived;           /* [1], 0 before and after */
    uint8_t *by_lists[2];        /* [tiles] of the anchors and of the references, 1: by lists; null: not wanted */
    uint32_t blocks;             /* blocks that have a row tile */
    uint32_t words;              /* WEIGH_NO_WORDS, or the type of the elements of M */
    float weight_scale;          /* as in GradientParams */
    uint32_t reserved;
} WeighParams;

/* gradient: M R for one side; M = G + G^T in the square form, else G or G^T. */
typedef struct GradientParams {
    Pairs pairs;
    uint32_t of_references;      /* 1: the gradient of the references (rectangular form) */
    uint32_t splits;             /* blocks that share a row block; each has a range of the other side's tiles */
    float weight_scale;          /* power of two that brings weights into the range of 16-bit types */
    uint32_t reserved;
    const uint8_t *by_lists;     /* [tiles of the result's side], 1: by lists */
    float *partial;              /* [splits, padded_rows, stride]; unused with one split */
    uint32_t *arrived;           /* [row blocks, column blocks, groups of splits + 1], 0 before and after; unused as above */
    float *gradient;             /* [count, dim], original order */
} GradientParams;

/* threshold: <dM/dlambda R, tangent> of one side, for both lambdas. Blocks as in the gradient, for each lambda. */
typedef struct ThresholdParams {
    GradientParams walk;         /* read only; its `by_lists` may be null */
    const float *tangent;        /* [count, dim], original order */
    double *partial;             /* [2, blocks]: positives', then negatives' lambda */
    uint64_t blocks;             /* number of blocks in all launches */
    uint64_t first;              /* first block of this launch */
} ThresholdParams;

/* threshold_sum: the partial sums of all blocks. One block. */
typedef struct ThresholdSumParams {
    const double *partial;       /* [2, blocks] */
    uint64_t blocks;
    double *sums;                /* [2] */
} ThresholdSumParams;

/* normalize_backward: dL/d(rows) from dL/d(unit rows). A warp for each row. */
typedef struct NormalizeBackwardParams {
    const void *rows;            /* [count, dim], as the caller gave them */
    const double *lengths;       /* [count] */
    float *gradient;             /* [count, dim], in and out */
    uint32_t count;
    uint32_t dim;
} NormalizeBackwardParams;

/* retrieval, retrieval_merge: the k most similar references of each query. A block for each query tile and split of the
 * references writes lists of candidates; then a block for each query takes the k best of its lists. */
typedef struct RetrievalParams {
    const void *queries;         /* prepared, as in Side */
    const void *references;
    uint32_t query_count;
    uint32_t reference_count;
    uint32_t stride;
    uint32_t k;
    uint32_t kept;               /* most keys of a list after shortening, as all lists are in the end; at least k */
    uint32_t capacity;           /* keys that a list has room for: power of two, at least kept + RETRIEVAL_SLACK */
    uint32_t leave_self_out;
    uint32_t first_tile;         /* first query tile of this launch */
    uint32_t splits;             /* blocks that share a query tile; each has a range of the references' tiles */
    uint32_t lists;              /* lists of a query: one or two for each block */
    uint64_t *keys;              /* [tiles of this launch * TILE, lists, capacity]: similarity descending, index ascending */
    uint32_t *counts;            /* [tiles of this launch * TILE, lists] */
    uint32_t *indices;           /* [query_count, k] */
    float *similarities;         /* [query_count, k] */
} RetrievalParams;

#endif
