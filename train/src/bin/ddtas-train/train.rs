//! Training: prints progress, and a table of Recall@K at the end.

use std::io::{self, Write};
use std::path::Path;
use std::process::ExitCode;
use std::rc::Rc;
use std::sync::atomic::AtomicBool;

use ddtas_io::console::{counted, print_result, printable, reader_has_gone, say};
use ddtas_io::progress::Progress as Shown;
use ddtas_train::arguments::quoted;
use ddtas_train::ranks::Collective;
use ddtas_train::train::PairLoss;
use ddtas_train::train::{
    EvaluationRecord, Event, Outcome, Overrides, Phase, StepRecord, Summary, TrainSettings,
};
use ddtas_train::{Error, Result};

use crate::ranks::RankArguments;
use crate::signals::Signals;

/// What to print.
#[derive(Debug, Clone, Copy)]
pub struct Output {
    /// Only warnings and the result, no progress.
    pub quiet: bool,
    /// The result as JSON.
    pub json: bool,
}

/// Trains with `settings` and prints the outcome; `warnings` are printed once the run has started.
pub fn train(
    settings: &TrainSettings,
    warnings: Vec<String>,
    output: Output,
    ranks: &RankArguments,
) -> Result<ExitCode> {
    on_ranks(ranks, (output, &warnings), |ranks, stop, tell| {
        ddtas_train::train::train(settings, ranks, stop, tell)
    })
}

/// Continues the run in `folder` and prints the outcome.
pub fn resume(
    folder: &Path,
    overrides: &Overrides,
    output: Output,
    ranks: &RankArguments,
) -> Result<ExitCode> {
    on_ranks(ranks, (output, &[]), |ranks, stop, tell| {
        ddtas_train::train::resume(folder, overrides, ranks, stop, tell)
    })
}

/// Runs `work` on all ranks; rank 0 prints.
fn on_ranks(
    ranks: &RankArguments,
    (output, warnings): (Output, &[String]),
    work: impl Fn(&Rc<dyn Collective>, &AtomicBool, &mut dyn FnMut(Event<'_>)) -> Result<Outcome> + Sync,
) -> Result<ExitCode> {
    let signals = Signals::listen()?;
    ranks.run(|ranks| {
        let mut progress = Progress::new(output.quiet, warnings);
        let outcome = work(&ranks, signals.stop(), &mut |event| progress.show(event));
        progress.end(&outcome);
        match outcome {
            Err(error @ Error::Stopped(_)) => {
                say(error);
                Ok(signals.exit_code())
            }
            // Rank 0 prints errors of all ranks, except `Lost`, which other ranks cannot report to it.
            Err(error) if ranks.rank() > 0 && !matches!(error, Error::Lost(_)) => Ok(ExitCode::FAILURE),
            outcome => print_outcome(outcome?, &signals, output),
        }
    })
}

fn print_outcome(outcome: Outcome, signals: &Signals, output: Output) -> Result<ExitCode> {
    match outcome {
        Outcome::Finished(summary) => print_summary(&summary, output.json),
        Outcome::Stopped { command, phase, step } => {
            let of = of(phase);
            let steps = counted(step, "step");
            say(format_args!("stopped after {steps}{of}; to go on: {command}"));
            return Ok(signals.exit_code());
        }
        Outcome::FinishedBefore { folder, command, step, summary } => {
            if output.json {
                let summary = summary.map_err(Error::Training)?;
                print_summary(&summary, true);
            }
            let (steps, last) = (counted(step, "step"), quoted(&folder.join("last.safetensors")));
            let folder = folder.display();
            say(format_args!(
                "the run in {folder} has finished after {steps}; see {folder}/report.html; to train on: {command} --steps N, \
                 or --init {last} in a new run"
            ));
        }
        _ => {}
    }
    Ok(ExitCode::SUCCESS)
}

fn print_summary(summary: &Summary, json: bool) {
    // The run folder is complete, so failing to print the table is only a warning.
    match print_result(json, summary, table) {
        Err(error) if !reader_has_gone(&error) => {
            let folder = summary.folder.display();
            say(format_args!("warning: {error}; {folder}/report.html has the table"));
        }
        _ => {}
    }
}

/// Shows a run's events.
struct Progress {
    shown: Shown,
    phase: Phase,
    loss: PairLoss,
    steps: usize,
    /// Whether a step was shown.
    stepped: bool,
    /// Warnings to print once the run has started.
    warnings: Vec<String>,
}

impl Progress {
    fn new(quiet: bool, warnings: &[String]) -> Self {
        let shown = Shown::new(quiet, "{bar:24} {pos}/{len} [{elapsed}<{eta}] {wide_msg}");
        let (phase, loss) = (Phase::Training, PairLoss::default());
        Self { shown, phase, loss, steps: 0, stepped: false, warnings: warnings.to_vec() }
    }

    fn end(&self, outcome: &Result<Outcome>) {
        if !matches!(outcome, Ok(Outcome::Finished(_))) {
            self.shown.clear();
        }
    }

    fn show(&mut self, event: Event<'_>) {
        match event {
            Event::Computing { device, reason, ranks } => {
                let ranks = if ranks > 1 { format!(", {ranks} ranks") } else { String::new() };
                let reason = reason.map_or_else(String::new, |reason| format!(": {reason}"));
                self.shown.line(&format!("computing on {device}{ranks}{reason}"));
            }
            Event::Started { dataset, folder, loss, steps_per_epoch, phase, steps, resumed } => {
                self.loss = loss;
                self.begin(phase, resumed.unwrap_or(0), steps);
                self.shown.line(&format!(
                    "{}: {} training pictures of {} classes, {} test pictures of {} {}classes{}; {} per epoch; results in {}",
                    dataset.name,
                    dataset.train.len(),
                    dataset.train.class_names().len(),
                    dataset.test.len(),
                    dataset.test.class_names().len(),
                    if dataset.seen { "" } else { "unseen " },
                    dataset.gallery.as_ref().map_or_else(String::new, |gallery| {
                        format!(", searched in a gallery of {}", gallery.len())
                    }),
                    counted(steps_per_epoch, "step"),
                    folder.display(),
                ));
                for warning in std::mem::take(&mut self.warnings) {
                    self.shown.warn(&warning);
                }
                if let Some(done) = resumed {
                    self.shown.line(&format!("continuing after {done} of {steps} steps{}", of(phase)));
                }
            }
            Event::Note(note) => self.shown.line(note),
            Event::Warning(warning) => self.shown.warn(warning),
            Event::Rehearsed { lambda, steps } => {
                let learned = lambda_text(lambda.pos, lambda.neg);
                self.shown.line(&format!("lambda {learned} learned in the rehearsal; training begins"));
                self.begin(Phase::Training, 0, steps);
            }
            Event::Step { record, images_per_second } => self.step(record, images_per_second),
            Event::Evaluating { done, total } => {
                self.shown.message(format!("evaluating: {done} of {total} pictures"));
            }
            Event::Evaluated(record) => self.shown.line(&evaluation_line(record)),
            _ => {}
        }
    }

    fn begin(&mut self, phase: Phase, done: usize, steps: usize) {
        (self.phase, self.steps) = (phase, steps);
        self.shown.begin(done, steps);
    }

    fn step(&mut self, record: &StepRecord, images_per_second: f64) {
        // A loss without mining tolerances, and a batch without pairs, have no gamma.
        let gammas = record.gamma_pos.zip(record.gamma_neg);
        let gammas =
            gammas.map_or_else(String::new, |(pos, neg)| format!("gamma+ {pos:.3}  gamma- {neg:.3}  "));
        let threshold = if self.loss == PairLoss::SoftContrastive { "lambda" } else { "margin" };
        let message = format!(
            "loss {:.3}  {gammas}{threshold} {}  mined {}+{}  {images_per_second:.0} images/s",
            record.loss,
            lambda_text(record.lambda_pos, record.lambda_neg),
            record.mined_pos,
            record.mined_neg,
        );
        let done = record.step + 1;
        self.shown.at(done, self.steps);
        let due = !self.stepped || done == self.steps;
        self.stepped = true;
        let line = format_args!("step {done}/{}{}: {message}", self.steps, of(self.phase));
        self.shown.instead(due, line);
        self.shown.message(message);
    }
}

/// Text after the steps of a part of a run: " of the rehearsal" or nothing.
fn of(phase: Phase) -> &'static str {
    match phase {
        Phase::Rehearsal => " of the rehearsal",
        Phase::Training => "",
    }
}

/// One value if both thresholds are the same.
fn lambda_text(pos: f64, neg: f64) -> String {
    if pos == neg { format!("{pos:.3}") } else { format!("{pos:.3}/{neg:.3}") }
}

fn evaluation_line(record: &EvaluationRecord) -> String {
    let recalls: Vec<String> =
        record.recall.iter().map(|(k, recall)| format!("R@{k} {:.1}", 100.0 * recall)).collect();
    format!("after {}: {}", counted(record.step, "step"), recalls.join("  "))
}

fn table(out: &mut Vec<u8>, summary: &Summary) -> io::Result<()> {
    let header: String = summary.before.at.iter().map(|(k, _)| format!("{:>8}", format!("R@{k}"))).collect();
    let of = if summary.seen { "Recall@K on seen classes" } else { "Recall@K on unseen classes" };
    let mut rows = vec![
        ("raw pixels".to_owned(), &summary.pixels),
        (summary.before_training().to_owned(), &summary.before),
        (format!("trained, {}", counted(summary.steps, "step")), &summary.after),
    ];
    if summary.best_step != summary.steps {
        rows.push((format!("best, after {}", counted(summary.best_step, "step")), &summary.best));
    }
    let width = rows.iter().map(|(name, _)| name.len()).max().unwrap_or(0).max(of.len());
    writeln!(out, "\n{of:<width$}{header}")?;
    for (name, recall) in rows {
        let cells: String = recall.at.iter().map(|(_, recall)| format!("{:8.1}", 100.0 * recall)).collect();
        writeln!(out, "{name:<width$}{cells}")?;
    }
    writeln!(
        out,
        "\n{} queries, seed {}, {:.0} s of training, {:.0} s in all; run folder: {}",
        summary.before.queries,
        summary.seed,
        summary.training_seconds,
        summary.total_seconds,
        printable(&summary.folder.display().to_string()),
    )
}
