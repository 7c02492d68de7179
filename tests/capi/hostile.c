/* Input that a correct program never passes: each is refused with its status and a line of text,
* nothing is written, and the context goes on working. */
#include "check.h"

static ddtas_context *context;
static fixture f;

/* Calls ddtas_loss with the fixture. */
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

/* Checks that nothing of the result was written. */
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

    /* TF32 is a permission, which the CPU makes no use of; a budget of one byte keeps nothing and computes the same; NULL options are the defaults. */
    options = (ddtas_context_options){
        .struct_size = sizeof options, .device = "cpu", .workspace_bytes = 1, .allow_tf32 = 1};
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
    /* The third: a byte less than ddtas_rows of the first header; too small for the other structs too.
     * Those behind it end inside a field, of a struct of this header or of a newer one. */
    size_t bad[] = {0, 1, offsetof(ddtas_rows, identity) - 1, sizeof(ddtas_rows) - 1, 1001, 4092, 4097, SIZE_MAX};
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
    CHECK(ddtas_settings_init(&settings, sizeof settings - 4) == DDTAS_STATUS_STRUCT_SIZE);
    CHECK(ddtas_settings_init(&settings, 4104) == DDTAS_STATUS_STRUCT_SIZE);

    /* Half of a pointer is not read through. */
    ddtas_rows bank = f.view;
    bank.identity = DDTAS_IDENTITY_LIST;
    uint32_t list[COUNT] = {0};
    bank.identity_list = list;
    for (size_t size = offsetof(ddtas_rows, identity_list) + 1; size < sizeof bank; size++) {
        bank.struct_size = size;
        REFUSED(context, ddtas_loss(context, NULL, &f.view, &bank, &f.result), DDTAS_STATUS_STRUCT_SIZE,
                "ddtas_rows.struct_size");
        untouched();
    }
    bank.struct_size = offsetof(ddtas_rows, identity_list);
    REFUSED(context, ddtas_loss(context, NULL, &f.view, &bank, &f.result), DDTAS_STATUS_NULL_POINTER, "identity_list");
    untouched();
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
    /* Finite, but its square overflows single precision. */
    f.rows[7 * DIM + 3] = 3e38f;
    REFUSED(context, loss(NULL), DDTAS_STATUS_NOT_UNIT, "row 7 of the anchors");
    untouched();
    for (int d = 0; d < DIM; d++)
        f.rows[(COUNT - 1) * DIM + d] = 0;
    REFUSED(context, loss(NULL), DDTAS_STATUS_NOT_UNIT, "row 59");
    untouched();
    /* Ignored rows are checked too; any direction will do. */
    f.labels[COUNT - 1] = -1;
    memset(f.rows + (COUNT - 1) * DIM, 0, DIM * sizeof *f.rows);
    REFUSED(context, loss(NULL), DDTAS_STATUS_NOT_UNIT, "row 59");
    f.rows[(COUNT - 1) * DIM] = -1;
    CHECK(loss(NULL) == DDTAS_STATUS_OK);
    again();
    static fixture bank;
    fill(&bank, 2);
    bank.rows[0] = NAN;
    REFUSED(context, ddtas_loss(context, NULL, &f.view, &bank.view, &f.result), DDTAS_STATUS_NOT_FINITE,
            "row 0 of the references");
    untouched();

    /* Unchecked rows of garbage give a meaningless loss, and nothing worse. */
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
    /* After a failed loss there is no last loss. */
    f.rows[0] = NAN;
    CHECK(loss(NULL) == DDTAS_STATUS_NOT_FINITE);
    tangents.anchors = f.rows;
    f.rows[0] = 0;
    CHECK(ddtas_threshold_gradient(context, &f.view, NULL, &tangents, &pos, &neg) == DDTAS_STATUS_OUT_OF_ORDER);
    ddtas_context_destroy(fresh);
    again();
}

static void identity(void) {
    static fixture bank;
    static uint32_t list[COUNT];
    fill(&bank, 1);
    for (int i = 0; i < COUNT; i++)
        list[i] = i % 2 ? (uint32_t)i : DDTAS_ABSENT;
    ddtas_rows known = bank.view;
    known.identity = DDTAS_IDENTITY_LIST;
    known.identity_list = list;
    CHECK(ddtas_loss(context, NULL, &f.view, &known, &f.result) == DDTAS_STATUS_OK);
    again();

    int32_t bad[] = {-1, 3, INT32_MIN, INT32_MAX};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        known.identity = bad[i];
        REFUSED(context, ddtas_loss(context, NULL, &f.view, &known, &f.result), DDTAS_STATUS_INVALID_VALUE,
                "identity = ");
        untouched();
    }
    known.identity = DDTAS_IDENTITY_LIST;
    known.identity_list = NULL;
    REFUSED(context, ddtas_loss(context, NULL, &f.view, &known, &f.result), DDTAS_STATUS_NULL_POINTER,
            "references.identity_list");
    untouched();
    known.identity_list = (const uint32_t *)(const void *)((const char *)list + 2);
    REFUSED(context, ddtas_loss(context, NULL, &f.view, &known, &f.result), DDTAS_STATUS_MISALIGNED,
            "references.identity_list");
    untouched();
    uint32_t wrong[] = {COUNT, UINT32_MAX - 1, 2 /* another class than row 1 */};
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        known.identity_list = list;
        list[1] = wrong[i];
        REFUSED(context, ddtas_loss(context, NULL, &f.view, &known, &f.result), DDTAS_STATUS_INVALID_VALUE,
                "for anchor 1 ");
        untouched();
    }
    known.identity = DDTAS_IDENTITY_FROM;
    uint32_t first[] = {1, COUNT, UINT32_MAX};
    for (size_t i = 0; i < sizeof first / sizeof *first; i++) {
        known.identity_first = first[i];
        REFUSED(context, ddtas_loss(context, NULL, &f.view, &known, &f.result), DDTAS_STATUS_INVALID_VALUE,
                "identity = reference");
        untouched();
    }
    /* An identity is refused where it has no meaning: in the square form and in searches. */
    known.identity_first = 0;
    REFUSED(context, ddtas_loss(context, NULL, &known, NULL, &f.result), DDTAS_STATUS_INVALID_VALUE,
            "belongs to the references");
    untouched();
    uint32_t index;
    float similarity;
    f.view.count = 1;
    REFUSED(context, ddtas_nearest(context, &f.view, &known, 1, &index, &similarity), DDTAS_STATUS_INVALID_VALUE,
            "belongs to the references");
    f.view.memory = known.memory = DDTAS_MEMORY_DEVICE;
    REFUSED(context, ddtas_loss(context, NULL, &f.view, &known, &f.result), DDTAS_STATUS_UNAVAILABLE,
            "host memory only");
    again();
}

/* The steps of a part: rows 10 to 39 of the fixture. */
static ddtas_rows own, all;
static ddtas_part part;
static float numbers[COUNT];
static uint32_t counts[COUNT];

static ddtas_status step(int which) {
    switch (which) {
    case 0:
        return ddtas_same_class(context, NULL, &own, &all, &part, &f.result);
    case 1:
        return ddtas_sweep(context, &own, &all, &part, &f.result);
    case 2:
        return ddtas_select(context, &own, &all, &part, &f.result);
    default:
        return ddtas_gradient(context, &own, &all, &part, &f.result);
    }
}

/* Sets valid arguments for step `which`, and runs the steps before it. */
static void up_to(int which) {
    fill(&f, 1);
    f.gradient[0] = 77;
    own = all = f.view;
    own.embeddings = f.rows + 10 * DIM;
    own.labels = f.labels + 10;
    own.count = 30;
    all.identity = DDTAS_IDENTITY_FROM;
    all.identity_first = 10;
    part = (ddtas_part){.struct_size = sizeof part,
                        .total = COUNT,
                        .reference_numbers = COUNT,
                        .min_pos = numbers,
                        .reference_min_pos = numbers,
                        .max_neg = numbers,
                        .reference_max_neg = numbers,
                        .probe_neg = 5,
                        .total_pos = 5,
                        .count_pos = counts,
                        .reference_count_pos = counts,
                        .count_neg = counts,
                        .reference_count_neg = counts};
    for (int i = 0; i < COUNT; i++) {
        numbers[i] = 0.5f;
        counts[i] = 3;
    }
    for (int before = 0; before < which; before++)
        CHECK(step(before) == DDTAS_STATUS_OK);
    f.result = (ddtas_loss_result){.struct_size = sizeof f.result, .gradient = f.gradient};
}

static void steps(void) {
    for (int which = 0; which < 4; which++) {
        up_to(which);
        CHECK(step(which) == DDTAS_STATUS_OK && (which == 3) == (f.gradient[0] != 77));
        /* Out of order: the step after this one, this one twice, and this one after a loss. */
        up_to(which);
        if (which > 0)
            REFUSED(context, step(which < 3 ? which + 1 : 1), DDTAS_STATUS_OUT_OF_ORDER, "needs the");
        untouched();
        up_to(which);
        CHECK(step(which) == DDTAS_STATUS_OK);
        if (which > 0)
            REFUSED(context, step(which), DDTAS_STATUS_OUT_OF_ORDER, "needs the");
        up_to(which);
        CHECK(loss(NULL) == DDTAS_STATUS_OK);
        if (which > 0)
            REFUSED(context, step(which), DDTAS_STATUS_OUT_OF_ORDER, "needs the");
        /* Rows of another part. */
        up_to(which);
        own.labels++;
        all.identity_first++;
        if (which > 0)
            REFUSED(context, step(which), DDTAS_STATUS_OUT_OF_ORDER, "labels differ");
        untouched();

        ddtas_rows good_own, good_all;
        ddtas_part good_part;
#define WRONG(change, status, text)                                                                                    \
    do {                                                                                                               \
        up_to(which);                                                                                                  \
        good_own = own, good_all = all, good_part = part;                                                              \
        change;                                                                                                        \
        REFUSED(context, step(which), status, text);                                                                   \
        own = good_own, all = good_all, part = good_part;                                                              \
        untouched();                                                                                                   \
    } while (0)
        size_t sizes[] = {0, sizeof part - 1, 4097, SIZE_MAX};
        for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
            WRONG(part.struct_size = sizes[i], DDTAS_STATUS_STRUCT_SIZE, "ddtas_part.struct_size");
            WRONG(own.struct_size = sizes[i] - (i == 1) * 60, DDTAS_STATUS_STRUCT_SIZE, "ddtas_rows.struct_size");
            WRONG(f.result.struct_size = i == 1 ? offsetof(ddtas_loss_result, total_neg) - 1 : sizes[i],
                  DDTAS_STATUS_STRUCT_SIZE, "ddtas_loss_result.struct_size");
        }
        WRONG(part.total = 0, DDTAS_STATUS_INVALID_VALUE, "total = 0");
        WRONG(part.reference_numbers = COUNT + 1, DDTAS_STATUS_INVALID_SHAPE, "reference_numbers = 61");
        WRONG(part.reference_numbers = SIZE_MAX, DDTAS_STATUS_INVALID_SHAPE, "reference_numbers");
        WRONG(f.result.reference_gradient = f.gradient, DDTAS_STATUS_INVALID_VALUE, "reference_gradient");
        WRONG(own.embeddings = NULL, DDTAS_STATUS_NULL_POINTER, "anchors.embeddings");
        WRONG(own.labels = NULL, DDTAS_STATUS_NULL_POINTER, "anchors.labels");
        WRONG(own.dim = 0, DDTAS_STATUS_INVALID_SHAPE, "empty");
        WRONG(all.count = 0, DDTAS_STATUS_INVALID_SHAPE, "references are empty");
        WRONG(own.identity = 1, DDTAS_STATUS_INVALID_VALUE, "belongs to the references");
        WRONG(own.memory = all.memory = DDTAS_MEMORY_DEVICE, DDTAS_STATUS_UNAVAILABLE, "host memory only");
        if (which == 1) {
            WRONG(part.min_pos = NULL, DDTAS_STATUS_NULL_POINTER, "part.min_pos");
            WRONG(part.reference_min_pos = NULL, DDTAS_STATUS_NULL_POINTER, "part.reference_min_pos");
        }
        if (which == 2)
            WRONG(part.max_neg = NULL, DDTAS_STATUS_NULL_POINTER, "part.max_neg");
        if (which == 3) {
            WRONG(part.count_pos = NULL, DDTAS_STATUS_NULL_POINTER, "part.count_pos");
            WRONG(part.reference_count_neg = (const uint32_t *)(const void *)((const char *)counts + 1),
                  DDTAS_STATUS_MISALIGNED, "part.reference_count_neg");
        }
        up_to(which);
        ddtas_rows rows = all;
        all.struct_size = 1;
        CHECK(step(which) == DDTAS_STATUS_STRUCT_SIZE);
        all = rows;
    }
    up_to(0);
    CHECK(ddtas_same_class(NULL, NULL, &own, &all, &part, &f.result) == DDTAS_STATUS_NULL_POINTER);
    REFUSED(context, ddtas_same_class(context, NULL, &own, NULL, &part, &f.result), DDTAS_STATUS_NULL_POINTER,
            "references is NULL");
    REFUSED(context, ddtas_same_class(context, NULL, NULL, &all, &part, &f.result), DDTAS_STATUS_NULL_POINTER,
            "anchors is NULL");
    REFUSED(context, ddtas_same_class(context, NULL, &own, &all, NULL, &f.result), DDTAS_STATUS_NULL_POINTER,
            "ddtas_part is NULL");
    REFUSED(context, ddtas_same_class(context, NULL, &own, &all, &part, NULL), DDTAS_STATUS_NULL_POINTER,
            "ddtas_loss_result is NULL");
    f.rows[12 * DIM] = NAN;
    REFUSED(context, step(0), DDTAS_STATUS_NOT_FINITE, "row 2 of the anchors");
    /* A part may have no rows, but only as anchors and only in the steps. */
    up_to(0);
    own = (ddtas_rows){.struct_size = sizeof own, .dim = DIM};
    for (int which = 0; which < 4; which++)
        CHECK(step(which) == DDTAS_STATUS_OK && f.result.loss == 0);
    double pos = 5, neg = 5;
    ddtas_tangents tangents = {.struct_size = sizeof tangents};
    CHECK(ddtas_threshold_gradient(context, &own, &all, &tangents, &pos, &neg) == DDTAS_STATUS_OK);
    CHECK(pos == 0 && neg == 0);
    REFUSED(context, ddtas_loss(context, NULL, &own, &all, &f.result), DDTAS_STATUS_INVALID_SHAPE, "empty");
    /* Numbers that no step finds give a meaningless loss, and nothing worse. */
    float strange[] = {NAN, INFINITY, -INFINITY, -7};
    for (int which = 0; which < 4; which++) {
        up_to(0);
        part.probe_neg = UINT64_MAX;
        part.total_pos = (uint64_t)(which % 2);
        for (int i = 0; i < COUNT; i++) {
            numbers[i] = strange[(i + which) % 4];
            counts[i] = i % 3 ? UINT32_MAX : 0;
        }
        for (int now = 0; now < 4; now++)
            CHECK(step(now) == DDTAS_STATUS_OK);
    }
    again();
}

static void search(void) {
    size_t ks[] = {1, 0};
    double recall[2] = {5, 5};
    uint64_t queries = 5;
    REFUSED(context, ddtas_recall_at_k(context, &f.view, ks, 2, recall, &queries), DDTAS_STATUS_INVALID_VALUE, "1 or more");
    REFUSED(context, ddtas_recall_at_k(context, &f.view, ks, 0, recall, &queries), DDTAS_STATUS_INVALID_VALUE, "k_count = 0");
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

    /* More neighbours than there are: the rest is DDTAS_NO_NEIGHBOUR. */
    enum { K = COUNT + 3 };
    static uint32_t indices[COUNT * K];
    static float similarities[COUNT * K];
    f.view.labels = NULL;
    CHECK(ddtas_nearest(context, &f.view, NULL, K, indices, similarities) == DDTAS_STATUS_OK);
    CHECK(indices[0] < COUNT && indices[0] != 0 && indices[COUNT - 2] < COUNT);
    CHECK(indices[COUNT - 1] == DDTAS_NO_NEIGHBOUR && indices[COUNT * K - 1] == DDTAS_NO_NEIGHBOUR);
    CHECK(isinf(similarities[COUNT * K - 1]) && similarities[0] >= similarities[1]);
    REFUSED(context, ddtas_nearest(context, &f.view, NULL, 0, indices, similarities), DDTAS_STATUS_INVALID_VALUE, "k = 0");
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
    identity();
    steps();
    search();
    ddtas_context_destroy(context);
    return report("hostile");
}
