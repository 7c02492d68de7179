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
/* Threads of a block, in every kernel whose warps all do the same. */
#define THREADS 256
/* Bytes of one row that a pipeline stage holds: the stride of prepared rows is a multiple. */
#define STAGE_BYTES 128
/* Shared memory of the pipeline of S tiles: 3 stages of two tiles. */
#define SIMILARITY_STAGES_BYTES (3 * 2 * TILE * STAGE_BYTES)
/* The same of 16-bit rows where two blocks share a multiprocessor (of sm_80 and sm_100): 2 stages. */
#define SHARING_STAGES_BYTES (2 * 2 * TILE * STAGE_BYTES)
/* The sweep: the stages, and two bounds for each row and column. */
#define SWEEP_SHARED_BYTES (SHARING_STAGES_BYTES + TILE * 16)
#define SWEEP_EXACT_SHARED_BYTES (SIMILARITY_STAGES_BYTES + TILE * 16)
/* On Hopper: 4 stages with a barrier each, which leaves one block a multiprocessor. */
#define HOPPER_STAGES_BYTES (4 * 2 * TILE * STAGE_BYTES)
#define HOPPER_SHARED_BYTES (HOPPER_STAGES_BYTES + 4 * 8)
/* The same-class pass: also what duplicates reach of a tile's references, on Hopper with 32 on either side of it. */
#define SAME_CLASS_SHARED_BYTES (SIMILARITY_STAGES_BYTES + TILE * 4)
#define SAME_CLASS_HOPPER_SHARED_BYTES (HOPPER_SHARED_BYTES + (TILE + 2 * 32) * 4)
/* Words that say with a bit a pair which pairs of a tile are candidates: 64 bits a thread of the sweep. */
#define TILE_MASK_WORDS (TILE * TILE / 32)
/* The sweep on Hopper: two teams of 8 warps multiply in turns, of 3 more warps one thread copies and one stores for each
 * team (a group of 4 is whole). A row tile of up to 512 dimensions, 4 stages of 16 KB for column tiles (both together serve
 * wider rows), room for the values of each team's candidates and for their masks, bounds of its columns, counts of its
 * warps and of the tile; 14 barriers; together whole 16 bytes. */
#define SWEEP_HOPPER_THREADS 640
#define SWEEP_HOPPER_RESIDENT 8
#define SWEEP_HOPPER_STAGES 4
#define SWEEP_HOPPER_STAGED 3520
/* Tiles in a row that a block takes before all go on to the next part of S together, at most. */
#define SWEEP_HOPPER_RUN 64
#define SWEEP_HOPPER_SHARED_BYTES                                                                                        \
    ((SWEEP_HOPPER_RESIDENT + SWEEP_HOPPER_STAGES) * TILE * STAGE_BYTES +                                                \
     2 * (SWEEP_HOPPER_STAGED * 4 + TILE_MASK_WORDS * 4 + TILE * 12 + 44) + 15 * 8)
/* The same of f32 to its own precision: one team, a row tile's high parts, and 5 stages for the columns' parts and the rows'
 * low ones; 29 barriers; together whole 16 bytes. */
#define SWEEP_SPLIT_THREADS 384
#define SWEEP_SPLIT_STAGES 5
#define SWEEP_SPLIT_SHARED_BYTES                                                                                          \
    ((SWEEP_HOPPER_RESIDENT + SWEEP_SPLIT_STAGES) * TILE * STAGE_BYTES + SWEEP_HOPPER_STAGED * 4 + TILE_MASK_WORDS * 4 +  \
     TILE * 12 + 44 + 4 + (2 * (SWEEP_HOPPER_RESIDENT + SWEEP_SPLIT_STAGES) + 4) * 8)
/* Keys of a tile, of which each block places some; sorted runs that one launch merges into one. Powers of two. */
#define ORDER_TILE 2048
#define ORDER_OWN 64
#define ORDER_RUNS 32
/* Layout one merge of such tiles would not do: four times the keys, sorted by one block. */
#define ORDER_WIDE_TILE 8192
#define ORDER_WIDE_THREADS 1024
/* The labels, as they are and as f32, what each warp has counted for each own key, and a flag a warp. Layout a block sorts, keys of
 * 10 bytes with a gap behind every 8. */
#define ORDER_SHARED_BYTES (ORDER_TILE * (8 + 4) + THREADS / 32 * (ORDER_OWN + 1) * 4)
/* Keys of a block that merges, and what each warp has found for each. */
#define ORDER_MERGED 128
#define ORDER_MERGE_SHARED_BYTES (THREADS / 32 * ORDER_MERGED * 4)
#define ORDER_WIDE_SHARED_BYTES ((ORDER_WIDE_TILE + ORDER_WIDE_TILE / 8) * 10)
/* Bounds, ranges and sums of the 128 rows and 128 columns of a tile, and what is the same for every pair. */
#define SELECT_SHARED_BYTES (TILE * (2 * 8 + 8 + 2 * (3 * 5 + 2) * 4) + 80)
/* Of stored candidates also the values and places of so many, 12 bytes a thread, a count a warp, and 32 tiles. Blocks a
 * multiprocessor, which walk the tiles. */
#define SELECT_PLACES 3520
#define SELECT_STORED_SHARED_BYTES (SELECT_SHARED_BYTES + SELECT_PLACES * 6 + THREADS * 12 + THREADS / 32 * 4 + 32 * 8 + 16)
#define SELECT_BLOCKS 5
/* Sums that the blocks of `weigh` add up. */
#define WEIGH_SUMS 10
/* One f64 a warp, to sum over a block; of `weigh` for each of its sums and for the candidates of
 * two row tiles, also one for each warp and 32 columns of both sides, and a flag. */
#define SUM_SHARED_BYTES (THREADS / 32 * 8)
#define WEIGH_SHARED_BYTES ((WEIGH_SUMS + 2) * SUM_SHARED_BYTES + WEIGH_SUMS * 8 + 2 * THREADS / 32 * 32 * 8 + 8)
/* Whether it finishes words, and for which type of rows. */
#define WEIGH_NO_WORDS 0
#define WEIGH_WORDS_F16 1
#define WEIGH_WORDS_BF16 2
/* The tile way of the gradient: a block owns as many rows as its 128 sums a thread allow beside
 * the fragments (16-bit types; f32 needs twice the fragments), and these columns of each. Every
 * block reads the other side once for its columns: more rows, less traffic. */
#define GRADIENT_ROWS_16BIT 128
#define GRADIENT_ROWS_32BIT 64
#define GRADIENT_COLUMNS 256
/* Splits of the gradient whose parts one block adds; of more the sums are added once more. */
#define SPLITS_ADDED 8
/* Rows of the other side that a pipeline stage holds, and the bytes of all stages together:
 * four of 16-bit types, two of f32 to its own precision. */
#define GRADIENT_DEPTH 32
#define GRADIENT_STAGES_BYTES (4 * GRADIENT_DEPTH * GRADIENT_COLUMNS * 2)
/* The largest element of M and two barriers of the same, behind the tile of M. */
#define GRADIENT_EXTRA_BYTES 24
/* On Hopper warps have roles: 8 multiply, 3 build M, 1 copies; more threads would leave the product of 256 columns too
 * few registers (ptxas wants 154 for the whole kernel). 4 stages of half a tile's rows (32 KB), three
 * tiles of M (32 KB), which are cleared, built and multiplied at a time; 16 barriers, and a flag. */
#define GRADIENT_HOPPER_THREADS 384
#define GRADIENT_HOPPER_STAGES 4
#define GRADIENT_HOPPER_SHARED_BYTES \
    (GRADIENT_HOPPER_STAGES * TILE / 2 * GRADIENT_COLUMNS * 2 + (GRADIENT_HOPPER_STAGES / 2 + 1) * TILE * TILE * 2 + 17 * 8)
/* The same of f32 to its own precision: 6 stages of 32 rows and 128 columns in two parts (16 KB), two tiles of M in two parts;
 * 20 barriers, and a flag. */
#define GRADIENT_SPLIT_STAGES 6
#define GRADIENT_SPLIT_SHARED_BYTES (GRADIENT_SPLIT_STAGES * 32 * 128 * 2 * 2 + 2 * 2 * TILE * TILE * 2 + 21 * 8)
/* Columns of the gradient that a block of the list way keeps as f32. */
#define LISTS_COLUMNS 256
/* Keys that a list of retrieval takes beyond those it is cut to, at least: a tile's, or a round's of the merge. */
#define RETRIEVAL_SLACK THREADS
/* The same from which on one list after the other is cut. */
#define RETRIEVAL_SPARE 96
/* Keys that are merged in shared memory, at most, behind their number; more are merged where the first list is. */
#define RETRIEVAL_MERGED 8192
#define RETRIEVAL_MERGE_EXTRA_BYTES 16
/* On Hopper: the query tile and the stages, and the barriers of the teams; of f32 to its own precision of one team. */
#define RETRIEVAL_HOPPER_SHARED_BYTES ((SWEEP_HOPPER_RESIDENT + SWEEP_HOPPER_STAGES) * TILE * STAGE_BYTES + 10 * 8)
#define RETRIEVAL_SPLIT_SHARED_BYTES \
    ((SWEEP_HOPPER_RESIDENT + SWEEP_SPLIT_STAGES) * TILE * STAGE_BYTES + (2 * (SWEEP_HOPPER_RESIDENT + SWEEP_SPLIT_STAGES) + 1) * 8)
/* Stands for "no row". */
#define NO_ROW 0xffffffffu

/* References of one anchor's class, [begin, end); an ignored anchor has begin > end. */
typedef struct ClassRange {
    uint32_t begin;
    uint32_t end;
} ClassRange;

/* One side of the comparison, prepared: class order, zero padding. */
typedef struct Side {
    const void *rows;       /* [tiles, stages, TILE, STAGE_BYTES], swizzled: prepared_offset() in mma_tile.cuh */
    const uint32_t *order;  /* [count], original index of each row */
    const float *duplicate; /* [tiles * TILE]; a pair of one class that reaches both rows' is a duplicate */
    uint32_t count;         /* B or N */
    uint32_t tiles;         /* ceil(count / TILE) */
} Side;

/* What mining and loss need of LossSettings. */
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
    double more_scale;           /* of softplus - sigmoid: a power of two, at most sum_scale, with every term below 2^41 units */
    uint32_t adaptive;           /* AT-ASMS, otherwise the tolerances stay */
    uint32_t reserved;
} Settings;

/* Sums over all blocks; integers, so that their order does not matter. */
typedef struct Counters {
    uint64_t probe_neg;          /* n_neg of the probe */
    uint64_t total_pos;          /* N_pos */
    uint32_t valid_anchors;      /* rows whose label is not ignored; the rest follow them */
    uint32_t valid_references;
    uint32_t bad_anchor;         /* smallest original index that is no unit row, or NO_ROW */
    uint32_t bad_reference;
    uint64_t reserved;           /* units of the pool that tiles have asked for; more than there are: some are recomputed */
    uint32_t largest_weight;     /* what one row adds to a pair's weight at most, of all rows, as the bits of an f32 */
    uint32_t unused;
} Counters;

/* Of each anchor's mined pairs of one kind, from the selection, [B] each: what a warp adds to neighbouring rows falls into few
 * sectors. The sums are fixed point: order-independent. */
typedef struct MinedSums {
    int64_t *softplus;           /* sum of log(1 + exp(-beta (S - lambda_pos))) over P_i, or of the same over N_i */
    int64_t *sigmoid;            /* sum of its derivative */
    uint32_t *count;             /* |P_i| or |N_i| */
} MinedSums;

/* Per anchor: what turns a similarity into a pair weight. Nothing passes an inactive row's bounds. */
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

/* Per reference that is an anchor of the whole batch elsewhere: what that anchor's mining needs. */
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

/* The pairs of one batch and everything known of them. All passes of a loss share it. */
typedef struct Pairs {
    Side anchors;
    Side references;             /* the anchors in the square form */
    uint32_t square;
    uint32_t stride;             /* elements between rows: whole stages of STAGE_BYTES */
    uint32_t dim;                /* D */
    uint32_t pool;               /* of candidates, in units of 4 */
    uint64_t tiles;              /* of S: upper triangle, or all */
    uint32_t total;              /* B of 1/B: these anchors may be a part of a batch */
    uint32_t band;               /* columns of tiles that are swept together, a power of two: tile_at() in mma_tile.cuh */
    ClassRange *classes;         /* [B] */
    RowSame *same;               /* [B] */
    uint32_t *max_neg;           /* [B], ordered key of m-, 0 without a negative */
    Counters *counters;          /* [1] */
    MinedSums positives;
    MinedSums negatives;
    RowWeights *weights;         /* [anchor tiles * TILE] */
    /* The rectangular form. Null where nobody says which reference is an anchor; NO_ROW where none is. */
    const uint32_t *identity;    /* [B], positions of references */
    /* Null where references select nothing. */
    RowNumbers *columns;         /* [N] */
    RowWeights *column_weights;  /* [reference tiles * TILE]; in the square form those of the anchors */
    uint64_t *totals;            /* [2], n_neg of the probe and N_pos, of the whole batch */
    /* Candidates: every positive, and the negatives above either row's candidate bound, in the order of the sweep's threads
     * and of each one's bits. The sweep leaves these bits where the selection writes the words. */
    uint32_t *tile_counts;       /* [tiles] */
    uint32_t *tile_segments;     /* [tiles], of a tile with candidates: where in the pool, in units of 4; NO_ROW: not stored,
                                  * to be recomputed */
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
    const uint32_t *list;        /* [count], original order, NO_ROW where none is; or null: first + i */
    const uint64_t *first_at;    /* [1], in place of `first`; or null */
    uint64_t first;
    uint32_t *identity;          /* [count] */
    uint32_t count;
    uint32_t references;
} IdentityParams;

/* Which of a row's numbers go in or out between two steps. */
#define NUMBERS_MIN_POS 0
#define NUMBERS_MAX_NEG 1
#define NUMBERS_COUNTS 2

/* take_numbers: numbers from outside in place of those found here, for anchors and references. */
typedef struct TakeParams {
    Pairs pairs;
    uint32_t which;
    uint32_t given;              /* references that have numbers: the first ones of the original order */
    const void *anchors;         /* [B] f32, or |P| as u32, original order */
    const void *anchors_neg;     /* [B], |N| */
    const void *references;      /* [given], likewise */
    const void *references_neg;
    const uint64_t *totals;      /* [2], to be copied to those of the pairs; or null */
} TakeParams;

/* report_numbers: what a step found, in original order. */
typedef struct ReportParams {
    Pairs pairs;
    uint32_t which;
    uint32_t reserved;
    void *anchors;               /* [B] f32, or |P| as u32 */
    void *anchors_neg;           /* [B], |N| */
    uint64_t *totals;            /* [2], n_neg of the probe and N_pos, of these anchors; or null */
} ReportParams;

/* Words that are 0 when a loss begins. */
typedef struct Zeroed {
    uint32_t *words;
    uint64_t count;
} Zeroed;
#define ZEROED 7

/* order_tiles, order_tiles_wide: sorts the keys of each tile, a block for every ORDER_OWN keys or for a wide tile, and begins the
 * loss: counters and sums that later passes count up in. */
typedef struct OrderParams {
    const int64_t *labels;       /* [count], original order */
    uint32_t count;
    uint32_t reserved;
    uint64_t *keys;              /* [count], labels sorted within each tile; ignored ones are UINT64_MAX */
    uint32_t *order;             /* [count], their original indices */
    uint32_t *valid;             /* out: rows that are not ignored; null where tiles are merged, which counts them, so of wide ones */
    uint32_t *valid_too;         /* out, the same for the other side; null in the rectangular form */
    Counters *counters;          /* null where another launch begins them */
    Zeroed zeroed[ZEROED];
} OrderParams;

/* order_merge: the place of each key of ORDER_RUNS sorted runs among all of theirs. One block for every ORDER_MERGED keys. */
typedef struct MergeParams {
    const uint64_t *from_keys;   /* [count], sorted within each run */
    const uint32_t *from_order;
    uint64_t *keys;              /* [count], sorted within each ORDER_RUNS runs */
    uint32_t *order;
    uint32_t count;
    uint32_t run;                /* keys of a run, a power of two; the last one may have fewer */
    uint32_t *valid;             /* counted up from 0, by the last launch; otherwise null */
    uint32_t *valid_too;         /* the same for the other side; null in the rectangular form */
} MergeParams;

/* prepare: rows into class order with zero padding, and what is known of each by itself. One block a row tile,
 * and behind them, where classes are wanted, one for each THREADS anchors. */
typedef struct PrepareParams {
    const void *input;           /* [count, dim], original order */
    void *rows;                  /* as in Side */
    const uint32_t *order;       /* null: the rows stay where they are */
    const uint32_t *valid;       /* read for the column sums only */
    uint32_t count;
    uint32_t dim;
    uint32_t stride;
    uint32_t check;              /* whether norms are checked */
    double norm_tolerance;
    double *square_sums;         /* [count], original order; written for rows that may be bad */
    uint32_t *bad;               /* smallest index of a bad row */
    float *column_sums;          /* [tiles, stride], sums of the valid rows of each tile; null: not wanted */
    float *duplicate;            /* as in Side: (1 - 1e-6) |e|^2, multiplied as S is; null: not wanted */
    double *lengths;             /* [count], original order, out: of the rows, which are brought to unit length; null: they
                                  * are as they are */
    const uint64_t *keys;        /* [count], in class order; null: no classes are wanted */
    const uint64_t *reference_keys;
    ClassRange *classes;         /* [count], where each row's class stands among the references */
    uint32_t references;
    uint32_t reserved;
} PrepareParams;

/* same_class, sweep, select_stored, select_recomputed. */
typedef struct PairsParams {
    Pairs pairs;
} PairsParams;

/* weigh: per-row weights, the scalars, the results in original order, ways of the gradient. One block a row tile, of the
 * references too where they have weights or ways, and behind them, where words are finished, one a tile of S. */
typedef struct WeighParams {
    Pairs pairs;
    const float *anchor_column_sums;     /* [anchor tiles, stride] */
    const float *reference_column_sums;  /* [reference tiles, stride] */
    const double *anchor_square_sums;    /* [B] */
    const double *reference_square_sums; /* [N] */
    LossScalars *scalars;
    float *loss;                 /* [1], the loss once more; or null */
    float *min_pos;              /* [B] and below: original order */
    float *max_neg;
    uint32_t *count_pos;
    uint32_t *count_neg;
    double *parts;               /* [blocks, WEIGH_SUMS] */
    uint32_t *arrived;           /* [1], 0 before and after */
    uint8_t *ways[2];            /* [tiles] of the anchors, of the references, 1: lists; null: not wanted */
    uint32_t blocks;             /* that weigh a row tile */
    uint32_t words;              /* WEIGH_NO_WORDS, or what type the elements of M have */
    float weight_scale;          /* as in GradientParams */
    uint32_t reserved;
} WeighParams;

/* gradient: M R for one side, M = G + G^T (square), G or G^T. */
typedef struct GradientParams {
    Pairs pairs;
    uint32_t of_references;      /* the rows of the result are the references (rectangular form) */
    uint32_t splits;             /* blocks that share a row block, each a range of the other side's tiles */
    float weight_scale;          /* power of two that lifts weights into the range of 16-bit types */
    uint32_t reserved;
    const uint8_t *ways;         /* [tiles of the result's side], 1: lists */
    float *partial;              /* [splits, padded_rows, stride]; with one split unused */
    uint32_t *arrived;           /* [row blocks, column blocks, groups of splits and 1], 0 before and after; with one split unused */
    float *gradient;             /* [count, dim], original order */
} GradientParams;

/* threshold: <dM/dlambda R, tangent> of one side, for both lambdas. A block as in the gradient, for each lambda. */
typedef struct ThresholdParams {
    GradientParams walk;         /* its ways may be null; nothing is written through it */
    const float *tangent;        /* [count, dim], original order */
    double *partial;             /* [2, blocks]: positives', then negatives' lambda */
    uint64_t blocks;             /* of all launches */
    uint64_t first;              /* of this one */
} ThresholdParams;

/* threshold_sum: the partial sums of all blocks. One block. */
typedef struct ThresholdSumParams {
    const double *partial;       /* [2, blocks] */
    uint64_t blocks;
    double *sums;                /* [2] */
} ThresholdSumParams;

/* normalize_backward: dL/d(unit rows) into dL/d(rows). A warp a row. */
typedef struct NormalizeBackwardParams {
    const void *rows;            /* [count, dim], as they were given */
    const double *lengths;       /* [count] */
    float *gradient;             /* [count, dim], in and out */
    uint32_t count;
    uint32_t dim;
} NormalizeBackwardParams;

/* retrieval, retrieval_merge: the k most similar references of each query. A block for each query tile and split of the
 * references leaves lists of what may be among them; then a block a query takes the best of its lists. */
typedef struct RetrievalParams {
    const void *queries;         /* prepared, as in Side */
    const void *references;
    uint32_t query_count;
    uint32_t reference_count;
    uint32_t stride;
    uint32_t k;
    uint32_t kept;               /* keys of a list that was cut, as all are in the end, at most; at least k */
    uint32_t capacity;           /* of a list: power of two, at least kept + RETRIEVAL_SLACK */
    uint32_t leave_self_out;
    uint32_t first_tile;         /* of the queries, of this launch */
    uint32_t splits;             /* blocks that share a query tile, each a range of the references' tiles */
    uint32_t lists;              /* of a query: one or two a block */
    uint64_t *keys;              /* [tiles of this launch * TILE, lists, capacity]: similarity descending, index ascending */
    uint32_t *counts;            /* [tiles of this launch * TILE, lists] */
    uint32_t *indices;           /* [query_count, k] */
    float *similarities;         /* [query_count, k] */
} RetrievalParams;

#endif
