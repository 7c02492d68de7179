/* ddtas: fused deep metric learning. Mining, loss and gradient in passes that never store a B x B matrix.
 *
 * Every call returns a ddtas_status; ddtas_context_message says in words what went wrong. Structs begin
 * with their size: set all bytes to zero, then struct_size to sizeof, then what you need. A context may be
 * used from any thread and is locked during a call; contexts share nothing. No call keeps a pointer of the
 * caller's, but for the stream of a context. Manual: docs/linking.md.
 *
 * Written by cbindgen from src/capi: do not edit. */


#ifndef DDTAS_H
#define DDTAS_H

#include <stddef.h>
#include <stdint.h>

/**
 * Version of the binary interface these headers describe. It changes when a program built against an
 * older header could no longer run; structs that grow at their end do not change it.
 */
#define DDTAS_ABI_VERSION 1

/**
 * Index that stands for "no reference left" in what ddtas_nearest writes.
 */
#define DDTAS_NO_NEIGHBOUR UINT32_MAX

/**
 * Entry of ddtas_rows.identity_list for an anchor that is not among the references.
 */
#define DDTAS_ABSENT UINT32_MAX

/**
 * Outcome of a call. For every failure the context keeps a message, unless the context itself is unusable:
 * see ddtas_context_message.
 */
typedef enum ddtas_status {
    /**
     * The call succeeded.
     */
    DDTAS_STATUS_OK = 0,
    /**
     * A pointer that is needed is NULL.
     */
    DDTAS_STATUS_NULL_POINTER = 1,
    /**
     * A pointer is not aligned to what it points to.
     */
    DDTAS_STATUS_MISALIGNED = 2,
    /**
     * `struct_size` is not one that this library knows: set it to sizeof the struct, and its other bytes to
     * zero.
     */
    DDTAS_STATUS_STRUCT_SIZE = 3,
    /**
     * A setting or an enum value is out of its range.
     */
    DDTAS_STATUS_INVALID_VALUE = 4,
    /**
     * No rows, no dimensions, sizes that disagree, or sizes that no memory could hold.
     */
    DDTAS_STATUS_INVALID_SHAPE = 5,
    /**
     * A row holds a NaN or an infinity.
     */
    DDTAS_STATUS_NOT_FINITE = 6,
    /**
     * A row is not of unit L2 norm.
     */
    DDTAS_STATUS_NOT_UNIT = 7,
    /**
     * ddtas_threshold_gradient without the loss it continues, or a step of a part without the step before
     * it.
     */
    DDTAS_STATUS_OUT_OF_ORDER = 8,
    /**
     * A device that this build or this machine does not have, or that cannot do what was asked.
     */
    DDTAS_STATUS_UNAVAILABLE = 9,
    /**
     * The GPU driver refused a call.
     */
    DDTAS_STATUS_DEVICE = 10,
    /**
     * There is not enough memory for the call.
     */
    DDTAS_STATUS_OUT_OF_MEMORY = 11,
    /**
     * A fault of this library. Nothing was written; the context can be used again. Please report it.
     */
    DDTAS_STATUS_INTERNAL = 12,
} ddtas_status;

/**
 * Type of the values behind ddtas_rows.embeddings. Gradients and tangents are float throughout.
 */
typedef enum ddtas_dtype {
    /**
     * IEEE single precision, `float`.
     */
    DDTAS_DTYPE_F32 = 0,
    /**
     * IEEE half precision.
     */
    DDTAS_DTYPE_F16 = 1,
    /**
     * bfloat16.
     */
    DDTAS_DTYPE_BF16 = 2,
} ddtas_dtype;

/**
 * Says which reference is the same row as an anchor; the two are never a pair.
 */
typedef enum ddtas_identity {
    /**
     * Unknown: an anchor that is also a reference is recognised by its value and left out of the positives.
     */
    DDTAS_IDENTITY_BY_VALUE = 0,
    /**
     * Reference ddtas_rows.identity_first + i is anchor i.
     */
    DDTAS_IDENTITY_FROM = 1,
    /**
     * Entry i of ddtas_rows.identity_list is the reference that is anchor i.
     */
    DDTAS_IDENTITY_LIST = 2,
} ddtas_identity;

/**
 * The memory that rows are in.
 */
typedef enum ddtas_memory {
    /**
     * Host memory. Every device takes it; a GPU copies the rows.
     */
    DDTAS_MEMORY_HOST = 0,
    /**
     * The memory of the context's GPU. Nothing is copied; gradients are written there.
     */
    DDTAS_MEMORY_DEVICE = 1,
} ddtas_memory;

/**
 * Which pairs enter the loss.
 */
typedef enum ddtas_mining_mode {
    /**
     * Adaptive asymmetric sample mining, the method's own.
     */
    DDTAS_MINING_MODE_AT_ASMS = 0,
    /**
     * Asymmetric sample mining with fixed tolerances.
     */
    DDTAS_MINING_MODE_ASMS = 1,
    /**
     * One tolerance for both kinds of pairs.
     */
    DDTAS_MINING_MODE_SYMMETRIC = 2,
    /**
     * Every pair of an anchor that has pairs of both kinds.
     */
    DDTAS_MINING_MODE_NONE = 3,
} ddtas_mining_mode;

/**
 * Whether rows are checked before use.
 */
typedef enum ddtas_row_check {
    /**
     * Every row is checked for NaN, infinity and unit norm.
     */
    DDTAS_ROW_CHECK_CHECK = 0,
    /**
     * The caller vouches for the rows. Rows that fail the check give a meaningless loss, no worse.
     */
    DDTAS_ROW_CHECK_TRUST = 1,
} ddtas_row_check;

/**
 * The stream that a GPU context works on.
 */
typedef enum ddtas_stream_mode {
    /**
     * A stream of the context's own. The caller's work must be complete before a call.
     */
    DDTAS_STREAM_MODE_OWN = 0,
    /**
     * ddtas_context_options.stream, in order with what the caller issues there.
     */
    DDTAS_STREAM_MODE_GIVEN = 1,
} ddtas_stream_mode;

/**
 * One device with its threads and workspace. Make it with ddtas_context_create.
 */
typedef struct ddtas_context ddtas_context;

/**
 * Options of a context. All bytes zero but struct_size mean the defaults.
 */
typedef struct ddtas_context_options {
    /**
     * sizeof(ddtas_context_options).
     */
    size_t struct_size;
    /**
     * "cpu", "cuda", "cuda:N", or "auto": the first GPU if there is one, else the CPU. NULL is "auto".
     */
    const char *device;
    /**
     * Threads of a CPU context, which compute while the calling one waits: 1 to 1024; 0 means as many as
     * RAYON_NUM_THREADS says, else one per core. The result is the same bit for bit whatever their number.
     */
    size_t threads;
    /**
     * Bytes for the pairs kept between passes; what does not fit is computed again, with the same result bit
     * for bit on the CPU. 0 means the default: 6 KiB per row on the CPU, a quarter of the free memory on a
     * GPU.
     */
    size_t workspace_bytes;
    /**
     * A CUstream or cudaStream_t of that GPU's primary context, with DDTAS_STREAM_MODE_GIVEN;
     * NULL is then the default stream. It must outlive the context.
     */
    void *stream;
    /**
     * A ddtas_stream_mode.
     */
    int32_t stream_mode;
    /**
     * If not 0, a GPU multiplies float rows with TF32's precision, in a third of the work or less: entries
     * rounded to 11 significant bits (those below 6e-5 to an absolute 3e-8), products summed in float. It
     * permits and does not demand: the CPU, whether named or found by "auto", always computes in float.
     */
    int32_t allow_tf32;
} ddtas_context_options;

/**
 * Mining and loss. ddtas_settings_init fills in the paper's values.
 */
typedef struct ddtas_settings {
    /**
     * sizeof(ddtas_settings).
     */
    size_t struct_size;
    /**
     * A ddtas_mining_mode.
     */
    int32_t mining;
    /**
     * A ddtas_row_check.
     */
    int32_t row_check;
    /**
     * Tolerance of mining, in units of cosine similarity: 0 to 2, paper 0.1.
     */
    double gamma;
    /**
     * The negative tolerance over gamma: 0 to 10, paper 0.1.
     */
    double negative_ratio;
    /**
     * The probe's tolerance over gamma: 0 to 10, paper 0.1.
     */
    double probe_ratio;
    /**
     * Factor k of the adaptation: 0 to 1, paper 0.5.
     */
    double tolerance;
    /**
     * Sharpness of the negative term: above 0, at most 10000; paper 40.
     */
    double alpha;
    /**
     * Sharpness of the positive term: above 0, at most 10000; paper 2.
     */
    double beta;
    /**
     * Loss threshold of the positive term, a cosine similarity: -2 to 2, paper 0.7.
     */
    double lambda_pos;
    /**
     * Loss threshold of the negative term, a cosine similarity: -2 to 2, paper 0.7.
     */
    double lambda_neg;
    /**
     * 1: rows may have any length but 0. They are normalised, and gradients are with respect to the rows as
     * given; no ddtas_threshold_gradient can follow. For ddtas_enqueue_loss, and ddtas_loss of host rows. 0:
     * rows have unit length.
     */
    uint64_t normalize;
} ddtas_settings;

/**
 * Embeddings with their labels. The library reads them during a call and keeps no pointer.
 */
typedef struct ddtas_rows {
    /**
     * sizeof(ddtas_rows).
     */
    size_t struct_size;
    /**
     * `count` rows of `dim` values of the type `dtype`, each row of unit L2 norm unless
     * ddtas_settings.normalize is 1.
     */
    const void *embeddings;
    /**
     * `count` labels. A row with a negative label takes part in no pair; a loss checks it all the same: fill
     * it with a unit vector, any one, rather than zeros.
     */
    const int64_t *labels;
    /**
     * Number of rows: 1 to 2^31 - 1; 0 for a part without anchors, whose embeddings and labels may be NULL.
     */
    size_t count;
    /**
     * Values of a row: 1 to 2^31 - 1.
     */
    size_t dim;
    /**
     * Values from the beginning of a row to that of the next: `dim` or more, 0 for `dim`.
     * More than `dim` costs a copy of the rows; in device memory it must be `dim` or 0.
     */
    size_t row_stride;
    /**
     * A ddtas_dtype.
     */
    int32_t dtype;
    /**
     * A ddtas_memory; the same for all rows of a call.
     */
    int32_t memory;
    /**
     * For the references of a loss: a ddtas_identity, how the anchors are identified among them.
     */
    int32_t identity;
    /**
     * With DDTAS_IDENTITY_FROM: the reference that is the first anchor; the others follow it.
     */
    uint32_t identity_first;
    /**
     * With DDTAS_IDENTITY_LIST: a reference for each anchor, or DDTAS_ABSENT. Host memory.
     */
    const uint32_t *identity_list;
} ddtas_rows;

/**
 * Result of ddtas_loss, and of the four steps of a part together. The caller sets struct_size and the
 * pointers, NULL (all bytes zero) for what it does not want; the library sets the rest, and only if the call
 * succeeds.
 */
typedef struct ddtas_loss_result {
    /**
     * sizeof(ddtas_loss_result).
     */
    size_t struct_size;
    /**
     * dL/d(anchors), float, `count` rows of `dim`; in the square form the whole gradient.
     * In the same memory as the rows; NULL is allowed only for host rows.
     */
    float *gradient;
    /**
     * As ddtas_rows.row_stride, for `gradient`. What lies between two rows is left alone.
     */
    size_t gradient_stride;
    /**
     * dL/d(references), float, likewise. NULL in the square form.
     */
    float *reference_gradient;
    /**
     * As ddtas_rows.row_stride, for `reference_gradient`.
     */
    size_t reference_gradient_stride;
    /**
     * Host memory, an entry per anchor: smallest similarity to a positive, +inf without one.
     */
    float *min_pos;
    /**
     * Host memory, an entry per anchor: largest similarity to a negative, -inf without one.
     */
    float *max_neg;
    /**
     * Host memory, an entry per anchor: positives that are mined.
     */
    uint32_t *count_pos;
    /**
     * Host memory, an entry per anchor: negatives that are mined.
     */
    uint32_t *count_neg;
    /**
     * The loss L.
     */
    double loss;
    /**
     * dL/d(lambda_pos).
     */
    double dloss_dlambda_pos;
    /**
     * dL/d(lambda_neg).
     */
    double dloss_dlambda_neg;
    /**
     * The positive tolerance in force, after adaptation; +inf with DDTAS_MINING_MODE_NONE.
     */
    double gamma_pos;
    /**
     * The negative tolerance in force, likewise.
     */
    double gamma_neg;
    /**
     * Mean similarity over all positive pairs; NaN if there is none.
     */
    double mean_pos;
    /**
     * Mean similarity over all negative pairs; NaN if there is none.
     */
    double mean_neg;
    /**
     * Ordered positive pairs of the batch.
     */
    uint64_t total_pos;
    /**
     * Negatives that passed the probe.
     */
    uint64_t probe_neg;
    /**
     * Anchors that enter the loss: those with both kinds of mined pairs.
     */
    uint64_t active;
    /**
     * Positive pairs that enter the loss.
     */
    uint64_t mined_pos;
    /**
     * Negative pairs that enter the loss.
     */
    uint64_t mined_neg;
    /**
     * Ordered negative pairs of the batch.
     */
    uint64_t total_neg;
} ddtas_loss_result;

/**
 * The scalars that ddtas_enqueue_loss writes to device memory, aligned to 8 bytes. The struct has no
 * struct_size and never grows: 120 bytes in every version of the interface.
 */
typedef struct ddtas_loss_scalars {
    /**
     * The loss L; NaN if a row is bad.
     */
    double loss;
    /**
     * dL/d(lambda_pos).
     */
    double dloss_dlambda_pos;
    /**
     * dL/d(lambda_neg).
     */
    double dloss_dlambda_neg;
    /**
     * Mean similarity over all positive pairs; NaN if there is none.
     */
    double mean_pos;
    /**
     * Mean similarity over all negative pairs; NaN if there is none.
     */
    double mean_neg;
    /**
     * The positive tolerance in force, after adaptation; +inf with DDTAS_MINING_MODE_NONE.
     */
    double gamma_pos;
    /**
     * The negative tolerance in force, likewise.
     */
    double gamma_neg;
    /**
     * Negatives that passed the probe.
     */
    uint64_t probe_neg;
    /**
     * Ordered positive pairs of the batch.
     */
    uint64_t total_pos;
    /**
     * Ordered negative pairs of the batch.
     */
    uint64_t total_neg;
    /**
     * Anchors that enter the loss.
     */
    uint64_t active;
    /**
     * Sum of the squares of the bad row's entries, if there is a bad row.
     */
    double bad_square_sum;
    /**
     * The first anchor that is not finite or not of unit length; DDTAS_ABSENT if there is none.
     */
    uint32_t bad_anchor;
    /**
     * The first reference that is not finite or not of unit length; DDTAS_ABSENT if there is none.
     */
    uint32_t bad_reference;
    /**
     * Positive pairs that were mined.
     */
    uint64_t mined_pos;
    /**
     * Negative pairs that were mined.
     */
    uint64_t mined_neg;
} ddtas_loss_scalars;

/**
 * The derivative of the embeddings along a direction, for ddtas_threshold_gradient. In the same memory as
 * the rows.
 */
typedef struct ddtas_tangents {
    /**
     * sizeof(ddtas_tangents).
     */
    size_t struct_size;
    /**
     * The anchors' tangent, float, one row per anchor.
     */
    const float *anchors;
    /**
     * As ddtas_rows.row_stride, for `anchors`.
     */
    size_t anchor_stride;
    /**
     * The references' tangent; NULL if they do not move. Ignored in the square form.
     */
    const float *references;
    /**
     * As ddtas_rows.row_stride, for `references`.
     */
    size_t reference_stride;
} ddtas_tangents;

/**
 * A part of a batch, and what the caller has gathered from all parts. Each step reads the fields whose
 * comments name it, and ignores the others. Arrays are in host memory. The first step needs struct_size and
 * `total` only; all other bytes are zero.
 */
typedef struct ddtas_part {
    /**
     * sizeof(ddtas_part).
     */
    size_t struct_size;
    /**
     * Every step: the number of anchors of all parts, B of the factor 1/B. At least 1.
     */
    size_t total;
    /**
     * From the sweep on: the number of references that are anchors of some part; these come first. The
     * arrays `reference_...` below have as many entries. References without an entry, such as those of a
     * memory bank, select nothing. At most the number of references.
     */
    size_t reference_numbers;
    /**
     * ddtas_sweep: ddtas_loss_result.min_pos of each anchor, over all of its pairs.
     */
    const float *min_pos;
    /**
     * ddtas_sweep: the same of the references.
     */
    const float *reference_min_pos;
    /**
     * ddtas_select: ddtas_loss_result.max_neg of each anchor, over all of its pairs.
     */
    const float *max_neg;
    /**
     * ddtas_select: the same of the references.
     */
    const float *reference_max_neg;
    /**
     * ddtas_select: the sum of ddtas_loss_result.probe_neg of all parts.
     */
    uint64_t probe_neg;
    /**
     * ddtas_select: the sum of ddtas_loss_result.total_pos of all parts.
     */
    uint64_t total_pos;
    /**
     * ddtas_gradient: ddtas_loss_result.count_pos of each anchor, over all of its pairs.
     */
    const uint32_t *count_pos;
    /**
     * ddtas_gradient: the same of the references.
     */
    const uint32_t *reference_count_pos;
    /**
     * ddtas_gradient: ddtas_loss_result.count_neg of each anchor, over all of its pairs.
     */
    const uint32_t *count_neg;
    /**
     * ddtas_gradient: the same of the references.
     */
    const uint32_t *reference_count_neg;
} ddtas_part;

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

/**
 * Version of the linked library's binary interface. Compare it with DDTAS_ABI_VERSION, the header's.
 */
uint32_t ddtas_abi_version(void);

/**
 * Version of the library, "MAJOR.MINOR.PATCH". Never NULL, never freed.
 */
const char *ddtas_version(void);

/**
 * Makes a context and writes it to `*context`, which is NULL if that fails.
 *
 * `options` NULL means the defaults. `message`, if not NULL, receives the reason of a failure, cut to
 * `message_bytes` and always NUL-terminated. Destroy the context with ddtas_context_destroy.
 *
 * # Safety
 * Every pointer is NULL or leads to what its type says; `message` has `message_bytes` bytes.
 */
enum ddtas_status ddtas_context_create(const struct ddtas_context_options *options,
                                       struct ddtas_context **context,
                                       char *message,
                                       size_t message_bytes);

/**
 * Destroys a context: waits until its threads have ended, and frees its memory. NULL is allowed. No other
 * call may be using it. In a forked child the parent's threads and memory are left alone, and the child's
 * own are ended.
 *
 * # Safety
 * `context` is NULL or a live context, which must not be used afterwards.
 */
void ddtas_context_destroy(struct ddtas_context *context);

/**
 * Copies the message of the context's last call, empty if that succeeded, cut to `bytes` and always
 * NUL-terminated.
 *
 * Returns the message's whole length without the NUL. To ask for the length alone, pass 0 `bytes`; `buffer`
 * may then be NULL. If threads share a context, one may read the message of another's call.
 *
 * # Safety
 * `context` is NULL or a live context; `buffer` has `bytes` bytes.
 */
size_t ddtas_context_message(const struct ddtas_context *context, char *buffer, size_t bytes);

/**
 * Copies the name of the context's device ("cpu", "cuda:0") as ddtas_context_message copies the
 * message, and returns its length; 0 for a context that is NULL.
 *
 * # Safety
 * As ddtas_context_message.
 */
size_t ddtas_context_device(const struct ddtas_context *context, char *buffer, size_t bytes);

/**
 * Writes the bytes that the context's workspace holds now. Except for kept pairs, it stays as large as the
 * largest batch so far needed it: to free it, destroy the context and make another.
 *
 * # Safety
 * Every pointer is NULL or leads to what its type says.
 */
enum ddtas_status ddtas_workspace_bytes(const struct ddtas_context *context, size_t *bytes);

/**
 * Sets settings to their defaults, the paper's, and fields that this library does not know to zero. Pass
 * sizeof(ddtas_settings) for `struct_size`.
 *
 * # Safety
 * `settings` is NULL or leads to `struct_size` bytes.
 */
enum ddtas_status ddtas_settings_init(struct ddtas_settings *settings, size_t struct_size);

/**
 * Mines pairs and evaluates the loss and its gradient.
 *
 * `settings` NULL means the paper's values. With `references` NULL every row of `anchors` is compared with
 * every other (the square form); otherwise anchors are compared with references (such as a memory bank),
 * whose `identity` says which of them are anchors. `result` is written only if the call succeeds. The
 * context remembers the pairs for ddtas_threshold_gradient.
 *
 * # Safety
 * Every pointer, those within structs too, is NULL or leads to memory of the length its comment
 * states, which no other thread writes to during the call.
 */
enum ddtas_status ddtas_loss(struct ddtas_context *context,
                             const struct ddtas_settings *settings,
                             const struct ddtas_rows *anchors,
                             const struct ddtas_rows *references,
                             struct ddtas_loss_result *result);

/**
 * Issues a loss and its gradient on the context's stream without waiting. Rows, gradients, thresholds and
 * scalars are in device memory, which must stay valid until the stream has finished.
 *
 * Otherwise as ddtas_loss. `gradient` receives dL/d(anchors), `count` rows of `dim`; `reference_gradient`
 * likewise dL/d(references), or is NULL. `lambda`, if not NULL, points to lambda_pos and lambda_neg, which
 * replace those of `settings`; they must be within -2 to 2 and are not checked, and no
 * ddtas_threshold_gradient can follow, since it would read them again. A bad row is not an error of this
 * call: it makes the loss and the gradients NaN, and `scalars` names it. After the first call of a shape
 * nothing is allocated, so that calls can be captured in a graph.
 *
 * # Safety
 * As ddtas_loss, until the stream has finished.
 */
enum ddtas_status ddtas_enqueue_loss(struct ddtas_context *context,
                                     const struct ddtas_settings *settings,
                                     const struct ddtas_rows *anchors,
                                     const struct ddtas_rows *references,
                                     float *gradient,
                                     float *reference_gradient,
                                     const double *lambda,
                                     struct ddtas_loss_scalars *scalars);

/**
 * Derivatives by the two loss thresholds of the loss gradient's product with a direction: the sums over all
 * mined pairs of the context's last ddtas_loss of dG_ij/dlambda * (t_i . e_j + e_i . t_j).
 *
 * After ddtas_gradient the sums are the part's share: along the tangent of its anchors, and of references
 * that are no anchors. `anchors` and `references` must be those of that call. If the tangent is the motion
 * of the embeddings along the meta gradient, the sums times minus the learning rate are dL_meta/dlambda of
 * the threshold generator. Rows in device memory need tangents in device memory, which are not checked for
 * NaN.
 *
 * # Safety
 * As ddtas_loss.
 */
enum ddtas_status ddtas_threshold_gradient(struct ddtas_context *context,
                                           const struct ddtas_rows *anchors,
                                           const struct ddtas_rows *references,
                                           const struct ddtas_tangents *tangents,
                                           double *gradient_lambda_pos,
                                           double *gradient_lambda_neg);

/**
 * The `k` most similar references of every query, most similar first, equal ones by index.
 *
 * `references` NULL searches the queries among themselves, each left out of its own list. Labels are ignored
 * and may be NULL. `indices` and `similarities` receive `count` rows of `k`, always in host memory; with
 * fewer than `k` references the rest of a row is DDTAS_NO_NEIGHBOUR and -inf. Rows in device memory are
 * searched there, without a copy.
 *
 * # Safety
 * As ddtas_loss.
 */
enum ddtas_status ddtas_nearest(struct ddtas_context *context,
                                const struct ddtas_rows *queries,
                                const struct ddtas_rows *references,
                                size_t k,
                                uint32_t *indices,
                                float *similarities);

/**
 * Recall@K: the share of rows whose K nearest other rows hold one of their class, for every K of `ks`.
 *
 * Rows with a negative label are neither queries nor neighbours; a row alone in its class is no query.
 * `recall_at` receives `k_count` values in the order of `ks`; `queries`, if not NULL, the number of rows
 * that were counted. `ks`, `recall_at` and `queries` are always in host memory. Rows are searched in blocks,
 * whose lists take 64 MiB. Rows in device memory are searched there; their labels and the lists are copied
 * to the host.
 *
 * # Safety
 * As ddtas_loss; `ks` and `recall_at` have `k_count` entries.
 */
enum ddtas_status ddtas_recall_at_k(struct ddtas_context *context,
                                    const struct ddtas_rows *rows,
                                    const size_t *ks,
                                    size_t k_count,
                                    double *recall_at,
                                    uint64_t *queries);

/**
 * First step of the loss of a part of a batch: fills in `min_pos`, `total_pos`, `total_neg`, `mean_pos` and
 * `mean_neg` of `result`. ddtas_sweep, ddtas_select and ddtas_gradient follow.
 *
 * The four steps together do what ddtas_loss does. `anchors` are some rows of a batch of `part->total` rows,
 * or none; `references` are all rows of the batch, in the same order for every part, followed by rows that
 * are anchors of no part, if there are any. `identity` of the references says which of them the anchors are.
 * Each part has a context of its own. Between the steps the caller gathers the results of all parts and
 * passes them in `part`. From the numbers of its references a part sums its own rows of the gradient, so no
 * gradients are exchanged. For the gradient of references that are no anchors, they take the anchors' place in
 * parts of their own (docs/parts.md, "The gradient of references"); these may have more rows than `total`.
 *
 * `settings` NULL means the paper's values; they hold for all four steps. All steps take the same rows.
 * After a failed step, or a ddtas_loss in between, start again with ddtas_same_class. If all steps get the
 * same `result`, it holds in the end what ddtas_loss writes there, for the part's own pairs. On the CPU each
 * row's numbers and gradient equal those of the whole batch bit for bit, however it is split; the losses of
 * all parts add up to its loss but for rounding. Rows must be in host memory.
 *
 * # Safety
 * As ddtas_loss.
 */
enum ddtas_status ddtas_same_class(struct ddtas_context *context,
                                   const struct ddtas_settings *settings,
                                   const struct ddtas_rows *anchors,
                                   const struct ddtas_rows *references,
                                   const struct ddtas_part *part,
                                   struct ddtas_loss_result *result);

/**
 * Second step: fills in `max_neg` and `probe_neg` of `result`, from `min_pos` in `part`.
 *
 * # Safety
 * As ddtas_loss.
 */
enum ddtas_status ddtas_sweep(struct ddtas_context *context,
                              const struct ddtas_rows *anchors,
                              const struct ddtas_rows *references,
                              const struct ddtas_part *part,
                              struct ddtas_loss_result *result);

/**
 * Third step: fills in `count_pos`, `count_neg`, `gamma_pos` and `gamma_neg` of `result`, from `max_neg`,
 * `probe_neg` and `total_pos` in `part`.
 *
 * # Safety
 * As ddtas_loss.
 */
enum ddtas_status ddtas_select(struct ddtas_context *context,
                               const struct ddtas_rows *anchors,
                               const struct ddtas_rows *references,
                               const struct ddtas_part *part,
                               struct ddtas_loss_result *result);

/**
 * Last step: fills in the part's share of the loss and of its derivatives, `active`, `mined_pos` and
 * `mined_neg` of `result`, and the whole gradient of its anchors, from `count_pos` and `count_neg` in
 * `part`. `reference_gradient` must be NULL.
 *
 * The gradient of an anchor is complete, its row of (G + G^T) E, if `part` has the numbers of all references
 * that are anchors. ddtas_threshold_gradient then returns the part's share.
 *
 * # Safety
 * As ddtas_loss.
 */
enum ddtas_status ddtas_gradient(struct ddtas_context *context,
                                 const struct ddtas_rows *anchors,
                                 const struct ddtas_rows *references,
                                 const struct ddtas_part *part,
                                 struct ddtas_loss_result *result);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* DDTAS_H */
