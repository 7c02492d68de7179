/* A batch in parts, each with its own context, exchanges its numbers: every row gets the bits of ddtas_loss. */
#include "check.h"

enum { PARTS = 3 };

/* The second part has no rows. */
static const size_t first_of[PARTS + 1] = {0, 23, 23, COUNT};

/* The numbers of all parts, in the order of the rows. */
static float min_pos[COUNT], max_neg[COUNT], gradient[COUNT * DIM];
static uint32_t count_pos[COUNT], count_neg[COUNT];

static void run(const ddtas_settings *settings) {
    static fixture whole, moving;
    static float whole_min_pos[COUNT], whole_max_neg[COUNT];
    static uint32_t whole_pos[COUNT], whole_neg[COUNT];
    fill(&whole, 3);
    fill(&moving, 4);
    whole.labels[5] = whole.labels[30] = -1;
    whole.result.min_pos = whole_min_pos;
    whole.result.max_neg = whole_max_neg;
    whole.result.count_pos = whole_pos;
    whole.result.count_neg = whole_neg;
    ddtas_context *one = open_context(2);
    ddtas_tangents tangents = {.struct_size = sizeof tangents, .anchors = moving.rows};
    double pos, neg;
    CHECK(ddtas_loss(one, settings, &whole.view, NULL, &whole.result) == DDTAS_STATUS_OK);
    CHECK(ddtas_threshold_gradient(one, &whole.view, NULL, &tangents, &pos, &neg) == DDTAS_STATUS_OK);
    CHECK(whole.result.active > 0 && whole.result.mined_neg > 0);
    ddtas_context_destroy(one);

    ddtas_context *contexts[PARTS];
    ddtas_rows anchors[PARTS], references[PARTS];
    ddtas_loss_result results[PARTS];
    ddtas_part given[PARTS];
    for (int p = 0; p < PARTS; p++) {
        size_t first = first_of[p], count = first_of[p + 1] - first;
        contexts[p] = open_context((size_t)p + 1);
        anchors[p] = references[p] = whole.view;
        anchors[p].count = count;
        anchors[p].embeddings = count ? whole.rows + first * DIM : NULL;
        anchors[p].labels = count ? whole.labels + first : NULL;
        references[p].identity = DDTAS_IDENTITY_FROM;
        references[p].identity_first = (uint32_t)first;
        results[p] = (ddtas_loss_result){.struct_size = sizeof *results,
                                         .min_pos = min_pos + first,
                                         .max_neg = max_neg + first,
                                         .count_pos = count_pos + first,
                                         .count_neg = count_neg + first,
                                         .gradient = gradient + first * DIM};
        given[p] = (ddtas_part){.struct_size = sizeof *given,
                                .total = COUNT,
                                .reference_numbers = COUNT,
                                .min_pos = min_pos + first,
                                .reference_min_pos = min_pos,
                                .max_neg = max_neg + first,
                                .reference_max_neg = max_neg,
                                .count_pos = count_pos + first,
                                .reference_count_pos = count_pos,
                                .count_neg = count_neg + first,
                                .reference_count_neg = count_neg};
    }
    for (int p = 0; p < PARTS; p++)
        CHECK(ddtas_same_class(contexts[p], settings, &anchors[p], &references[p], &given[p], &results[p]) ==
              DDTAS_STATUS_OK);
    for (int p = 0; p < PARTS; p++)
        CHECK(ddtas_sweep(contexts[p], &anchors[p], &references[p], &given[p], &results[p]) == DDTAS_STATUS_OK);
    for (int p = 0; p < PARTS; p++) {
        for (int q = 0; q < PARTS; q++) {
            given[p].probe_neg += results[q].probe_neg;
            given[p].total_pos += results[q].total_pos;
        }
        CHECK(ddtas_select(contexts[p], &anchors[p], &references[p], &given[p], &results[p]) == DDTAS_STATUS_OK);
    }
    double loss = 0, parts_pos = 0, parts_neg = 0, mean_neg = 0;
    uint64_t total_neg = 0, active = 0, mined_pos = 0, mined_neg = 0;
    for (int p = 0; p < PARTS; p++) {
        CHECK(ddtas_gradient(contexts[p], &anchors[p], &references[p], &given[p], &results[p]) == DDTAS_STATUS_OK);
        double share_pos, share_neg;
        tangents.anchors = anchors[p].count ? moving.rows + first_of[p] * DIM : NULL;
        CHECK(ddtas_threshold_gradient(contexts[p], &anchors[p], &references[p], &tangents, &share_pos, &share_neg) ==
              DDTAS_STATUS_OK);
        parts_pos += share_pos;
        parts_neg += share_neg;
        loss += results[p].loss;
        active += results[p].active;
        mined_pos += results[p].mined_pos;
        mined_neg += results[p].mined_neg;
        total_neg += results[p].total_neg;
        mean_neg += results[p].total_neg ? results[p].mean_neg * (double)results[p].total_neg : 0;
        CHECK(results[p].gamma_pos == whole.result.gamma_pos && results[p].gamma_neg == whole.result.gamma_neg);
        CHECK(anchors[p].count || (results[p].loss == 0 && results[p].total_neg == 0));
        ddtas_context_destroy(contexts[p]);
    }

    CHECK(memcmp(min_pos, whole_min_pos, sizeof min_pos) == 0);
    CHECK(memcmp(max_neg, whole_max_neg, sizeof max_neg) == 0);
    CHECK(memcmp(count_pos, whole_pos, sizeof count_pos) == 0);
    CHECK(memcmp(count_neg, whole_neg, sizeof count_neg) == 0);
    CHECK(memcmp(gradient, whole.gradient, sizeof gradient) == 0);
    CHECK(given[0].probe_neg == whole.result.probe_neg && given[0].total_pos == whole.result.total_pos);
    CHECK(total_neg == whole.result.total_neg && active == whole.result.active);
    CHECK(mined_pos == whole.result.mined_pos && mined_neg == whole.result.mined_neg);
    CHECK(fabs(mean_neg / (double)total_neg - whole.result.mean_neg) < 1e-9);
    /* Sums over the batch are added in another order. */
    CHECK(fabs(loss - whole.result.loss) <= 1e-6 * whole.result.loss);
    CHECK(fabs(parts_pos - pos) <= 1e-9 * fabs(pos) + 1e-12 && fabs(parts_neg - neg) <= 1e-9 * fabs(neg) + 1e-12);
}

int main(void) {
    ddtas_settings settings;
    run(NULL);
    for (int mining = DDTAS_MINING_MODE_AT_ASMS; mining <= DDTAS_MINING_MODE_NONE; mining++) {
        CHECK(ddtas_settings_init(&settings, sizeof settings) == DDTAS_STATUS_OK);
        settings.mining = mining;
        run(&settings);
    }
    return report("parts");
}
