/* Every buffer is exactly as long as the header says, so that AddressSanitizer sees an access past it; the space between
* strided rows holds values that must survive; nothing is leaked. */
#include "check.h"

/* Copies packed rows to a new strided matrix; no space follows the last row. */
static float *spread(const float *rows, size_t count, size_t stride, float gap) {
    size_t length = (count - 1) * stride + DIM;
    float *spread = malloc(length * sizeof *spread);
    if (!spread)
        exit(1);
    for (size_t i = 0; i < length; i++)
        spread[i] = gap;
    if (rows)
        for (size_t i = 0; i < count; i++)
            memcpy(spread + i * stride, rows + i * DIM, DIM * sizeof *rows);
    return spread;
}

static void compare(const float *spread, const float *packed, size_t count, size_t stride, float gap) {
    for (size_t i = 0; i < count; i++) {
        CHECK(memcmp(spread + i * stride, packed + i * DIM, DIM * sizeof *packed) == 0);
        for (size_t d = DIM; d < stride && i + 1 < count; d++)
            CHECK(spread[i * stride + d] == gap);
    }
}

static void strided(ddtas_context *context, size_t gap) {
    static fixture f, bank;
    fill(&f, 1);
    fill(&bank, 2);
    size_t stride = DIM + gap, bank_count = COUNT - 7;
    bank.view.count = bank_count;
    static float bank_gradient[COUNT * DIM];
    f.result.reference_gradient = bank_gradient;
    CHECK(ddtas_loss(context, NULL, &f.view, &bank.view, &f.result) == DDTAS_STATUS_OK);
    CHECK(f.result.active > 0);
    ddtas_tangents tangents = {.struct_size = sizeof tangents, .anchors = bank.rows, .references = f.rows};
    double pos, neg, strided_pos, strided_neg;
    CHECK(ddtas_threshold_gradient(context, &f.view, &bank.view, &tangents, &pos, &neg) == DDTAS_STATUS_OK);

    float *rows = spread(f.rows, COUNT, stride, NAN), *bank_rows = spread(bank.rows, bank_count, stride, NAN);
    float *gradient = spread(NULL, COUNT, stride, 7), *reference_gradient = spread(NULL, bank_count, stride, 7);
    int64_t *labels = malloc(COUNT * sizeof *labels);
    uint32_t *count_pos = malloc(COUNT * sizeof *count_pos), *count_neg = malloc(COUNT * sizeof *count_neg);
    float *min_pos = malloc(COUNT * sizeof *min_pos), *max_neg = malloc(COUNT * sizeof *max_neg);
    memcpy(labels, f.labels, COUNT * sizeof *labels);
    ddtas_rows anchors = f.view, references = bank.view;
    anchors.embeddings = rows;
    anchors.labels = labels;
    anchors.row_stride = references.row_stride = stride;
    references.embeddings = bank_rows;
    ddtas_loss_result result = {.struct_size = sizeof result,
                                .gradient = gradient,
                                .gradient_stride = stride,
                                .reference_gradient = reference_gradient,
                                .reference_gradient_stride = stride,
                                .min_pos = min_pos,
                                .max_neg = max_neg,
                                .count_pos = count_pos,
                                .count_neg = count_neg};
    CHECK(ddtas_loss(context, NULL, &anchors, &references, &result) == DDTAS_STATUS_OK);
    CHECK(result.loss == f.result.loss && result.mined_neg == f.result.mined_neg);
    compare(gradient, f.gradient, COUNT, stride, 7);
    compare(reference_gradient, bank_gradient, bank_count, stride, 7);
    uint64_t mined = 0;
    for (int i = 0; i < COUNT; i++)
        mined += count_pos[i] && count_neg[i] ? count_neg[i] : 0;
    CHECK(mined == result.mined_neg);

    float *own = spread(bank.rows, COUNT, stride, NAN), *other = spread(f.rows, bank_count, stride, NAN);
    tangents = (ddtas_tangents){.struct_size = sizeof tangents,
                                .anchors = own,
                                .anchor_stride = stride,
                                .references = other,
                                .reference_stride = stride};
    CHECK(ddtas_threshold_gradient(context, &anchors, &references, &tangents, &strided_pos, &strided_neg) ==
          DDTAS_STATUS_OK);
    CHECK(strided_pos == pos && strided_neg == neg && pos != 0);

    enum { K = 5 };
    uint32_t *indices = malloc(COUNT * K * sizeof *indices);
    float *similarities = malloc(COUNT * K * sizeof *similarities);
    anchors.labels = NULL;
    CHECK(ddtas_nearest(context, &anchors, &references, K, indices, similarities) == DDTAS_STATUS_OK);
    for (int i = 0; i < COUNT * K; i++)
        CHECK(indices[i] < bank_count);
    size_t *ks = malloc(sizeof *ks);
    double *recall = malloc(sizeof *recall);
    *ks = 3;
    CHECK(ddtas_recall_at_k(context, &f.view, ks, 1, recall, NULL) == DDTAS_STATUS_OK && *recall > 0);

    void *all[] = {rows,  bank_rows, gradient, reference_gradient, labels, count_pos, count_neg,
                   min_pos, max_neg, own,      other,              indices, similarities, ks, recall};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        free(all[i]);
}

int main(void) {
    for (size_t threads = 1; threads <= 3; threads++) {
        ddtas_context *context = open_context(threads);
        strided(context, 0);
        strided(context, 1);
        strided(context, 13);
        ddtas_context_destroy(context);
    }
    return report("memory");
}
