//! Help of the training settings: sections, ranges, and the settings that `-h` shows.

use clap::{Args, Command, FromArgMatches};
use ddtas_io::Error as Program;
use ddtas_train::Error;
use ddtas_train::train::TrainSettings;

/// Headings, and the arguments below each by field name, in order.
const SECTIONS: &[(&str, &[&str])] = &[
    (
        "Runs",
        &[
            "preset",
            "resume",
            "output",
            "seed",
            "steps",
            "device",
            "workers",
            "ranks",
            "rendezvous",
            "rank_timeout",
            "checkpoint_every",
            "max_bad_images",
            "quiet",
            "json",
        ],
    ),
    (
        "Data",
        &["dataset", "data_root", "train_classes", "crop_to_box", "data_seed", "image_size", "smallest_crop"],
    ),
    ("Batches", &["classes_per_batch", "images_per_class", "chunk_size"]),
    (
        "Network",
        &["backbone", "weights", "init", "pooling", "embedding_dim", "head", "batch_norm", "width", "depth"],
    ),
    (
        "Optimisation",
        &[
            "learning_rate",
            "head_learning_rate",
            "head_steps",
            "warm_up",
            "schedule",
            "milestones",
            "milestone_factor",
            "optimizer",
            "weight_decay",
            "weight_decay_on",
            "ema",
        ],
    ),
    (
        "Loss",
        &[
            "loss",
            "mining",
            "lambda",
            "lambda_pos",
            "lambda_neg",
            "margin",
            "gamma",
            "negative_ratio",
            "probe_ratio",
            "tolerance",
            "alpha",
            "beta",
            "memory_size",
            "memory_start",
        ],
    ),
    ("Evaluation", &["evaluate_every"]),
    (
        "Learned threshold",
        &[
            "kind",
            "rehearsal",
            "lambda_rate",
            "lambda_optimizer",
            "lambda_pair",
            "lambda_min",
            "lambda_max",
            "lambda_l1",
            "lambda_l2",
            "lambda_ensemble",
            "generator_init",
            "meta",
            "meta_classes",
            "meta_images",
            "meta_recent",
            "meta_objective",
            "lambda_reference",
            "virtual_step",
            "virtual_rate",
        ],
    ),
];

/// Arguments that `-h` shows; `--help` shows all.
const FIRST: &[&str] = &[
    "preset",
    "resume",
    "output",
    "seed",
    "steps",
    "device",
    "quiet",
    "dataset",
    "data_root",
    "train_classes",
    "image_size",
    "classes_per_batch",
    "images_per_class",
    "backbone",
    "weights",
    "init",
    "embedding_dim",
    "learning_rate",
    "loss",
    "mining",
    "lambda",
    "memory_size",
    "kind",
];

/// `command` with its arguments in sections.
pub fn in_sections(mut command: Command) -> Command {
    let mut order = 0;
    for (heading, arguments) in SECTIONS {
        for argument in *arguments {
            order += 1;
            let there = command.get_arguments().any(|known| known.get_id() == *argument);
            // Some settings exist only with certain features.
            if there {
                command = command.mut_arg(argument, |known| {
                    known
                        .help_heading(*heading)
                        .display_order(order)
                        .hide_short_help(!FIRST.contains(argument))
                });
            }
        }
    }
    let unlisted: Vec<String> = command
        .get_arguments()
        .filter(|argument| argument.get_help_heading().is_none() && argument.get_long().is_some())
        .map(|argument| argument.get_id().to_string())
        .collect();
    // Arguments in no section are shown, too.
    unlisted.into_iter().fold(command, |command, id| {
        command.mut_arg(id, |argument| argument.help_heading("Others").hide_short_help(true))
    })
}

/// `command` with the range of each setting at the end of its `--help`. The text is that of the validation
/// error, so that both always agree.
pub fn with_ranges(command: Command) -> Command {
    let settings = TrainSettings::augment_args(Command::new("settings"));
    let ranges: Vec<(String, &'static str)> = settings
        .get_arguments()
        .filter_map(|argument| {
            let range = ["inf", &u64::MAX.to_string()]
                .into_iter()
                .find_map(|value| range(settings.clone(), argument.get_long()?, value));
            Some((argument.get_id().to_string(), range?))
        })
        .collect();
    ranges.into_iter().fold(command, |command, (id, range)| {
        command.mut_arg(id, |argument| {
            let help = argument.get_long_help().or(argument.get_help()).cloned().unwrap_or_default();
            argument.long_help(format!("{help} [range: {range}]"))
        })
    })
}

/// The range in the error for an invalid `value` of a flag, without the reason that some errors append.
fn range(settings: Command, flag: &str, value: &str) -> Option<&'static str> {
    let matches = settings.no_binary_name(true).try_get_matches_from([format!("--{flag}={value}")]).ok()?;
    let refused = TrainSettings::from_arg_matches(&matches).ok()?.validate().err()?;
    let Error::Program(Program::InvalidSetting { name, range, .. }) = refused else { return None };
    (name == flag).then(|| range.split(':').next().unwrap_or(range))
}
