//! Warnings about flags that have no effect.

use clap::ArgMatches;
use clap::parser::ValueSource;
use ddtas::loss::Mining;
use ddtas_train::generator::{GeneratorKind, MetaSource};
use ddtas_train::model::BackboneKind;
use ddtas_train::train::PairLoss;
use ddtas_train::train::{ScheduleKind, TrainSettings};

/// Arguments by field name, the settings that they need, and a check of these settings.
type Rule = (&'static [&'static str], &'static str, fn(&TrainSettings) -> bool);

/// If several rules apply to an argument, the first counts.
const RULES: [Rule; 9] = [
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
        |settings| settings.generator.kind != GeneratorKind::Off,
    ),
    (&["meta_classes", "meta_images"], "--meta fresh", |settings| {
        settings.generator.meta == MetaSource::Fresh
    }),
    (&["meta_recent"], "--meta recent", |settings| settings.generator.meta == MetaSource::Recent),
    (&["width", "depth"], "--backbone residual", |settings| settings.backbone == BackboneKind::Residual),
    (&["gamma"], "a --mining that has tolerances", |settings| settings.mining != Mining::None),
    (&["negative_ratio"], "--mining asms or at-asms", |settings| {
        matches!(settings.mining, Mining::Asms | Mining::AtAsms)
    }),
    (&["probe_ratio", "tolerance"], "--mining at-asms", |settings| settings.mining == Mining::AtAsms),
    (&["alpha", "beta", "lambda", "lambda_pos", "lambda_neg"], "--loss soft-contrastive", |settings| {
        settings.loss == PairLoss::SoftContrastive
    }),
    (&["milestone_factor"], "--schedule step", |settings| settings.optimizer.schedule == ScheduleKind::Step),
];

/// A line for each argument of the command line that has no effect with these settings.
pub fn unused(matches: &ArgMatches, settings: &TrainSettings) -> Vec<String> {
    let mut told = Vec::new();
    for (arguments, needed, _) in RULES.iter().filter(|(.., chosen)| !chosen(settings)) {
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
