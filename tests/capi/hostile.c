/* Input that a correct program never hands in: each is refused with its status and a line of text,
 * nothing is written, and the context goes on working. */
#include "check.h"

static ddtas_context *context;
static fixture f;

/* The loss of the fixture as it stands. */
static ddtas_status loss(const ddtas_settings *settings) {
    return ddtas_loss(context, settings, &f.view, NULL, &f.result);
}

/* Fills the fixture anew, and checks that the context still computes what it did at first. */
static void again(void) {
    static double first;
    fill(&f, 1);
    CHECK(loss(NULL) == DDTAS_STATUS_OK);
    CHECK(ddtas_context_message(context, NULL, 0) == 0);
    CHECK(f.result.active > 0 && f.result.loss > 0);
    if (first == 0)
        first = f.result.loss;
    CHECK(f.result.loss == first);
    fill(&f, 1);
    f.gradient[0] = 77;
}

/* Nothing of the result was written. */
static void untouched(void) {
    CHECK(f.gradient[0] == 77 && f.result.loss == 0 && f.result.active == 0);
    again();
}

static void contexts(void) {
    char message[16] = "................";
    ddtas_context *made = (ddtas_context *)&f;
    ddtas_context_options options = {.struct_size = sizeof options, .device = "abacus"};
    CHECK(ddtas_context_create(&options, &made, message, sizeof message) == DDTAS_STATUS_INVALID_VALUE);
    CHECK(made == NULL);
    CHECK(strlen(message) == sizeof message - 1 && strncmp(message, "device = abacus", 15) == 0);
    CHECK(ddtas_context_create(&options, NULL, message, sizeof message) == DDTAS_STATUS_NULL_POINTER);
    options.device = "cuda:999";
    CHECK(ddtas_context_create(&options, &made, NULL, 0) == DDTAS_STATUS_UNAVAILABLE);
    options = (ddtas_context_options){.struct_size = sizeof options, .device = "cpu", .threads = SIZE_MAX};
    CHECK(ddtas_context_create(&options, &made, NULL, 99) == DDTAS_STATUS_INVALID_VALUE);
    options.threads = 100000;
    CHECK(ddtas_context_create(&options, &made, message, sizeof message) == DDTAS_STATUS_INVALID_VALUE);
    options = (ddtas_context_options){.struct_size = sizeof options, .device = "cpu", .stream_mode = 2};
    CHECK(ddtas_context_create(&options, &made, message, 1) == DDTAS_STATUS_INVALID_VALUE);
    CHECK(message[0] == '\0');
    options.stream_mode = DDTAS_STREAM_MODE_GIVEN;
    CHECK(ddtas_context_create(&options, &made, message, 0) == DDTAS_STATUS_INVALID_VALUE);
    options = (ddtas_context_options){.struct_size = 3};
    CHECK(ddtas_context_create(&options, &made, NULL, 0) == DDTAS_STATUS_STRUCT_SIZE);

    /* A budget of one byte keeps nothing and computes the same; NULL options are the defaults. */
    options = (ddtas_context_options){.struct_size = sizeof options, .device = "cpu", .workspace_bytes = 1};
    CHECK(ddtas_context_create(&options, &made, NULL, 0) == DDTAS_STATUS_OK);
    ddtas_loss_result small = {.struct_size = sizeof small};
    CHECK(ddtas_loss(made, NULL, &f.view, NULL, &small) == DDTAS_STATUS_OK);
    CHECK(loss(NULL) == DDTAS_STATUS_OK && small.loss == f.result.loss);
    ddtas_context_destroy(made);
    CHECK(ddtas_context_create(NULL, &made, NULL, 0) == DDTAS_STATUS_OK);
    ddtas_context_destroy(made);
    ddtas_context_destroy(NULL);

    CHECK(ddtas_context_message(NULL, message, sizeof message) > 0);
    CHECK(ddtas_context_device(NULL, message, sizeof message) == 0);
    CHECK(ddtas_context_device(context, message, 3) == 3 && strcmp(message, "cp") == 0);
    size_t bytes = 0;
    CHECK(ddtas_workspace_bytes(context, &bytes) == DDTAS_STATUS_OK && bytes > 0);
    REFUSED(context, ddtas_workspace_bytes(context, NULL), DDTAS_STATUS_NULL_POINTER, "bytes is NULL");
    CHECK(ddtas_abi_version() == DDTAS_ABI_VERSION && strlen(ddtas_version()) >= 5);
    again();
}

static void null_pointers(void) {
    CHECK(ddtas_loss(NULL, NULL, &f.view, NULL, &f.result) == DDTAS_STATUS_NULL_POINTER);
    untouched();
    REFUSED(context, ddtas_loss(context, NULL, NULL, NULL, &f.result), DDTAS_STATUS_NULL_POINTER, "anchors");
    untouched();
    REFUSED(context, ddtas_loss(context, NULL, &f.view, NULL, NULL), DDTAS_STATUS_NULL_POINTER, "ddtas_loss_result");
    untouched();
    f.view.embeddings = NULL;
    REFUSED(context, loss(NULL), DDTAS_STATUS_NULL_POINTER, "anchors.embeddings");
    untouched();
    f.view.labels = NULL;
    REFUSED(context, loss(NULL), DDTAS_STATUS_NULL_POINTER, "anchors.labels");
    untouched();
    /* Everything that may be NULL, at once. */
    f.result = (ddtas_loss_result){.struct_size = sizeof f.result};
    CHECK(loss(NULL) == DDTAS_STATUS_OK && f.result.active > 0);
    again();
}

static void misaligned_pointers(void) {
    char *odd = (char *)f.rows + 1;
    f.view.embeddings = odd;
    REFUSED(context, loss(NULL), DDTAS_STATUS_MISALIGNED, "aligned to 4");
    untouched();
    f.view.labels = (const int64_t *)(const void *)((const char *)f.labels + 4);
    REFUSED(context, loss(NULL), DDTAS_STATUS_MISALIGNED, "anchors.labels");
    untouched();
    f.result.gradient = (float *)(void *)((char *)f.gradient + 2);
    REFUSED(context, loss(NULL), DDTAS_STATUS_MISALIGNED, "gradient");
    untouched();
    f.result.count_neg = (uint32_t *)(void *)((char *)f.gradient + 1);
    REFUSED(context, loss(NULL), DDTAS_STATUS_MISALIGNED, "count_neg");
    untouched();
    ddtas_rows *view = (ddtas_rows *)(void *)((char *)&f + 1);
    REFUSED(context, ddtas_loss(context, NULL, view, NULL, &f.result), DDTAS_STATUS_MISALIGNED, "ddtas_rows");
    untouched();
    CHECK(ddtas_loss((ddtas_context *)(void *)((char *)context + 1), NULL, &f.view, NULL, &f.result) ==
          DDTAS_STATUS_MISALIGNED);
    untouched();
    /* Half-precision rows need 2 bytes only. */
    f.view.dtype = DDTAS_DTYPE_F16;
    f.view.embeddings = (char *)f.rows + 2;
    f.view.count = COUNT / 2;
    ddtas_settings trust;
    CHECK(ddtas_settings_init(&trust, sizeof trust) == DDTAS_STATUS_OK);
    trust.row_check = DDTAS_ROW_CHECK_TRUST;
    CHECK(loss(&trust) == DDTAS_STATUS_OK);
    again();
}

static void sizes(void) {
    struct {
        size_t count, dim, stride;
        const char *text;
    } bad[] = {
        {0, DIM, 0, "empty"},
        {COUNT, 0, 0, "empty"},
        {SIZE_MAX, DIM, 0, "at most"},
        {COUNT, SIZE_MAX, 0, "at most"},
        {(size_t)1 << 31, 1, 0, "at most"},
        {COUNT, DIM, SIZE_MAX, "address space"},
        {COUNT, DIM, SIZE_MAX / 4 + 2, "address space"},
        {COUNT, DIM, SIZE_MAX / (COUNT - 1) / 4, "address space"},
        {((size_t)1 << 31) - 1, ((size_t)1 << 31) - 1, 0, "address space"},
        {COUNT, DIM, DIM - 1, "less than a row"},
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        f.view.count = bad[i].count;
        f.view.dim = bad[i].dim;
        f.view.row_stride = bad[i].stride;
        REFUSED(context, loss(NULL), DDTAS_STATUS_INVALID_SHAPE, bad[i].text);
        untouched();
    }
    f.result.gradient_stride = DIM - 1;
    REFUSED(context, loss(NULL), DDTAS_STATUS_INVALID_SHAPE, "gradient");
    untouched();
    f.result.gradient_stride = SIZE_MAX / 2;
    REFUSED(context, loss(NULL), DDTAS_STATUS_INVALID_SHAPE, "address space");
    untouched();

    ddtas_rows other = f.view;
    other.dim = DIM - 1;
    REFUSED(context, ddtas_loss(context, NULL, &f.view, &other, &f.result), DDTAS_STATUS_INVALID_SHAPE,
            "expected 24, got 23");
    untouched();
    f.result.reference_gradient = f.gradient;
    REFUSED(context, loss(NULL), DDTAS_STATUS_INVALID_VALUE, "square form");
    untouched();
}

static void struct_sizes(void) {
    size_t bad[] = {0, 1, sizeof f.view - 1, 4097, SIZE_MAX};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        f.view.struct_size = bad[i];
        REFUSED(context, loss(NULL), DDTAS_STATUS_STRUCT_SIZE, "ddtas_rows.struct_size");
        untouched();
        f.result.struct_size = bad[i];
        REFUSED(context, loss(NULL), DDTAS_STATUS_STRUCT_SIZE, "struct_size");
        untouched();
        ddtas_settings settings;
        CHECK(ddtas_settings_init(&settings, sizeof settings) == DDTAS_STATUS_OK);
        settings.struct_size = bad[i];
        REFUSED(context, loss(&settings), DDTAS_STATUS_STRUCT_SIZE, "struct_size");
        untouched();
    }
    ddtas_settings settings;
    CHECK(ddtas_settings_init(NULL, sizeof settings) == DDTAS_STATUS_NULL_POINTER);
    CHECK(ddtas_settings_init(&settings, 8) == DDTAS_STATUS_STRUCT_SIZE);
    CHECK(ddtas_settings_init(&settings, sizeof settings + 8) == DDTAS_STATUS_STRUCT_SIZE);
}

static void values(void) {
    int32_t bad[] = {-1, 4, INT32_MIN, INT32_MAX};
    ddtas_settings settings;
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        f.view.dtype = bad[i];
        REFUSED(context, loss(NULL), DDTAS_STATUS_INVALID_VALUE, "dtype");
        untouched();
        f.view.memory = bad[i];
        REFUSED(context, loss(NULL), DDTAS_STATUS_INVALID_VALUE, "memory");
        untouched();
        ddtas_settings_init(&settings, sizeof settings);
        settings.mining = bad[i];
        REFUSED(context, loss(&settings), DDTAS_STATUS_INVALID_VALUE, "mining");
        untouched();
        ddtas_settings_init(&settings, sizeof settings);
        settings.row_check = bad[i];
        REFUSED(context, loss(&settings), DDTAS_STATUS_INVALID_VALUE, "row_check");
        untouched();
    }
    double out_of_range[] = {NAN, INFINITY, -INFINITY, -3, 1e9};
    for (size_t i = 0; i < sizeof out_of_range / sizeof *out_of_range; i++) {
        double *fields[] = {&settings.gamma, &settings.negative_ratio, &settings.probe_ratio, &settings.tolerance,
                            &settings.alpha, &settings.beta,           &settings.lambda_pos,  &settings.lambda_neg};
        for (size_t field = 0; field < sizeof fields / sizeof *fields; field++) {
            ddtas_settings_init(&settings, sizeof settings);
            *fields[field] = out_of_range[i];
            REFUSED(context, loss(&settings), DDTAS_STATUS_INVALID_VALUE, "out of range");
            untouched();
        }
    }
    f.view.memory = DDTAS_MEMORY_DEVICE;
    REFUSED(context, loss(NULL), DDTAS_STATUS_UNAVAILABLE, "host memory only");
    untouched();
    ddtas_rows other = f.view;
    other.dtype = DDTAS_DTYPE_BF16;
    REFUSED(context, ddtas_loss(context, NULL, &f.view, &other, &f.result), DDTAS_STATUS_INVALID_VALUE, "dtype");
    untouched();
}

static void contents(void) {
    float bad[] = {NAN, INFINITY, -INFINITY};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        f.rows[7 * DIM + 3] = bad[i];
        REFUSED(context, loss(NULL), DDTAS_STATUS_NOT_FINITE, "row 7 of the anchors");
        untouched();
    }
    /* Finite, though its square is not in single precision. */
    f.rows[7 * DIM + 3] = 3e38f;
    REFUSED(context, loss(NULL), DDTAS_STATUS_NOT_UNIT, "row 7 of the anchors");
    untouched();
    for (int d = 0; d < DIM; d++)
        f.rows[(COUNT - 1) * DIM + d] = 0;
    REFUSED(context, loss(NULL), DDTAS_STATUS_NOT_UNIT, "row 59");
    untouched();
    static fixture bank;
    fill(&bank, 2);
    bank.rows[0] = NAN;
    REFUSED(context, ddtas_loss(context, NULL, &f.view, &bank.view, &f.result), DDTAS_STATUS_NOT_FINITE,
            "row 0 of the references");
    untouched();

    /* A caller that vouches for rows it should not: a meaningless loss, and nothing worse. */
    ddtas_settings trust;
    ddtas_settings_init(&trust, sizeof trust);
    trust.row_check = DDTAS_ROW_CHECK_TRUST;
    float garbage[] = {NAN, INFINITY, -3e38f, 1e30f};
    for (int i = 0; i < COUNT * DIM; i += 5)
        f.rows[i] = garbage[i % 4];
    CHECK(loss(&trust) == DDTAS_STATUS_OK);
    again();
    int64_t labels[] = {INT64_MIN, INT64_MAX, -1, 0};
    for (int i = 0; i < COUNT; i++)
        f.labels[i] = labels[i % 4];
    CHECK(loss(NULL) == DDTAS_STATUS_OK);
    again();
    for (int i = 0; i < COUNT; i++)
        f.labels[i] = -5;
    f.result.gradient = f.gradient;
    CHECK(loss(NULL) == DDTAS_STATUS_OK && f.result.loss == 0 && f.gradient[0] == 0 && isnan(f.result.mean_pos));
    again();
}

static void threshold(void) {
    ddtas_context *fresh = open_context(1);
    ddtas_tangents tangents = {.struct_size = sizeof tangents, .anchors = f.rows};
    double pos = 5, neg = 5;
    REFUSED(fresh, ddtas_threshold_gradient(fresh, &f.view, NULL, &tangents, &pos, &neg), DDTAS_STATUS_OUT_OF_ORDER,
            "loss");
    CHECK(loss(NULL) == DDTAS_STATUS_OK);
    CHECK(ddtas_threshold_gradient(context, &f.view, NULL, &tangents, &pos, &neg) == DDTAS_STATUS_OK);
    CHECK(pos != 5 && neg != 5 && isfinite(pos) && isfinite(neg));
    pos = neg = 5;
    REFUSED(context, ddtas_threshold_gradient(context, &f.view, NULL, &tangents, NULL, &neg), DDTAS_STATUS_NULL_POINTER,
            "gradient_lambda_pos");
    tangents.anchors = NULL;
    REFUSED(context, ddtas_threshold_gradient(context, &f.view, NULL, &tangents, &pos, &neg), DDTAS_STATUS_NULL_POINTER,
            "tangents.anchors");
    tangents.anchors = f.rows;
    tangents.anchor_stride = SIZE_MAX;
    REFUSED(context, ddtas_threshold_gradient(context, &f.view, NULL, &tangents, &pos, &neg),
            DDTAS_STATUS_INVALID_SHAPE, "address space");
    tangents.anchor_stride = 0;
    f.view.count = COUNT - 1;
    REFUSED(context, ddtas_threshold_gradient(context, &f.view, NULL, &tangents, &pos, &neg),
            DDTAS_STATUS_INVALID_SHAPE, "last loss");
    f.view.count = COUNT;
    static fixture moving;
    fill(&moving, 3);
    moving.rows[5] = NAN;
    tangents.anchors = moving.rows;
    REFUSED(context, ddtas_threshold_gradient(context, &f.view, NULL, &tangents, &pos, &neg), DDTAS_STATUS_NOT_FINITE,
            "row 0 of the tangent");
    CHECK(pos == 5 && neg == 5);
    /* A failed loss is forgotten, not half remembered. */
    f.rows[0] = NAN;
    CHECK(loss(NULL) == DDTAS_STATUS_NOT_FINITE);
    tangents.anchors = f.rows;
    f.rows[0] = 0;
    CHECK(ddtas_threshold_gradient(context, &f.view, NULL, &tangents, &pos, &neg) == DDTAS_STATUS_OUT_OF_ORDER);
    ddtas_context_destroy(fresh);
    again();
}

static void search(void) {
    size_t ks[] = {1, 0};
    double recall[2] = {5, 5};
    uint64_t queries = 5;
    REFUSED(context, ddtas_recall_at_k(context, &f.view, ks, 2, recall, &queries), DDTAS_STATUS_INVALID_VALUE, "1 or more");
    REFUSED(context, ddtas_recall_at_k(context, &f.view, ks, 0, recall, &queries), DDTAS_STATUS_INVALID_SHAPE, "empty");
    REFUSED(context, ddtas_recall_at_k(context, &f.view, ks, SIZE_MAX, recall, NULL), DDTAS_STATUS_INVALID_SHAPE, "at most");
    REFUSED(context, ddtas_recall_at_k(context, &f.view, NULL, 1, recall, NULL), DDTAS_STATUS_NULL_POINTER, "ks");
    REFUSED(context, ddtas_recall_at_k(context, &f.view, ks, 1, NULL, NULL), DDTAS_STATUS_NULL_POINTER, "recall_at");
    CHECK(recall[0] == 5 && queries == 5);
    ks[0] = 1000000000000, ks[1] = SIZE_MAX;
    CHECK(ddtas_recall_at_k(context, &f.view, ks, 2, recall, &queries) == DDTAS_STATUS_OK);
    CHECK(recall[0] == 1 && recall[1] == 1 && queries == COUNT);
    ks[0] = 1;
    CHECK(ddtas_recall_at_k(context, &f.view, ks, 2, recall, &queries) == DDTAS_STATUS_OK);
    CHECK(recall[0] >= 0 && recall[0] <= 1 && recall[1] == 1 && queries == COUNT);
    f.view.count = 1;
    CHECK(ddtas_recall_at_k(context, &f.view, ks, 2, recall, &queries) == DDTAS_STATUS_OK && queries == 0);
    f.view.count = COUNT;

    /* More neighbours than there are: the rest says so. */
    enum { K = COUNT + 3 };
    static uint32_t indices[COUNT * K];
    static float similarities[COUNT * K];
    f.view.labels = NULL;
    CHECK(ddtas_nearest(context, &f.view, NULL, K, indices, similarities) == DDTAS_STATUS_OK);
    CHECK(indices[0] < COUNT && indices[0] != 0 && indices[COUNT - 2] < COUNT);
    CHECK(indices[COUNT - 1] == DDTAS_NO_NEIGHBOUR && indices[COUNT * K - 1] == DDTAS_NO_NEIGHBOUR);
    CHECK(isinf(similarities[COUNT * K - 1]) && similarities[0] >= similarities[1]);
    REFUSED(context, ddtas_nearest(context, &f.view, NULL, 0, indices, similarities), DDTAS_STATUS_INVALID_SHAPE, "empty");
    REFUSED(context, ddtas_nearest(context, &f.view, NULL, SIZE_MAX, indices, similarities), DDTAS_STATUS_INVALID_SHAPE,
            "at most");
    REFUSED(context, ddtas_nearest(context, &f.view, NULL, 1, NULL, similarities), DDTAS_STATUS_NULL_POINTER, "indices");
    REFUSED(context, ddtas_nearest(context, &f.view, NULL, 1, indices, NULL), DDTAS_STATUS_NULL_POINTER, "similarities");
    f.view.memory = DDTAS_MEMORY_DEVICE;
    REFUSED(context, ddtas_nearest(context, &f.view, NULL, 1, indices, similarities), DDTAS_STATUS_UNAVAILABLE, "host");
    again();
}

int main(void) {
    context = open_context(2);
    again();
    contexts();
    null_pointers();
    misaligned_pointers();
    sizes();
    struct_sizes();
    values();
    contents();
    threshold();
    search();
    ddtas_context_destroy(context);
    return report("hostile");
}
