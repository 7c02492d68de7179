//! Warnings about flags that have no effect.

use clap::ArgMatches;
use clap::parser::ValueSource;
use ddtas::loss::Mining;
use ddtas_train::generator::{GeneratorKind, MetaSource};
use ddtas_train::model::BackboneKind;
use ddtas_train::train::PairLoss;
use ddtas_train::train::{ScheduleKind, TrainSettings};

/// Arguments by field name, the settings that they need, and a check of these settings.
type Rule = (&'static [&'static str], &'static str, fn(&TrainSettings, &ArgMatches) -> bool);

/// If several rules apply to an argument, the first counts.
const RULES: [Rule; 12] = [
    (
        &[
            "lambda_pair",
            "meta",
            "meta_classes",
            "meta_images",
            "meta_recent",
            "lambda_reference",
            "virtual_step",
            "virtual_rate",
            "lambda_optimizer",
            "lambda_rate",
            "lambda_l1",
            "lambda_l2",
            "lambda_min",
            "lambda_max",
            "lambda_ensemble",
        ],
        "--generator head or full",
        |settings, _| settings.generator.kind != GeneratorKind::Off,
    ),
    (&["meta_classes", "meta_images"], "--meta fresh", |settings, _| {
        settings.generator.meta == MetaSource::Fresh
    }),
    (&["meta_recent"], "--meta recent", |settings, _| settings.generator.meta == MetaSource::Recent),
    (&["width", "depth"], "--backbone residual", |settings, _| settings.backbone == BackboneKind::Residual),
    (&["gamma"], "a --mining that has tolerances", |settings, _| settings.mining != Mining::None),
    (&["negative_ratio"], "--mining asms or at-asms", |settings, _| {
        matches!(settings.mining, Mining::Asms | Mining::AtAsms)
    }),
    (&["probe_ratio", "tolerance"], "--mining at-asms", |settings, _| settings.mining == Mining::AtAsms),
    (&["alpha", "beta", "lambda", "lambda_pos", "lambda_neg"], "--loss soft-contrastive", |settings, _| {
        settings.loss == PairLoss::SoftContrastive
    }),
    (&["lambda"], "a threshold that --lambda-pos and --lambda-neg leave open", |settings, _| {
        settings.lambda_pos.is_none() || settings.lambda_neg.is_none()
    }),
    (&["weight_decay_on"], "--weight-decay above 0", |settings, _| settings.weight_decay > 0.0),
    (&["rank_timeout"], "--ranks nccl", |_, matches| {
        matches.get_raw("ranks").is_some_and(|mut values| values.any(|value| value == "nccl"))
    }),
    (&["milestone_factor"], "--schedule step", |settings, _| {
        settings.optimizer.schedule == ScheduleKind::Step
    }),
];

/// A line for each argument of the command line that has no effect with these settings.
pub fn unused(matches: &ArgMatches, settings: &TrainSettings) -> Vec<String> {
    let mut told = Vec::new();
    for (arguments, needed, _) in RULES.iter().filter(|(.., chosen)| !chosen(settings, matches)) {
        for argument in *arguments {
            let given = matches.value_source(argument) == Some(ValueSource::CommandLine);
            if given && !told.iter().any(|(other, _)| other == argument) {
                let flag = argument.replace('_', "-");
                told.push((*argument, format!("--{flag} changes nothing here: it is for {needed}")));
            }
        }
    }
    told.into_iter().map(|(_, line)| line).collect()
}
